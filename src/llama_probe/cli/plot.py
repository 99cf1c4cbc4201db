"""`llama-probe plot`."""

from __future__ import annotations

import re
import unicodedata
from functools import partial
from pathlib import Path
from typing import Annotated

from ..errors import ProbeError
from ..evaluation import plots
from ..evaluation.heatmap import heat_map
from ..evaluation.plots import new_figure, png
from ..evaluation.reading import Reading, read_weights
from ..files import JSON, Content, check_writable, make_folder, write_atomically
from ..heads.configuration import ProbeConfig
from .console import print_table
from .inputs import HeadOptions, LabelledRows, ScoredHead
from .options import ROWS, Result


# By the name of a file: its content, and facts for `--json`, such as what the file `shows`.
_Drawings = dict[str, tuple[Content, JSON]]


def plot(
    probe: Annotated[str, {"metavar": "HEAD"}] = "safety",
    /,
    *,
    rows: LabelledRows,
    options: HeadOptions,
    output: Path,
    text: list[str] | None = None,
    data: Annotated[str | None, ROWS] = None,
) -> Result:
    """Draw what a head looked at in texts, and how well it does.

    For each text: a heat map of its tokens and the layers. For the head: layer weights, confusion and reliability, measured
    on --data or else when the head was trained.

    Args:
        probe: head: a folder, a Hub id or an alias.
        output: folder for the files. Files of the same names are replaced.
        text: a text for the head to read.
    """
    texts = text or []
    check_writable(output, "the plots")
    scored = ScoredHead(probe, options)
    head = scored.head
    if texts and head.config.token_scope == "response":
        raise ProbeError(f"--text is a prompt, and {probe} reads replies alone: give rows with replies (--data)")
    new_figure()  # raises if matplotlib is missing
    inspection = (head.results or {}).get("inspection")
    labelled = None if data is None else rows.labelled(data, head.config)
    if labelled is None and not texts and not inspection:
        raise ProbeError(f"{probe} has no measurements to draw: give texts (--text) or labelled rows (--data)")
    if texts or labelled is not None:
        scored.attach()
    if labelled is not None:
        from ..evaluation.report import inspect_head  # needs packages that drawing does not need

        measured = inspect_head(head, scored.dataset(labelled.texts), labelled.labels)
        inspection = {"split": Path(data).name, **measured}
    readings = read_weights(scored.model, scored.prompts.tokenizer, texts) if texts else []
    drawings: _Drawings = {}
    for number, reading in enumerate(readings, 1):
        drawings |= _draw_text(reading, number)
    drawings |= _draw_head(inspection or {}, head.config)
    make_folder(output)
    for file, (content, _) in drawings.items():
        write_atomically(output / file, content)
    files = [{"file": str(output / file), **facts} for file, (_, facts) in drawings.items()]
    shown = [(item["file"], item["shows"]) for item in files]
    return {"files": files}, partial(print_table, None, ("file", "shows"), shown, left=2)


def _draw_text(reading: Reading, number: int) -> _Drawings:
    plain = unicodedata.normalize("NFKD", reading.text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40]
    stem = f"{number:02}-{words}".strip("-")
    facts = {"text": reading.text, **reading.prediction}
    return {f"{stem}.png": (png(heat_map(reading)), {"shows": f"tokens and layers: {reading.in_words}", **facts})}


def _draw_head(inspection: JSON, config: ProbeConfig) -> _Drawings:
    names = list(config.id2label.values())
    parts = {
        "layer_weights": (plots.layer_weights_plot, "how much each layer counts"),
        "calibration": (plots.calibration_plot, "reliability: how often the head is right against how sure it is"),
        "confusion": (partial(plots.confusion_plot, names=names), "confusion: true labels against given ones"),
        "outcomes": (plots.outcomes_plot, "each label: rows where it is found, missed, or wrongly given"),
    }
    if len(names) > plots.MAX_CONFUSION:
        del parts["confusion"]
    drawings: _Drawings = {}
    for part, (draw, shows) in parts.items():
        if part in inspection:
            drawings[f"{part}.png"] = png(draw(inspection)), {"shows": shows}
    return drawings
