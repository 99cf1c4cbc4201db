"""The heat map: a column a token, a row a layer, and a text that says so."""

import dataclasses
import itertools

import numpy as np
from conftest import make_probe

from llama_probe.evaluation.heatmap import heat_map
from llama_probe.evaluation.plots import png
from llama_probe.evaluation.reading import Reading


TOKENS = ["<bos>", "system", "\n", "$\\frac{$", " \u202eabc", "\n", "👩\u200d👧語", "", "\t", "<eos>"]


def make_reading(tokens, unread=0, label="yes", **changes):
    """What a head might have looked at. The template's tokens are those that are not read, and the last one."""
    config = make_probe(probe_type="gate", id2label={0: "no", 1: label}, **changes).config
    rng = np.random.default_rng(0)
    weights = np.zeros((len(config.layer_indices), len(tokens)))
    weights[:, unread:] = rng.dirichlet(np.full(len(tokens) - unread, 0.3), len(weights))
    template = [place < unread or place == len(tokens) - 1 for place in range(len(tokens))]
    return Reading(
        head="mood",
        config=config,
        text="".join(token for token, is_template in zip(tokens, template, strict=True) if not is_template),
        tokens=tokens,
        template=template,
        counted=[place >= unread for place in range(len(tokens))],
        weights=weights,
        layer_weights=rng.dirichlet(np.ones(len(weights))),
        prediction={"label": label, "score": 0.5, "scores": {"no": 0.5, label: 0.5}},
    )


def names(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_what_it_shows(recwarn):
    """A text and a name are never a formula, and move nothing."""
    reading = make_reading(TOKENS, 3, "$^{$", layers=[0, 2, 4])
    figure = heat_map(reading)
    above, _, center, side, _ = figure.axes
    assert center.images[0].get_array().tolist() == reading.weights[:, 3:].tolist()
    assert "first 3 tokens" in figure.get_supxlabel()
    assert [bar.get_height() for bar in above.patches] == reading.token_weights[3:].tolist()
    assert [bar.get_width() for bar in side.patches] == reading.layer_weights.tolist()
    assert names(center) == ["$\\frac{$", "\\u202eabc", "⏎", "👩\u200d👧語", "◦", "⇥", "<eos>"]
    assert [label.get_color() for label in center.get_xticklabels()] == ["black"] * 6 + ["0.55"]
    assert [label.get_text() for label in center.get_yticklabels()] == ["0", "2", "4"]
    assert figure.get_suptitle() == "mood: $^{$ (50%)\n$\\frac{$ \\u202eabc⏎👩\u200d👧語⇥"
    png(figure)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_head_without_learned_weights_says_so():
    reading = make_reading(TOKENS)
    pooling = make_probe(probe_type="pooling", id2label={0: "no", 1: "yes"}).config
    explanation = heat_map(dataclasses.replace(reading, config=pooling)).get_supxlabel().replace("\n", " ")
    assert "mean over all" in explanation and "mean over all" not in heat_map(reading).get_supxlabel()


def test_a_color_means_more_than_an_even_share():
    reading = make_reading(["a", "b", "c", "d"])
    weights = np.tile([0.1, 0.25, 0.05, 0.6], (5, 1))
    image = heat_map(dataclasses.replace(reading, weights=weights)).axes[2].images[0]
    white, *_, darkest = image.cmap(image.norm(weights[0]))
    assert image.norm(weights[0]).tolist() == [0, 0, 0, 1] and white.tolist() == [1, 1, 1, 1]
    assert darkest[:3].sum() < 1
    image = heat_map(dataclasses.replace(reading, weights=np.full((5, 4), 0.25))).axes[2].images[0]
    assert not image.norm(np.full(4, 0.25)).any(), "as of a head that takes the mean"


def test_a_long_text_keeps_to_a_width_and_names_the_heaviest():
    reading = make_reading([f" w{i}" for i in range(400)], unread=24)
    figure = heat_map(reading)
    center = figure.axes[2]
    assert heat_map(make_reading(["a", "b"])).get_figwidth() < 8 < figure.get_figwidth() <= 22
    assert f"w{int(reading.token_weights.argmax())}" in names(center)
    figure.draw_without_rendering()
    edges = [(box.x0, box.x1) for box in (label.get_window_extent() for label in center.get_xticklabels())]
    assert all(right <= left for (_, right), (left, _) in itertools.pairwise(edges)), "names do not overlap"
    assert 50 < len(edges) < 350
    title = figure.get_suptitle().splitlines()[1]
    assert title.endswith("…") and len(title) <= 22 * 12
