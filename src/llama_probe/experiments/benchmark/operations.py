"""Operations that heads add to a pass of the language model. On a GPU each operation is a kernel launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ...errors import ProbeError
from ...heads.configuration import ProbeConfig
from .serving_systems import AGAIN, Load, System, plain_system, systems


DEVICES = ("cuda", "cpu")

_aten = torch.ops.aten
# Operations that touch no data, beside views.
_METADATA = {_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}


class OperationCounter(TorchDispatchMode):
    """A counter of the operations that are dispatched inside the block, without views and allocations.

    Attributes:
        operations: operations so far.
    """

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_metadata = getattr(func, "is_view", False) or getattr(func, "overloadpacket", func) in _METADATA
        self.operations += not is_metadata
        return func(*args, **(kwargs or {}))


@contextmanager
def reader_choices(as_device: str) -> Iterator[None]:
    """Take the choices that the reader makes for a kind of device, without needing the device.

    Raises:
        ProbeError: `as_device` is not one of `DEVICES`.
    """
    if as_device not in DEVICES:
        raise ProbeError(f"as_device={as_device!r} is not allowed; allowed: {', '.join(DEVICES)}")
    yield


def count_operations(
    model: PreTrainedModel,
    tokens: Sequence[int] = (16, 512),
    many: int = 0,
    many_config: ProbeConfig | None = None,
    as_device: str = "cuda",
) -> list[dict[str, Any]]:
    """Count the operations of the plain model, of each attached head, and of many heads at once.

    Args:
        model: the model with its heads.
        tokens: lengths of the prompt. The batch is one prompt.
        many: number of heads of `many_config` that run at once; 0 leaves them out.
        as_device: `"cuda"` or `"cpu"`. The choices for such a device are taken, whatever the model is on.

    Returns:
        One dict a length and system: `system`, `tokens`; `prefill`: operations of `generate(max_new_tokens=1)`; `step`:
        operations of one decoding step; `prefill_ratio` and `step_ratio`: these over the plain model's.

    Raises:
        ProbeError: `as_device` is not allowed.
    """
    plain = model._without_probes()
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    # The last of three tokens is a step of a reply that is under way.
    loads = [[Load.create(1, length, new, vocab_size, model.device) for new in (1, 3)] for length in tokens]
    rows: list[dict[str, Any]] = []
    with reader_choices(as_device):
        base = plain_system(plain)
        counts = [_count(base, *pair) for pair in loads]
        found = [(base.name, counts)]
        for system in systems(model, plain, many, many_config):
            if system.name != AGAIN:
                found.append((system.name, [_count(system, *pair) for pair in loads]))
    for i, length in enumerate(tokens):
        for name, own in found:
            row = {"system": name, "tokens": length}
            for phase, value, plain_value in zip(("prefill", "step"), own[i], counts[i], strict=True):
                row |= {phase: value, f"{phase}_ratio": value / plain_value}
            rows.append(row)
    return rows


def _count(system: System, prefill: Load, reply: Load) -> tuple[int, int]:
    """Return the operations of the pass over the prompt, and of the last step of the reply."""
    marks: list[int] = []
    with OperationCounter() as whole:
        system.serve(prefill, None)
    with OperationCounter() as counter:
        system.serve(reply, lambda: marks.append(counter.operations))
    return whole.operations, marks[-1] - marks[-2]


def columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table of operations."""
    header = ["system", "tokens", "prefill", "its ratio", "a further token", "its ratio"]
    lines = []
    for row in rows:
        cells = [
            f"{row['prefill']:,}",
            f"{row['prefill_ratio']:.3f}x",
            f"{row['step']:,}",
            f"{row['step_ratio']:.3f}x",
        ]
        lines.append([row["system"], f"{row['tokens']:,}", *cells])
    return header, lines
