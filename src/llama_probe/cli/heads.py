"""`llama-probe inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer
from rich.text import Text

from ..backbone.loading import backbone_target, load_backbone, model_id
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig, read_config
from ..heads.match import Check, compare
from ..heads.probe import ProbeModel
from ..hub.card import measured_table, results_table
from ..hub.folder import read_results
from ..hub.resolve import ALIASES, bundled_heads
from ..hub.transport import HubOptions
from .console import print_table
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
        return _measured(probe)
    if probe is None:
        if backbone or revision:
            raise ProbeError("--backbone and --revision need a head: name it first")
        heads = bundled_heads()
        configs = {alias: read_config(folder) for alias, folder in heads.items()}
        show = partial(print, results_table(heads)) if markdown else partial(_print_heads, configs)
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


def _measured(probe: str) -> tuple[Any, Callable[[], None]]:
    """Return the measured figures of a bundled head on each backbone, and what prints them."""
    name = ALIASES.get(probe, probe)
    folders = {
        read_config(folder).base_model_name_or_path.rpartition("/")[2]: folder
        for alias, folder in bundled_heads().items()
        if alias.rpartition("/")[2] == name and (read_results(folder) or {}).get("measured")
    }
    if not folders:
        raise ProbeError(
            f"--markdown takes a bundled head that its recipe has measured, not {probe}; or none, for all of them"
        )
    measured = {backbone: read_results(folder)["measured"] for backbone, folder in folders.items()}
    return measured, partial(print, measured_table(folders))


def _print_heads(configs: dict[str, ProbeConfig]) -> None:
    rows = []
    for alias, config in configs.items():
        rows.append((alias, config.probe_type, ", ".join(config.id2label.values()), config.base_model_name_or_path))
    print_table("bundled heads", ("alias", "kind", "labels", "backbone"), rows, left=4)


def _print_checks(probe: str, backbone: str, checks: list[Check]) -> None:
    rows = []
    for check in checks:
        cells = ("-" if value is None else str(value) for value in (check.recorded, check.actual))
        rows.append((check.field, *cells, _VERDICTS.get(check.verdict, check.verdict)))
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
