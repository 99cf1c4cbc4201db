"""`llama-probe inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..backbone.loading import backbone_target, load_backbone, model_id
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig, read_config
from ..heads.match import Check, compare
from ..heads.probe import ProbeModel
from ..hub.card import card_template
from ..hub.folder import read_results, training_results
from ..hub.resolve import ALIASES, bundled_heads
from ..hub.transport import HubOptions
from .console import print_table, with_spread
from .options import Dtype, Result, Revision, TrustRemoteCode, check_revision


_VERDICTS = {
    "same": Text("same", "green"),
    "differs": Text("differs", "bold red"),
    "explained": Text("differs, explained", "green"),
}


def inspect(
    probe: Annotated[
        str | None, typer.Argument(help="A head folder, a Hub id or an alias. Default: all bundled heads.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Compare with this model: 'demo', a folder, or a Hub id.")
    ] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    markdown: Annotated[
        bool,
        typer.Option(
            help="Print the results of all bundled heads, or what was measured of one on each backbone, in Markdown."
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Show a head, check it against a backbone, or list the bundled heads."""
    if markdown and probe:
        measured = read_measured(probe)
        return measured, partial(print, measured_table(measured))
    if probe is None:
        if backbone or revision:
            raise ProbeError("--backbone and --revision need a head: name it first")
        heads = bundled_heads()
        configs = {alias: read_config(folder) for alias, folder in heads.items()}
        show = partial(print, results_table()) if markdown else partial(_print_heads, configs)
        return {alias: config.to_dict() for alias, config in configs.items()}, show
    check_revision(probe, revision)
    target = None if backbone is None else backbone_target(backbone)
    head = ProbeModel.load_for(probe, target, HubOptions(revision, trust_remote_code=trust_remote_code))
    if backbone is not None:
        lm, tokenizer = load_backbone(backbone, dtype)
        lm.config._name_or_path = model_id(backbone)
        checks = compare(head.config, lm, tokenizer)
        return [asdict(check) for check in checks], partial(_print_checks, probe, backbone, checks)
    values = head.config.to_dict() | {"num_parameters": head.num_parameters()}
    values["flagged"] = head.config.flagged_labels or None
    rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in sorted(values.items())]
    return values, partial(print_table, probe, ("field", "value"), rows, left=2)


def results_table() -> str:
    """Return a Markdown table of the bundled heads with their test results: mean and standard deviation over the seeds."""
    heads = [
        (alias, read_config(folder), training_results(read_results(folder)))
        for alias, folder in bundled_heads().items()
    ]
    template = card_template(Path(__file__).with_name("results_table.md"))
    return template.render(heads=heads, metrics=("accuracy", "f1", "auprc"), with_spread=with_spread)


def measured_table(measured: dict[str, Any]) -> str:
    """Return a Markdown table of what one recipe has measured of heads, by backbone, beside TF-IDF, with 95 % intervals.

    A row is a set of rows and a figure: the share with a label that is flagged at the first threshold, AUROC, or AUPRC.
    The sets and TF-IDF are those of the first head. An asterisk marks the figures of a twin.
    """
    parts = [{part["name"]: part for part in head["parts"]} for head in measured.values()]
    return card_template(Path(__file__).with_name("measured_table.md")).render(heads=measured, parts_by_name=parts)


def read_measured(alias: str) -> dict[str, Any]:
    """Return what its recipe has measured of a bundled head on each backbone, by the backbone's name."""
    name = ALIASES.get(alias, alias)
    measured = {}
    for folder in bundled_heads().values():
        if folder.name == name and "measured" in (results := read_results(folder) or {}):
            measured[read_config(folder).base_model_name_or_path.rpartition("/")[2]] = results["measured"]
    if not measured:
        raise ProbeError(
            f"--markdown takes a bundled head that its recipe has measured, not {alias}; or none, for all"
        )
    return measured


def _print_heads(configs: dict[str, ProbeConfig]) -> None:
    rows = [
        (alias, config.probe_type, ", ".join(config.id2label.values()), config.base_model_name_or_path)
        for alias, config in configs.items()
    ]
    print_table("bundled heads", ("alias", "kind", "labels", "backbone"), rows, left=4)


def _print_checks(probe: str, backbone: str, checks: list[Check]) -> None:
    rows = [
        (check.field, check.recorded, check.actual, _VERDICTS.get(check.verdict, check.verdict)) for check in checks
    ]
    print_table(f"{probe} on {backbone}", ("", "the head was trained with", "this backbone", "verdict"), rows, left=4)
    differing = [check for check in checks if check.verdict == "differs"]
    guess = next((check.guess for check in checks if check.guess), None)  # from the fingerprints
    if any(check.fatal for check in differing):
        print("The head cannot run on this backbone: it was made for a model of another size.")
    elif differing:
        print(f"The head runs on this backbone{f' ({guess}?)' if guess else ''}, but its scores may be meaningless.")
    elif guess:
        print(f"The head belongs to this backbone, which is {guess} of the one that it was trained on.")
    else:
        print("The head belongs to this backbone: nothing that was recorded differs.")
