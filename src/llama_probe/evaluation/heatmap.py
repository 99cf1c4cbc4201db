"""Token x layer heat map of what a head looked at in a text. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .plots import explain, new_figure, percent
from .reading import Reading, cut, printable


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches.
_MAP_WIDTHS = (5.0, 19.5)
_TOKEN, _LABEL, _LAYER = 0.2, 0.125, 0.13
_BESIDE = 2.5  # layer weights, scale and labels

_COLORS = ("#ffffff", "#fdba74", "#ea580c", "#7c2d12")


def heat_map(reading: Reading) -> Figure:
    """Draw a token x layer heat map, with the weight of each token above the map and of each layer beside the map.

    The map begins with the first token that the head reads, and grows with the number of tokens up to a width. If there is no
    room for the names of all tokens, the heaviest tokens have names.
    """
    layer_count, token_count = reading.weights.shape
    unread = int(np.argmax(reading.counted))  # tokens before the first that is read
    map_width = float(np.clip(_TOKEN * (token_count - unread), *_MAP_WIDTHS))
    inches_a_token = map_width / (token_count - unread)
    width = map_width + _BESIDE
    height = float(np.clip(_LAYER * layer_count, 0.6, 8.0))
    figure = new_figure((width, 3.6 + height))
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm  # after new_figure, which says what to install

    # Ratios in inches keep the bars and the scale as wide as they are for any length of text.
    sizes = {"width_ratios": (map_width, 1.0), "height_ratios": (0.8, height)}
    panels = figure.subplots(2, 2, sharex="col", sharey="row", **sizes)
    (above, corner), (center, side) = panels
    corner.set_axis_off()
    even_share = 1 / sum(reading.counted)
    # Twice the even share at least, so that small differences do not look large.
    darkest = max(float(reading.weights.max()), 2 * even_share)
    image = center.imshow(
        reading.weights[:, unread:],
        cmap=LinearSegmentedColormap.from_list("weights", _COLORS),
        # Most weights are a small part of the largest weight. The root keeps small weights apart.
        norm=PowerNorm(0.5, even_share, darkest, clip=True),
        extent=(unread - 0.5, token_count - 0.5, -0.5, layer_count - 0.5),
        aspect="auto",
        origin="lower",
    )
    above.bar(range(unread, token_count), reading.token_weights[unread:], width=0.9, color=_COLORS[2])
    above.set_ylabel("all layers", fontsize=8)
    side.barh(range(layer_count), reading.layer_weights, height=0.8, color="tab:blue")
    side.axvline(1 / layer_count, color="0.4", linestyle="--", linewidth=1)
    side.set_xlabel("layer weight\n(dashed: all alike)", fontsize=8)
    center.set_ylabel("layer (0: embeddings)", fontsize=8)
    step = -(-layer_count // 45)
    center.set_yticks(range(0, layer_count, step), reading.config.layer_indices[::step])
    named = _named_tokens(reading, unread, inches_a_token)
    center.set_xticks(named, [reading.shown(i, 14) for i in named], rotation=90, parse_math=False)
    for position, tick in zip(named, center.get_xticklabels(), strict=True):
        tick.set_color("0.55" if reading.template[position] else "black")
    above.yaxis.set_major_formatter(percent)
    side.xaxis.set_major_formatter(percent)
    ticks = [even_share + (darkest - even_share) * share**2 for share in (0, 0.25, 0.5, 0.75, 1)]
    style = {"shrink": 0.6, "pad": 0.01, "format": lambda value, _: f"{value:.1%}"}
    scale = figure.colorbar(image, ax=panels, ticks=ticks, **style)
    scale.set_label("weight of a token in its layer", fontsize=8)
    for axes in (above, center, side, scale.ax):
        axes.tick_params(labelsize=7)
    title = (f"{reading.head}: {reading.in_words}", reading.text)
    figure.suptitle("\n".join(cut(printable(line), int(12 * width)) for line in title), fontsize=10, parse_math=False)
    return explain(figure, _explanation(reading, unread, named))


def _explanation(reading: Reading, unread: int, named: list[int]) -> str:
    config = reading.config
    meaning = "A large weight tells where the head looked, not for which label it spoke."
    if config.probe_type == "pooling":
        meaning = f"This head has learned no weights: it takes the {config.pool} over all tokens and layers."
    sentences = {
        "What the head looked at. A column is a token (a word or a piece of one), a row a layer of the language model. "
        "White: the token counted no more than if all counted alike; the darker, the more it counted in that layer.": True,
        f"The first {unread} tokens are the same for every text; the head does not read them.": unread > 0,
        "Grey names: tokens that the chat template puts around the text.": any(reading.template[unread:]),
        "Only the heaviest tokens have room for their names.": len(named) < len(reading.tokens) - unread,
        meaning: True,
    }
    return " ".join(sentence for sentence, applies in sentences.items() if applies)


def _named_tokens(reading: Reading, unread: int, inches_a_token: float) -> list[int]:
    """Return positions of the tokens to name, ascending; heavy tokens are named first."""
    distance = int(np.ceil(_LABEL / inches_a_token))
    free = np.ones(len(reading.tokens), dtype=bool)
    free[:unread] = False
    named: list[int] = []
    for position in np.argsort(-reading.token_weights, kind="stable"):
        if free[position]:
            named.append(int(position))
            free[max(0, position - distance + 1) : position + distance] = False
    return sorted(named)
