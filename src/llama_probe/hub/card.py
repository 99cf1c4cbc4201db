"""The card of a head folder, written from its config and its measured results and from nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import ProbeError
from ..files import (
    CARD_NAME,
    PLOT_NAMES,
    RESULTS_NAME,
    chosen_run,
    is_head_folder,
    read_config,
    read_results,
    save_head,
    write_atomically,
)
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..serving.halting import measured_rules
from .card_sections import backbone, data, introduction, limits, measured, measurements, on_the_hub, training, usage
from .markdown import cell
from .resolve import default_name


_SOURCE = re.compile(
    r'^model = AutoModel\.from_pretrained\(.*, probe=("(?:[^"\\]|\\.)*")\)$', re.MULTILINE
)  # in `usage`


@dataclass
class CardFacts:
    """What a card says beyond what was measured.

    Attributes:
        license: of the head; the stricter of the backbone's and the data's. An SPDX id as the Hub has them.
        dataset: Hub id of the training data. dataset_name: its name in a sentence.
        data_note: licence and origin of the data, in a sentence.
        language: of the data.
        limits: what the head was not tested on, a line each.
        command: the command that made the head.
    """

    license: str | None = None
    dataset: str | None = None
    dataset_name: str | None = None
    data_note: str | None = None
    language: str | None = None
    limits: list[str] = field(default_factory=list)
    command: str | None = None


def write_card(folder: str | os.PathLike, **kwargs) -> Path:
    """Writes `README.md` into a head folder; the arguments are those of `create_card`.

    Raises:
        ProbeError: the folder holds no head.
    """
    return _write(Path(folder), str(create_card(folder, **kwargs)))


def _write(folder: Path, text: str) -> Path:
    write_atomically({folder / CARD_NAME: lambda path: path.write_text(text, encoding="utf-8")})
    return folder / CARD_NAME


def has_own_words(folder: str | os.PathLike) -> bool:
    """Whether a folder has a card that somebody wrote or edited, rather than `write_card`."""
    return (Path(folder) / CARD_NAME).is_file() and written_with(folder) is None


def written_with(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The arguments with which `write_card` wrote the card of a folder, perhaps before a push to where it was then pulled from.

    They are read off the card: it is a generated one where they give it again.

    Returns:
        `source`, `license` where it is not the one in the results, and `tags`; `None` where there is no such card.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file() or not is_head_folder(folder):
        return None
    try:
        text = path.read_text(encoding="utf-8")
        named, shown = _SOURCE.search(text), ModelCard(text, ignore_metadata_errors=True).data
        known = create_card(folder).data
        arguments = {
            "source": json.loads(named[1]) if named else None,
            "license": None if shown.license == known.license else shown.license,
            "tags": [tag for tag in shown.tags or [] if tag not in known.tags],
        }
    except Exception:  # a card of the user's own may hold anything where others have their YAML
        return None
    return arguments if text == _generated(folder, **arguments) else None


def save_with_card(probe: ProbeModel, folder: str | os.PathLike) -> Path:
    """`save_head`, and a card beside it. A card with words of the user's own stays as it is; one that was generated is
    written anew, with the licence and the tags that it was given.

    Raises:
        ProbeError: `folder` cannot be written into.
    """
    own, given = has_own_words(folder), written_with(folder) or {}
    folder = save_head(probe, folder)
    if not own and (text := _generated(folder, **{**given, "source": None})) is not None:
        _write(folder, text)
    return folder


def _generated(folder: str | os.PathLike, **kwargs) -> str | None:
    """The card that a folder gives; `None` where its results are none that this version can read."""
    try:
        return str(create_card(folder, **kwargs))
    except ProbeError:
        return None


def create_card(
    folder: str | os.PathLike, source: str | None = None, license: str | None = None, tags: Sequence[str] = ()
) -> ModelCard:
    """The card of a head folder; the same folder gives the same card.

    A head without `results.json` gets a card that says what it is and that nothing was measured.

    Args:
        folder: with a config, and with weights, results and plots where there are any.
        source: what a user writes as `probe=` to get this head; the folder's name where left out.
        license: in place of the one in the results.
        tags: further tags.

    Raises:
        ProbeError: the folder holds no head, or results that this version cannot read.
    """
    config, results = read_config(folder), read_results(folder)
    try:
        return _card(Path(folder), config, results, source, license, tags)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ProbeError(
            f"what {Path(folder) / RESULTS_NAME} holds is nothing that this version can make a card of "
            f"({type(error).__name__}: {error}): remove the file (probe.results = None of a head in memory), or write a card"
        ) from error


def _card(
    folder: Path,
    config: ProbeConfig,
    results: dict[str, Any] | None,
    source: str | None,
    license: str | None,
    tags: Sequence[str],
) -> ModelCard:
    facts = CardFacts(**results["card"]) if results else CardFacts()
    source = source or folder.resolve().name
    name = default_name(source)
    split = None
    scores: dict[str, Any] = {}
    if results:
        split = "test" if "test" in results["summary"] else "validation"
        scores = {
            "metrics": sorted(measured(results["summary"][split])),
            "model_name": name,
            "eval_results": _eval_results(results, facts, split),
        }
    base_model = config.base_model_name_or_path if on_the_hub(config.base_model_name_or_path) else None
    metadata = ModelCardData(
        library_name="llama_probe",
        license=license or facts.license,
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        pipeline_tag="text-classification",
        language=facts.language,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=list(dict.fromkeys(["llama_probe", "probe", f"probe-{config.probe_type}", *tags])),
        **scores,
    )
    halting = measured_rules(results).get(list(config.id2label.values())[-1])
    body = [introduction(name, config, results, facts), "## Use", usage(source, name, config, halting)]
    if results:
        plots = [name for name in PLOT_NAMES if (folder / name).is_file()]
        body += ["## Results", *measurements(config, results, split, plots)]
        body += ["## Data", data(results, facts)]
        body += ["## Training", training(config, results, facts)]
    body += ["## Backbone", backbone(config), "## Limits", limits(config, results, facts)]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def results_table(folders: Iterable[str | os.PathLike]) -> str:
    """A Markdown table of heads with their test results: mean and standard deviation over the seeds of each."""
    metrics = ("accuracy", "f1", "auprc")
    lines = [
        "| head | kind | parameters | labels | test rows | seeds | accuracy | F1 | AUPRC |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for folder in folders:
        config, results = read_config(folder), _results_of(folder)
        summary = results["summary"].get("test")
        cells = ["-"] * len(metrics)
        if summary:
            cells = [f"{summary[m]['mean']:.3f} ± {summary[m]['std']:.3f}" if summary[m] else "-" for m in metrics]
        values = [
            f"`{Path(folder).resolve().name}`",
            config.probe_type,
            f"{results['num_parameters']:,}",
            cell(", ".join(config.id2label.values())),
            summary["rows"] if summary else "-",
            len(results["runs"]),
            *cells,
        ]
        lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines)


def _results_of(folder: str | os.PathLike) -> dict[str, Any]:
    results = read_results(folder)
    if results is None:
        raise ProbeError(f"{folder} has no {RESULTS_NAME}: nothing was measured of this head")
    return results


def _eval_results(results: dict[str, Any], facts: CardFacts, split: str) -> list[EvalResult]:
    chosen = chosen_run(results)[split]
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=facts.dataset or "own",
            dataset_name=facts.dataset_name or facts.dataset or "own data",
            dataset_split=split,
            metric_type=metric,
            metric_value=round(chosen[metric], 4),
        )
        for metric in sorted(measured(results["summary"][split]))
    ]
