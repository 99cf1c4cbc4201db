"""Methods without a head: TF-IDF and prototypes compute what they say."""

import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm, make_probe, make_prompts

from llama_probe import ProbeConfig
from llama_probe.data.states import PromptDataset, StateCache
from llama_probe.data.texts import LabelledTexts
from llama_probe.evaluation.prediction import predict_logits, predict_together
from llama_probe.experiments.reproduction.baselines import class_logits, fit_prototypes, fit_tfidf, mean_states


def labelled(texts, labels, names=("a", "b")):
    return LabelledTexts(texts, np.asarray(labels), list(names), "single_label_classification", {})


def test_tfidf_reads_words_and_parts_of_words():
    texts = [f"{'good' if i % 2 else 'awful'} day {i}" for i in range(40)]
    model = fit_tfidf(labelled(texts, [i % 2 for i in range(40)]))
    logits = class_logits(model, ["a good thing", "awfully bad", "goodness"], 2)
    assert logits.argmax(dim=1).tolist() == [1, 0, 1], "'goodness' and 'awfully' share characters, no words"
    assert logits.exp().sum(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_a_label_without_training_rows():
    model = fit_tfidf(labelled(["x one", "y two"] * 3, [0, 2] * 3, "abc"))
    logits = class_logits(model, ["x one"], 3)
    assert logits.shape == (1, 3) and logits.argmax() == 0 and logits[0, 1] < logits[0, 2]


def test_prototypes_are_distances_to_class_means():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 50 + [1] * 8 + [2] * 20)
    states = rng.normal(size=(78, 6)) @ rng.normal(size=(6, 6)) + labels[:, None]
    model = fit_prototypes(states, labels)
    inverse = np.linalg.inv(model.covariance_)
    gaps = states[:, None] - np.stack([states[labels == c].mean(axis=0) for c in range(3)])  # [rows, classes, D]
    distances = np.einsum("rcd,de,rce->rc", gaps, inverse, gaps)
    expected = torch.from_numpy(-distances / 2).log_softmax(dim=1).float()
    torch.testing.assert_close(class_logits(model, states, 3), expected, atol=1e-3, rtol=1e-3)


def test_sure_rows_have_different_scores():
    """Log odds exceed the range of a float32 probability, about 88 below and 17 above."""
    rng = np.random.default_rng(2)
    labels = np.arange(60) % 2
    states = (rng.normal(size=(60, 4)) + 9 * labels[:, None]).astype(np.float32)
    model = fit_prototypes(states, labels)
    logits = class_logits(model, states, 2)
    odds = (logits[:, 1] - logits[:, 0]).numpy()
    np.testing.assert_allclose(odds, model.decision_function(states), rtol=1e-3)
    assert np.abs(odds).min() > 20 and len(np.unique(odds)) == 60


def test_mean_states_are_of_the_tokens_that_count(tmp_path):
    lm, rows = make_lm(), [[7, 8, *make_prompts(1, n, n)[0].tolist()] for n in (4, 9, 6)]
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    config = ProbeConfig(probe_type="gate", token_scope="content", prefix_ids=[7, 8], **sizes)
    found = mean_states(StateCache(tmp_path, torch.float32).dataset(lm, config, rows, np.zeros(3)), config)
    for row, ids in enumerate(rows):
        with torch.no_grad():
            states = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            expected = torch.nn.functional.layer_norm(state[0, 2:], (HIDDEN,)).mean(dim=0)
            np.testing.assert_allclose(found[row, layer], expected, atol=1e-5)


def test_many_heads_in_one_pass(tmp_path, monkeypatch):
    """As each by itself, from cached states and with the backbone in the loop."""
    lm, prompts = make_lm(), [make_prompts(1, n, n)[0].tolist() for n in (3, 8, 5, 9, 4)]
    probes = [make_probe(0, probe_type="gate"), make_probe(1, probe_type="mha", layers=[1, 3])]
    dataset = PromptDataset(prompts, np.zeros(5))
    cached = StateCache(tmp_path, torch.float32).dataset(lm, probes[0].config, prompts, np.zeros(5))
    passes = []
    lm.model.register_forward_hook(lambda module, args, output: passes.append(1))
    for probe in probes:
        probe.set_backbone(lm)
    together = predict_together(probes, dataset)
    assert len(passes) == 1
    for probe, logits, from_disk in zip(probes, together, predict_together(probes, cached), strict=True):
        expected = predict_logits(probe, cached)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(from_disk, expected, atol=1e-5, rtol=1e-5)
