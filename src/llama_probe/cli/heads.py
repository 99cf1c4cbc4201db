"""`llama-probe inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

from ..backbone.loading import DtypeName, backbone_target, load_backbone
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig, read_config
from ..heads.match import SIZES, Check, compare
from ..heads.probe import ProbeModel
from ..hub.resolve import bundled_heads
from ..hub.transport import HubOptions
from .console import print_table
from .options import Result


def inspect(
    probe: str | None = None,
    /,
    *,
    backbone: str | None = None,
    dtype: DtypeName = "auto",
    revision: str | None = None,
) -> Result:
    """Show a head, check it against a backbone, or list the bundled heads.

    Args:
        probe: a head folder, a Hub id or an alias. Default: all bundled heads.
        backbone: compare with this model: 'demo', a folder, or a Hub id.
    """
    if probe is None:
        if backbone or revision:
            raise ProbeError("--backbone and --revision need a head: name it first")
        configs = {alias: read_config(folder) for alias, folder in bundled_heads().items()}
        return {alias: config.to_dict() for alias, config in configs.items()}, partial(_print_heads, configs)
    target = None if backbone is None else backbone_target(backbone)
    head = ProbeModel.load_for(probe, target, HubOptions(revision))
    if backbone is not None:
        lm, tokenizer = load_backbone(backbone, dtype)
        checks = compare(head.config, lm, tokenizer)
        return [asdict(check) for check in checks], partial(_print_checks, probe, backbone, checks)
    values = head.config.to_dict() | {"num_parameters": head.num_parameters()}
    rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in sorted(values.items())]
    return values, partial(print_table, probe, ("field", "value"), rows, left=2)


def _print_heads(configs: dict[str, ProbeConfig]) -> None:
    rows = [
        (alias, config.probe_type, ", ".join(config.id2label.values()), config.base_model_name_or_path)
        for alias, config in configs.items()
    ]
    print_table("bundled heads", ("alias", "type", "labels", "backbone"), rows, left=4)


def _print_checks(probe: str, backbone: str, checks: list[Check]) -> None:
    rows = [(check.field, check.recorded, check.actual, check.verdict) for check in checks]
    print_table(f"{probe} on {backbone}", ("", "the head was trained with", "this backbone", "verdict"), rows, left=4)
    differing = [check for check in checks if check.verdict == "differs"]
    guess = next((check.guess for check in checks if check.guess), None)  # from the fingerprints
    if any(check.field in SIZES for check in differing):
        print("The head cannot run on this backbone: it was made for a model of another size.")
    elif differing:
        print(f"The head runs on this backbone{f' ({guess}?)' if guess else ''}, but its scores may be meaningless.")
    elif guess:
        print(f"The head belongs to this backbone, which is {guess} of the one that it was trained on.")
    else:
        print("The head belongs to this backbone: nothing that was recorded differs.")
