"""`llama-probe plot`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..backbone.loading import load_backbone
from ..data.prompts import PromptFormat
from ..data.states import PromptDataset
from ..errors import ProbeError
from ..evaluation import plots
from ..evaluation.heatmap import heat_map
from ..evaluation.page import reading_page
from ..evaluation.plots import new_figure, png_writer
from ..evaluation.reading import Reading, read_texts
from ..files import check_writable, make_folder, write_atomically
from ..heads.configuration import ProbeConfig
from ..hub.resolve import check_name, default_name
from .console import print_table
from .head import HeadOptions
from .options import Dtype, Fields, HeadsBackbone, Result, TrustRemoteCode
from .rows import LabelledRows


class _Drawing(NamedTuple):
    """A file to write, its content in words, and the facts of the text that it is about."""

    name: str
    shows: str
    write: Callable[[Path], object]
    facts: dict[str, Any]


def plot(
    output: Annotated[Path, typer.Option(help="Folder for the files. Files of the same names are replaced.")],
    rows: Annotated[LabelledRows, Fields("Data")],
    probe: Annotated[str, typer.Argument(help="Head: a folder, a Hub id or an alias.", metavar="HEAD")] = "safety",
    text: Annotated[list[str] | None, typer.Option(help="A text for the head to read. Repeatable.")] = None,
    backbone: HeadsBackbone = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Draw what a head looked at in texts, and how well it does.

    For each text: a heat map of its tokens and the layers (PNG), and a page with the coloured text (HTML). For the head:
    layer weights, confusion and reliability, measured on --data or else when the head was trained.
    """
    texts = text or []
    if not all(item.strip() for item in texts):
        raise ProbeError("--text must hold words; one is empty")
    check_writable(output, "the plots")
    readings, labelled, scored = [], None, HeadOptions(probe, backbone, dtype, trust_remote_code)
    name = check_name(default_name(probe))
    head = scored.load()
    new_figure()  # raises if matplotlib is missing
    inspection = (head.results or {}).get("inspection")
    if rows.data is not None:
        labelled = rows.read(head.config)
    elif not texts and not inspection:
        raise ProbeError(f"{probe} has no measurements to draw: give texts (--text) or labelled rows (--data)")
    if texts or labelled is not None:
        from ..serving.auto import AutoModelForProbedGeneration  # takes seconds to import

        lm, tokenizer = load_backbone(scored.backbone, dtype)
        model = AutoModelForProbedGeneration.from_causal_lm(lm, {name: head})
        readings = read_texts(model, tokenizer, texts) if texts else []
        if labelled is not None:
            from ..evaluation.report import inspect_head  # needs packages that drawing does not need

            head.set_backbone(model)
            prompts, masks, _ = PromptFormat.from_config(head.config, tokenizer).encode_for(
                head.config, labelled.texts
            )
            dataset = PromptDataset(prompts, labelled.labels, masks)
            inspection = {
                "split": Path(rows.data).name,
                **inspect_head(head, dataset, labelled.labels, progress=True),
            }
    drawings = [drawing for number, reading in enumerate(readings, 1) for drawing in _draw_text(reading, number)]
    try:
        drawings += _draw_head(inspection or {}, head.config)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ProbeError(f"the measurements of {probe} cannot be drawn: {error}; --data measures anew") from error
    make_folder(output)
    write_atomically({output / item.name: item.write for item in drawings})
    files = [{"file": str(output / item.name), "shows": item.shows, **item.facts} for item in drawings]
    shown = [(item["file"], item["shows"]) for item in files]
    return {"files": files}, partial(print_table, None, ("file", "shows"), shown, left=2)


def _draw_text(reading: Reading, number: int) -> list[_Drawing]:
    plain = unicodedata.normalize("NFKD", reading.text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40]
    stem = f"{number:02}-{words}".strip("-")
    facts = {"text": reading.text, "label": reading.label, "probabilities": reading.probabilities}
    page = reading_page(reading)
    return [
        _Drawing(
            f"{stem}.png", f"tokens and layers: {reading.verdict}", png_writer(partial(heat_map, reading)), facts
        ),
        _Drawing(f"{stem}.html", "the coloured text", lambda path: path.write_text(page, encoding="utf-8"), facts),
    ]


def _draw_head(inspection: dict[str, Any], config: ProbeConfig) -> list[_Drawing]:
    """Draw the parts of an `inspection`. The figures are made here, so that damaged numbers raise before a file is written."""
    if not isinstance(inspection, dict):
        raise TypeError("they are not a JSON object")
    names = list(config.id2label.values())
    parts = {
        "layer_weights": (plots.layer_weights_plot, "how much each layer counts"),
        "calibration": (plots.calibration_plot, "reliability: how often the head is right against how sure it is"),
        "confusion": (partial(plots.confusion_plot, names=names), "confusion: true labels against given ones"),
        "outcomes": (plots.outcomes_plot, "each label: rows where it is found, missed, or wrongly given"),
    }
    if len(names) > plots.MAX_CONFUSION:
        del parts["confusion"]
    figures = {part: draw(inspection) for part, (draw, _) in parts.items() if part in inspection}
    return [
        _Drawing(f"{part}.png", parts[part][1], png_writer(lambda figure=figure: figure), {})
        for part, figure in figures.items()
    ]
