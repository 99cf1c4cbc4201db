"""What a head looked at in a text, as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from string import Template

import numpy as np

from ..heads.configuration import ProbeConfig
from ..heads.decision import threshold_of
from .reading import CONTINUATION, Reading, visible


_TOP = 5  # tokens named in a layer's row
_SCORES = 8  # labels that are shown at once

_STYLE = """
:root { color-scheme: light; --token: 234 88 12; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1917; background: #fff; max-width: 84rem; margin: 1.5rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { margin: .3rem 0; max-width: 60rem; } .note { background: #fef3c7; padding: .4rem .7rem; border-radius: .3rem; }
.fine { color: #57534e; font-size: .85rem; }
.columns { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 2.5rem; }
@media (min-width: 64rem) { .columns { grid-template-columns: minmax(0, 1.2fr) minmax(0, 1fr); }
  .stays { position: sticky; top: 0; max-height: 100vh; overflow: auto; } }
#text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; border: 1px solid #d6d3d1; padding: .6rem .8rem;
  border-radius: .3rem; unicode-bidi: plaintext; text-align: start; }
#text span { --w: 0; padding: .12em 0; border-radius: .15em;
  background: rgb(var(--token) / calc(var(--w) * .0085)); }
#text .template { color: #78716c; } #text .unread { color: #a8a29e; background: #f5f5f4; }
.scale { display: inline-block; width: 6rem; height: .8em; border: 1px solid #d6d3d1; vertical-align: middle;
  background: linear-gradient(to right, rgb(var(--token) / 0), rgb(var(--token) / .85)); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; font-weight: 600; } td, th { padding: .1rem .6rem .1rem 0; vertical-align: middle; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { min-width: 5rem; width: 35%; } .track { position: relative; }
.track div { height: .9em; background: #2563eb; border-radius: .15em; min-width: 1px; }
.track i { position: absolute; top: -.3em; bottom: -.3em; border-left: 2px solid #1c1917; }
.scores { max-width: 40rem; table-layout: fixed; } .scores .bar { width: 50%; } summary { cursor: pointer; }
.scores th { overflow-wrap: anywhere; }
code { background: #f5f5f4; border-radius: .2em; padding: 0 .25em; margin-right: .3em; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
button { font: inherit; color: inherit; background: none; border: 1px solid #d6d3d1; border-radius: .25rem;
  padding: 0 .5rem; min-width: 3.2rem; cursor: pointer; }
button[aria-pressed=true] { background: #fed7aa; border-color: #ea580c; }
.script { display: none; }
"""

# Recolours the text by the layer whose button is pressed. Without it the page shows all layers together.
_SCRIPT = """
"use strict";
const tokens = document.querySelectorAll("#text [data-read]");
const buttons = document.querySelectorAll("button[data-weights]");
function show(button) {
  const weights = button.dataset.weights.split(" ");
  tokens.forEach((token, i) => token.style.setProperty("--w", weights[i]));
  document.getElementById("shown").textContent = button.dataset.name;
  document.getElementById("end").textContent = button.dataset.end;
  buttons.forEach(other => other.setAttribute("aria-pressed", other === button));
}
buttons.forEach(button => button.addEventListener("click", () => show(button)));
document.querySelectorAll(".script").forEach(part => part.classList.remove("script"));
"""

# The policy lets nothing but this script run and nothing be fetched, whatever a text holds.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-$digest'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$verdict</h1>
<p>The probe head <b>$head</b> ($kind) does not read a text itself. It reads what a language model makes of each token (a
word or a piece of one) in each of its layers, and gives the text $gives. This page shows what the head looked at.</p>
$note
<h2>$scores_title</h2>
<p class="fine">$decision</p>
$scores
<div class="columns">
<div><div class="stays">
<h2>The text, token by token</h2>
<p>The stronger the colour, the more a token counted in <b id="shown">all layers, each by its weight</b>.<br>
<span class="fine">$even, as if all counted alike <span class="scale"></span> <span id="end">$end</span></span></p>
<div id="text">$text</div>
<p class="fine">$legend</p>
</div></div>
<div>
<h2>The layers</h2>
<p>A bar is how much a layer counted; the line is where it would be if all counted alike. Layer 0 is the model's input,
the last one its output. Beside it are the tokens that counted most in that layer.<span class="script"> Press a layer to
colour the text by it.</span></p>
<p class="script">$all_layers</p>
<table>
<thead><tr><th scope="col">layer</th><th scope="col" colspan="2">weight</th><th scope="col">looked at most</th></tr></thead>
<tbody>
$layers
</tbody></table>
</div>
</div>
<script>$script</script>
</body>
</html>
""")


def reading_page(reading: Reading) -> str:
    """An HTML page: the label, the probabilities, the text coloured by how much each token counted, and the layers.

    Everything that comes from the text, the head or the tokenizer is escaped; the page runs one short script of its own,
    and says so in its content security policy.
    """
    combined = reading.token_weights
    title = f"{reading.head}: {reading.verdict}"
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    regression = reading.config.problem_type == "regression"
    return _PAGE.substitute(
        digest=digest,
        style=_STYLE,
        script=_SCRIPT,
        title=_html(title),
        verdict=_html(reading.verdict),
        head=_html(reading.head),
        kind=_html(f"kind {reading.config.probe_type}"),
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
        layers="\n".join(_layers(reading)),
    )


def _html(text: str) -> str:
    return escape(visible(text))


def _share(value: float) -> str:
    return f"{float(value):.1%}"


def _decision(config: ProbeConfig) -> str:
    if config.problem_type == "regression":
        return "The head gives a number; it has no labels."
    if config.problem_type == "multi_label_classification":
        return "Each label is judged by itself, and given where its probability reaches the line."
    if config.threshold is None:
        return "The label with the largest probability is given."
    first, second = config.id2label.values()
    return f"“{second}” is given from a probability of {_share(config.threshold)} on (the line), else “{first}”."


def _scores(reading: Reading) -> str:
    """A table with a row a label, the largest probability first; of many labels the rest is folded away."""
    rows = []
    regression = reading.config.problem_type == "regression"
    for index, (name, value) in enumerate(reading.probabilities.items()):
        number = f"{value:.4g}" if regression else _share(value)
        bar = "" if regression else _bar(value, threshold_of(reading.config, index))
        rows.append((value, f'<tr><th scope="row">{_html(name)}</th><td class="number">{number}</td>{bar}</tr>'))
    if not regression:
        rows.sort(key=lambda pair: -pair[0])
    tables = [_table(rows[:_SCORES])]
    if len(rows) > _SCORES:
        tables.append(
            f"<details><summary>{len(rows) - _SCORES} more labels</summary>{_table(rows[_SCORES:])}</details>"
        )
    return "\n".join(tables)


def _table(rows: list[tuple[float, str]]) -> str:
    lines = "\n".join(row for _, row in rows)
    return f'<table class="scores"><tbody>\n{lines}\n</tbody></table>'


def _bar(share: float, mark: float | None = None) -> str:
    line = "" if mark is None else f'<i style="left: {100 * mark:.1f}%"></i>'
    return f'<td class="bar"><div class="track"><div style="width: {100 * share:.1f}%"></div>{line}</div></td>'


def _levels(reading: Reading, weights: np.ndarray) -> list[int]:
    """How strongly each token is coloured, 0 to 100: white up to an even share, then as the root, as in the heat map."""
    above = np.clip(weights - reading.even_share, 0, None)
    return np.rint(100 * np.sqrt(above / (reading.scale_end(weights) - reading.even_share))).astype(int).tolist()


def _token(reading: Reading, position: int, level: int) -> str:
    # A line break is shown, and made as well.
    shown = "⏎<br>".join(_html(part) for part in reading.tokens[position].split("\n")) or CONTINUATION
    if not reading.counted[position]:
        return f'<span class="unread" title="token {position}: not read by the head">{shown}</span>'
    weight = reading.token_weights[position]
    title = (
        f"token {position}: {_share(weight)} over all layers, {weight / reading.even_share:.1f} times an even share"
    )
    classes = ' class="template"' if reading.template[position] else ""
    return f'<span data-read{classes} style="--w: {level}" title="{title}">{shown}</span>'


def _legend(reading: Reading) -> str:
    parts = []
    if not all(reading.counted):
        parts.append("Grey background: the beginning that is the same for every text; the head does not read it.")
    if any(reading.template):
        parts.append("Grey letters: tokens that the chat template puts around the text.")
    if "" in reading.tokens:
        parts.append(f"{CONTINUATION} continues the character before it.")
    if len(reading.tokens) == reading.config.max_length:
        parts.append(f"What goes beyond {reading.config.max_length} tokens is cut off.")
    parts.append(
        "A large weight tells where the head looked, not for which label it spoke; in later layers a token also stands for "
        "what came before it. Rest the pointer on a token for its weight."
    )
    return " ".join(parts)


def _button(reading: Reading, text: str, name: str, weights: np.ndarray, pressed: bool = False) -> str:
    levels = [str(n) for n, read in zip(_levels(reading, weights), reading.counted, strict=True) if read]
    return (
        f'<button type="button" data-name="{name}" data-end="{_share(reading.scale_end(weights))}" '
        f'data-weights="{" ".join(levels)}" aria-pressed="{str(pressed).lower()}">{text}</button>'
    )


def _layers(reading: Reading) -> list[str]:
    """A row of the table a layer, the first one first."""
    widest = float(reading.layer_weights.max())
    rows = []
    for slot, layer in enumerate(reading.layers):
        weight = float(reading.layer_weights[slot])
        top = " ".join(
            f'<code title="token {position}: {_share(share)} of this layer">{_html(reading.shown(position, 24))}</code>'
            for position, share in reading.top_tokens(_TOP, slot)
        )
        button = _button(reading, str(layer), f"layer {layer}", reading.weights[slot])
        rows.append(
            f'<tr><th scope="row">{button}</th>'
            f'<td class="number">{_share(weight)}</td>{_bar(weight / widest, 1 / len(reading.layers) / widest)}'
            f"<td>{top}</td></tr>"
        )
    return rows
