"""An HTML page with the tokens that a head looked at. It needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from ..heads.configuration import ProbeConfig
from ..heads.decision import threshold_of
from .reading import CONTINUATION, Reading, printable


_TEMPLATE = Path(__file__).with_name("page.html")
_TOP = 5  # tokens named beside a layer
_SCORES = 8  # labels shown at once


def reading_page(reading: Reading) -> str:
    """Return an HTML page: the label, the probabilities, the text colored by token weight, and the layers.

    All that comes from the text, the head or the tokenizer is escaped. The content security policy of the page allows
    its own script alone.
    """
    page = _TEMPLATE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    combined = reading.token_weights
    regression = reading.config.problem_type == "regression"
    return Template(page).substitute(
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=_html(f"{reading.head}: {reading.verdict}"),
        verdict=_html(reading.verdict),
        head=_html(reading.head),
        kind=_html(reading.config.probe_type),
        note=f'<p class="note">{_html(reading.note)}</p>' if reading.note else "",
        gives="a number" if regression else "a label",
        scores_title="The value" if regression else "How sure the head is",
        decision=_html(_decision(reading.config)),
        scores=_scores(reading),
        even=_share(reading.even_share),
        end=_share(reading.scale_end(combined)),
        text="".join(_token(reading, position, level) for position, level in enumerate(_levels(reading, combined))),
        legend=_html(_legend(reading)),
        all_layers=_button(reading, "all layers", "all layers, each by its weight", combined, pressed=True),
        layers="\n".join(_layer(reading, slot) for slot in range(len(reading.layers))),
    )


def _html(text: str) -> str:
    return escape(printable(text))


def _share(value: float) -> str:
    return f"{float(value):.1%}"


def _decision(config: ProbeConfig) -> str:
    if config.problem_type == "regression":
        return "The head gives a number; it has no labels."
    if config.problem_type == "multi_label_classification":
        return "Each label is judged by itself, and given if its probability reaches the line."
    if config.threshold is None:
        return "The label with the largest probability is given."
    first, second = config.id2label.values()
    return f"“{second}” is given from a probability of {_share(config.threshold)} on (the line), else “{first}”."


def _scores(reading: Reading) -> str:
    """Return a table with a row a label, the largest probability first. Labels after the first eight are folded."""
    regression = reading.config.problem_type == "regression"
    scores = list(enumerate(reading.probabilities.items()))
    if not regression:
        scores.sort(key=lambda item: -item[1][1])
    rows = []
    for index, (name, value) in scores:
        number = f"{value:.4g}" if regression else _share(value)
        bar = "" if regression else _bar(value, threshold_of(reading.config, index))
        rows.append(f'<tr><th scope="row">{_html(name)}</th><td class="number">{number}</td>{bar}</tr>')
    tables = [
        '<table class="scores"><tbody>\n{}\n</tbody></table>'.format("\n".join(part))
        for part in (rows[:_SCORES], rows[_SCORES:])
        if part
    ]
    folded = (
        f"<details><summary>{len(rows) - _SCORES} more labels</summary>{table}</details>" for table in tables[1:]
    )
    return "\n".join([tables[0], *folded])


def _bar(share: float, mark: float | None = None) -> str:
    line = "" if mark is None else f'<i style="left: {100 * mark:.1f}%"></i>'
    return f'<td class="bar"><div class="track"><div style="width: {100 * share:.1f}%"></div>{line}</div></td>'


def _levels(reading: Reading, weights: np.ndarray) -> list[int]:
    """Return the color of each token, 0 to 100: the root of what exceeds an even share, as in the heat map."""
    above = np.clip(weights - reading.even_share, 0, None)
    return np.rint(100 * np.sqrt(above / (reading.scale_end(weights) - reading.even_share))).astype(int).tolist()


def _token(reading: Reading, position: int, level: int) -> str:
    # A line break is both shown and made.
    shown = "⏎<br>".join(_html(part) for part in reading.tokens[position].split("\n")) or CONTINUATION
    if not reading.counted[position]:
        return f'<span class="unread" title="token {position}: not read by the head">{shown}</span>'
    weight = reading.token_weights[position]
    times = weight / reading.even_share
    title = f"token {position}: {_share(weight)} over all layers, {times:.1f} times an even share"
    classes = ' class="template"' if reading.template[position] else ""
    return f'<span data-read{classes} style="--w: {level}" title="{title}">{shown}</span>'


def _legend(reading: Reading) -> str:
    limit = reading.config.max_length
    parts = {
        "Grey background: the beginning that is the same for every text; the head does not read it.": (
            not all(reading.counted)
        ),
        "Grey letters: tokens that the chat template puts around the text.": any(reading.template),
        f"{CONTINUATION} continues the character before it.": "" in reading.tokens,
        f"What goes beyond {limit} tokens is cut off.": len(reading.tokens) == limit,
        "A large weight tells where the head looked, not for which label it spoke; in later layers a token also stands for "
        "what came before it. Rest the pointer on a token for its weight.": True,
    }
    return " ".join(part for part, applies in parts.items() if applies)


def _button(reading: Reading, text: str, name: str, weights: np.ndarray, pressed: bool = False) -> str:
    levels = [str(n) for n, read in zip(_levels(reading, weights), reading.counted, strict=True) if read]
    return (
        f'<button type="button" data-name="{name}" data-end="{_share(reading.scale_end(weights))}" '
        f'data-weights="{" ".join(levels)}" aria-pressed="{str(pressed).lower()}">{text}</button>'
    )


def _layer(reading: Reading, slot: int) -> str:
    layer, weight = reading.layers[slot], float(reading.layer_weights[slot])
    widest = float(reading.layer_weights.max())
    top = " ".join(
        f'<code title="token {position}: {_share(share)} of this layer">{_html(reading.shown(position, 24))}</code>'
        for position, share in reading.top_tokens(_TOP, slot)
    )
    button = _button(reading, str(layer), f"layer {layer}", reading.weights[slot])
    bar = _bar(weight / widest, 1 / len(reading.layers) / widest)
    return f'<tr><th scope="row">{button}</th><td class="number">{_share(weight)}</td>{bar}<td>{top}</td></tr>'
