"""`llama-probe plot`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..backbone.loading import backbone_target, load_backbone
from ..data.prompts import PromptFormat
from ..errors import ProbeError
from ..evaluation import plots
from ..evaluation.heatmap import heat_map
from ..evaluation.page import reading_page
from ..evaluation.plots import new_figure, png_writer
from ..evaluation.reading import Reading, read_texts
from ..files import check_writable, make_folder, write_atomically
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..hub.resolve import check_name, default_name, resolve_head
from ..serving.auto import AutoModelForProbedGeneration
from .console import create_console, escape, print_table
from .options import Dtype, Fields, HeadsBackbone, Json, TrustRemoteCode, backbone_of
from .rows import ROWS_HELP, LabelledRows


@dataclass(frozen=True)
class _Drawing:
    """A file to write.

    Attributes:
        name: of the file.
        shows: its content in words.
        facts: text, label and probabilities, if it is about a text.
    """

    name: str
    shows: str
    write: Callable[[Path], object]
    facts: dict[str, Any] = field(default_factory=dict)


def plot(
    output: Annotated[Path, typer.Option(help="Folder for the files. Files of the same names are replaced.")],
    rows: Annotated[LabelledRows, Fields("Data", help=ROWS_HELP)],
    probe: Annotated[str, typer.Argument(help="Head: a folder, a Hub id or an alias.", metavar="HEAD")] = "safety",
    text: Annotated[list[str] | None, typer.Option(help="A text for the head to read. Repeatable.")] = None,
    backbone: HeadsBackbone = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Draw what a head looked at in texts, and how well it does.

    For each text: a heat map of its tokens and the layers (PNG), and a page with the coloured text (HTML). For the head:
    layer weights, confusion and reliability, measured on --data or else when the head was trained.
    """
    texts = text or []
    if not all(item.strip() for item in texts):
        raise ProbeError("--text must hold words; one is empty")
    check_writable(output, "the plots")
    new_figure()  # raises if matplotlib is missing
    readings, labelled, backbone = [], None, backbone_of(probe, backbone)
    with contextlib.redirect_stdout(sys.stderr):
        name = check_name(default_name(probe))
        head = ProbeModel.from_pretrained(
            resolve_head(probe, backbone_target(backbone)), trust_remote_code=trust_remote_code
        )
        inspection = (head.results or {}).get("inspection")
        if rows.data is not None:
            labelled = rows.read(head.config)
        elif not texts and not inspection:
            raise ProbeError(f"{probe} has no measurements to draw: give texts (--text) or labelled rows (--data)")
        if texts or labelled is not None:
            lm, tokenizer = load_backbone(backbone, dtype)
            model = AutoModelForProbedGeneration.from_causal_lm(lm, {name: head})
            if labelled is not None:
                inspection = {"split": rows.name, **_measure(model, tokenizer, name, labelled)}
            readings = read_texts(model, tokenizer, texts) if texts else []
    drawings = [drawing for number, reading in enumerate(readings, 1) for drawing in _draw_text(reading, number)]
    if not inspection:
        notes = [f"{probe} has no measurements (layer weights, confusion, reliability); --data measures them."]
    else:
        try:
            drawings += _draw_head(inspection, head.config)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if labelled is not None:
                raise
            raise ProbeError(
                f"the measurements of {probe} cannot be drawn ({type(error).__name__}: {error}); --data measures anew"
            ) from error
        notes = _notes(probe, inspection, head.config)
    make_folder(output)
    write_atomically({output / item.name: item.write for item in drawings})
    files = [{"file": str(output / item.name), "shows": item.shows, **item.facts} for item in drawings]
    if as_json:
        print(json.dumps({"files": files, "notes": notes}))
        return
    print_table(None, ("file", "shows"), [(item["file"], item["shows"]) for item in files], left=2)
    for note in notes:
        create_console().print(escape(note), highlight=False)


def _measure(model: Any, tokenizer: Any, name: str, rows: Any) -> dict[str, Any]:
    # Both need packages that drawing does not need.
    from ..data.states import PromptDataset
    from ..evaluation.report import inspect_head

    head = model.probes[name]
    head.set_backbone(model)
    prompts, masks, _ = PromptFormat.from_config(head.config, tokenizer).encode_for(head.config, rows.texts)
    found = inspect_head(head, PromptDataset(prompts, rows.labels, masks), rows.labels, progress=True)
    head.set_backbone(None)
    return found


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
        _Drawing(f"{part}.png", parts[part][1], png_writer(lambda figure=figure: figure))
        for part, figure in figures.items()
    ]


def _notes(probe: str, inspection: dict[str, Any], config: ProbeConfig) -> list[str]:
    if config.problem_type == "regression":
        return ["A regression head has no labels, so there is neither confusion nor reliability."]
    if config.problem_type == "multi_label_classification":
        where = "outcomes.png" if "outcomes" in inspection else "--data"
        return [f"A row may have several labels, so there is no confusion; {where} shows each label by itself."]
    if "confusion" not in inspection:
        return [f"{probe} has no confusion; --data measures it."]
    if config.num_labels > plots.MAX_CONFUSION:
        return [f"The confusion of {config.num_labels} labels is too large to draw; evaluate --json prints it."]
    return []
