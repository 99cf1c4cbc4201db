"""Labelled rows, as `evaluate` and `plot` read them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.files import MAX_TEXT
from ..data.known import find_benchmark
from ..data.sources import ROWS_HELP as DATA
from ..data.sources import DataSources, setting
from ..data.tables import TablePlace
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..hub.folder import check_output, is_head_folder


ROWS_HELP = {item.name: item.metadata.get("help") for item in fields(DataSources)}

TextColumn = Annotated[str, typer.Option(help=ROWS_HELP["text_column"])]
PromptColumn = Annotated[str | None, typer.Option(help=ROWS_HELP["prompt_column"])]


@dataclass
class LabelledRows:
    """Labelled rows to measure a head on, as arguments of `read_labelled`."""

    data: str | None = setting(None, f"Labelled rows to measure the head on: {DATA}.")
    text_column: str = setting("text", ROWS_HELP["text_column"])
    label_column: str = setting("label", ROWS_HELP["label_column"])
    prompt_column: str | None = setting(None, ROWS_HELP["prompt_column"])
    data_dir: Path | None = setting(None, ROWS_HELP["data_dir"])
    max_text: int = setting(MAX_TEXT, ROWS_HELP["max_text"])
    benign: bool = setting(False, "The rows need no label column: all of them have the first label.", "benign")

    def __post_init__(self):
        if self.data is not None and find_benchmark(self.data) is None:
            TablePlace.parse(self.data)  # raises for a file that does not exist

    def read(self, config: ProbeConfig) -> Any:
        """Return the rows as `LabelledTexts`, with the labels of a head."""
        from ..data.texts import read_labelled  # needs datasets

        if self.benign and (config.num_labels, config.problem_type) != (2, "single_label_classification"):
            raise ProbeError(
                f"--benign needs a head with two labels; this one has {', '.join(config.id2label.values())}"
            )
        return read_labelled(
            self.data,
            self.text_column,
            self.label_column,
            list(config.id2label.values()),
            config.problem_type,
            "test",
            self.data_dir,
            self.prompt_column,
            self.max_text,
            self.benign,
        )


def read_texts(
    source: str,
    config: ProbeConfig,
    text_column: str,
    data_dir: Path | None,
    max_text: int,
    split: str,
    limit: int | None,
) -> list[Any]:
    """Return the texts of rows that need no labels; a random part of them if there are more than `limit`."""
    from ..data.texts import read_labelled  # needs datasets

    names, kind = list(config.id2label.values()), "single_label_classification"
    place = {"split": split, "data_dir": data_dir, "max_text": max_text}
    rows = read_labelled(source, text_column, label_names=names, problem_type=kind, benign=True, **place)
    return rows.at_most(limit, seed=0).texts


def check_head_folder(probe: str, option: str) -> None:
    """Check that an option can write into the head that `--probe` names.

    Raises:
        ProbeError: it is not a head folder on this machine, or cannot be written.
    """
    if not is_head_folder(probe):
        raise ProbeError(f"{option} writes into a head folder on this machine, and --probe {probe} is none")
    check_output(probe)


def short_name(source: str) -> str:
    """Return the last two parts of a path: the others differ between machines."""
    return "/".join(Path(source).parts[-2:])
