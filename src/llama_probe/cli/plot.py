"""`llama-probe plot`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import create_console, escape, print_table
from .options import DATA, Backbone, DataDir, Dtype, Json, PromptColumn, Split, split_of


if TYPE_CHECKING:
    from ..evaluation.reading import Reading
    from ..heads.configuration import ProbeConfig


@dataclass(frozen=True)
class _Drawing:
    """A file to be written: its name, what it shows in words, and for a text what the head said."""

    name: str
    shows: str
    write: Callable[[Path], object]
    facts: dict[str, Any] = field(default_factory=dict)


def plot(
    probe: Annotated[str, typer.Argument(help="Head: a folder, a Hub id or an alias.", metavar="HEAD")],
    output: Annotated[Path, typer.Option(help="Folder for the files; those of the same names are replaced.")],
    text: Annotated[list[str] | None, typer.Option(help="A text for the head to read; may be given again.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Labelled rows to measure the head on: {DATA}.")] = None,
    backbone: Backbone = "demo",
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    prompt_column: PromptColumn = None,
    split: Split = None,
    data_dir: DataDir = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Draw what a head looked at in texts, and how well it does.

    For each text a heat map of its tokens and the layers (PNG), and a page with the text coloured (HTML). Of the head its
    layer weights, confusion and reliability: measured on --data, else as they were kept when it was trained.
    """
    from ..backbone.loading import backbone_target, load_backbone
    from ..errors import ProbeError
    from ..evaluation.plots import new_figure
    from ..evaluation.reading import read_texts
    from ..files import check_writable, make_folder, write_atomically
    from ..heads.probe import ProbeModel
    from ..hub.resolve import check_name, default_name, resolve_head
    from ..serving.auto import AutoModelForProbedGeneration

    texts = text or []
    if not all(item.strip() for item in texts):
        raise ProbeError("a text is empty; give one with words in it")
    of_data = {
        "--text-column": text_column != "text",
        "--label-column": label_column != "label",
        "--prompt-column": prompt_column is not None,
        "--split": split is not None,
        "--data-dir": data_dir is not None,
    }
    if data is None and (given := [name for name, is_given in of_data.items() if is_given]):
        raise ProbeError(
            f"there are no rows that {', '.join(given)} could be for: name them with --data, or leave it out"
        )
    part = None if data is None else split_of(data, split)
    check_writable(output, "the plots")
    new_figure()  # says what to install
    readings, rows = [], None
    with contextlib.redirect_stdout(sys.stderr):
        name = check_name(default_name(probe))
        head = ProbeModel.from_pretrained(resolve_head(probe, backbone_target(backbone)))
        inspection = (head.results or {}).get("inspection")
        if data is not None:
            from ..data.texts import read_labelled

            names = list(head.config.id2label.values())
            kind = head.config.problem_type
            rows = read_labelled(data, text_column, label_column, names, kind, part, data_dir, prompt_column)
        elif not texts and not inspection:
            raise ProbeError(
                f"{probe} keeps no measurements to draw; give texts to read, or labelled rows with --data"
            )
        if texts or rows is not None:
            lm, tokenizer = load_backbone(backbone, dtype)
            model = AutoModelForProbedGeneration.from_causal_lm(lm, {name: head})
            if rows is not None:
                inspection = {"split": _data_name(data, part), **_measure(model, tokenizer, name, rows)}
            readings = read_texts(model, tokenizer, texts) if texts else []
    drawings, notes = _of_head(probe, head.config, inspection, kept=data is None)
    drawings = [*(item for i, reading in enumerate(readings) for item in _of_text(reading, i + 1)), *drawings]
    make_folder(output)
    write_atomically({output / item.name: item.write for item in drawings})
    files = [{"file": str(output / item.name), "shows": item.shows, **item.facts} for item in drawings]
    if as_json:
        print(json.dumps({"files": files, "notes": notes}))
        return
    table = Table("file", "shows")
    for item in files:
        table.add_row(escape(item["file"]), escape(item["shows"]))
    console = create_console()
    print_table(table)
    for note in notes:
        console.print(escape(note), highlight=False)


def _data_name(data: str, split: str) -> str:
    from ..data.known import find_benchmark
    from ..data.tables import TablePlace

    if Path(data).exists():
        return Path(data).name
    if find_benchmark(data) is not None:
        return data if ":" in data else f"{data}:{split}"
    return data if TablePlace.parse(data).split else f"{data} ({split})"


def _measure(model, tokenizer, name: str, rows) -> dict[str, Any]:
    from ..data.prompts import PromptFormat
    from ..data.states import PromptDataset
    from ..evaluation.report import inspect_head

    head = model.probes[name]
    head.set_backbone(model)
    prompts, masks, _ = PromptFormat.from_config(head.config, tokenizer).encode_for(head.config, rows.texts)
    found = inspect_head(head, PromptDataset(prompts, rows.labels, masks), rows.labels, progress=True)
    head.set_backbone(None)
    return found


def _of_text(reading: Reading, number: int) -> Iterator[_Drawing]:
    from ..evaluation.heatmap import heat_map
    from ..evaluation.page import reading_page
    from ..evaluation.plots import png_writer

    stem = _file_stem(number, reading.text)
    facts = {"text": reading.text, "label": reading.label, "probabilities": reading.probabilities}
    yield _Drawing(
        f"{stem}.png", f"tokens and layers: {reading.verdict}", png_writer(partial(heat_map, reading)), facts
    )
    page = reading_page(reading)
    yield _Drawing(f"{stem}.html", "the text coloured", lambda path: path.write_text(page, encoding="utf-8"), facts)


def _file_stem(number: int, text: str) -> str:
    """A name that is safe anywhere: a number, and the text's first words."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-")
    return f"{number:02}-{slug}".strip("-")


def _of_head(
    probe: str, config: ProbeConfig, inspection: dict[str, Any] | None, kept: bool
) -> tuple[list[_Drawing], list[str]]:
    """The pictures of what was measured, and what there is to say of those that are missing."""
    from ..errors import ProbeError
    from ..evaluation import plots
    from ..evaluation.plots import png_writer

    if not inspection:
        return [], [f"{probe} keeps no measurements (layer weights, confusion, reliability); --data measures them."]
    if not isinstance(inspection, dict):
        raise ProbeError(f"the measurements that {probe} keeps cannot be drawn: they are no JSON object")
    names = list(config.id2label.values())
    parts = {
        "layer_weights": (plots.layer_weights_plot, "how much each layer counts"),
        "calibration": (plots.calibration_plot, "reliability: how often the head is right against how sure it is"),
        "confusion": (partial(plots.confusion_plot, names=names), "confusion: true labels against given ones"),
        "outcomes": (plots.outcomes_plot, "each label: rows where it is found, missed, or given wrongly"),
    }
    notes = []
    if config.problem_type == "regression":
        notes.append("A regression head has no labels, so there is neither confusion nor reliability.")
    elif config.problem_type == "multi_label_classification":
        where = "outcomes.png" if "outcomes" in inspection else "--data"
        notes.append(f"A row may have several labels, so there is no confusion; {where} shows each label by itself.")
    elif "confusion" not in inspection:
        notes.append(f"{probe} keeps no confusion; --data measures it.")
    elif len(names) > plots.MAX_CONFUSION:
        del parts["confusion"]
        notes.append(f"The confusion of {len(names)} labels is too large to draw; evaluate --json prints it.")
    try:
        figures = {part: draw(inspection) for part, (draw, _) in parts.items() if part in inspection}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if not kept:
            raise
        raise ProbeError(
            f"the measurements that {probe} keeps cannot be drawn ({type(error).__name__}: {error}); --data measures anew"
        ) from error
    return [
        _Drawing(f"{part}.png", parts[part][1], png_writer(lambda figure=figure: figure))
        for part, figure in figures.items()
    ], notes
