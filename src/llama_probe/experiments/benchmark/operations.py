"""Operations that heads add to a pass of the language model. On a GPU each operation is a kernel launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ...heads.device import acting_as
from .serving_systems import AGAIN, BASE, Load, System, plain_system, systems


_aten = torch.ops.aten
# Operations that touch no data, beside views.
_METADATA = {_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}


class OperationCounter(TorchDispatchMode):
    """Count the operations that are dispatched inside the block, without views and allocations."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_metadata = getattr(func, "is_view", False) or getattr(func, "overloadpacket", func) in _METADATA
        self.operations += not is_metadata
        return func(*args, **(kwargs or {}))


def count_operations(
    model: PreTrainedModel,
    tokens: Sequence[int] = (16, 512),
    many: int = 0,
    as_device: str = "cuda",
) -> list[dict[str, Any]]:
    """Count the operations of the plain model, of each attached head, and of `many` fresh heads of `MANY_KIND` at once.

    Args:
        tokens: lengths of the prompt. The batch is one prompt.
        as_device: `"cuda"` or `"cpu"`. The choices for such a device are made on any device.

    Returns:
        One dict a length and system: `system`, `tokens`; `prefill`: operations of `generate(max_new_tokens=1)`; `step`:
        operations of one decoding step, whatever the length; `prefill_ratio` and `step_ratio`: these over the plain model's.
    """
    plain = model._without_probes()
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    drawn = {"vocab_size": vocab_size, "device": model.device, "heads": model.probes.values()}
    prompts = [Load.create(1, length, 1, **drawn) for length in tokens]
    reply = Load.create(1, min(tokens), 3, **drawn)
    rows = []
    with acting_as(as_device):
        for system in chain([plain_system(plain)], systems(model, plain, many)):
            if system.name == AGAIN:
                continue
            prefill, step = [_count_prefill(system, prompt) for prompt in prompts], _count_step(system, reply)
            if system.name == BASE:
                base, base_step = prefill, step
            for i, length in enumerate(tokens):
                row = {"system": system.name, "tokens": length, "prefill": prefill[i], "step": step}
                rows.append({**row, "prefill_ratio": prefill[i] / base[i], "step_ratio": step / base_step})
    return sorted(rows, key=lambda row: tokens.index(row["tokens"]))


def _count_prefill(system: System, prompt: Load) -> int:
    with OperationCounter() as counter:
        system.serve(prompt, None)
    return counter.operations


def _count_step(system: System, reply: Load) -> int:
    """Return the operations between the last two tokens of a reply."""
    marks: list[int] = []
    with OperationCounter() as counter:
        system.serve(reply, lambda: marks.append(counter.operations))
    return marks[-1] - marks[-2]


def columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table of operations."""
    header = ["system", "tokens", "prefill", "its ratio", "a further token", "its ratio"]
    forms = {"tokens": "{:,}", "prefill": "{:,}", "prefill_ratio": "{:.3f}x", "step": "{:,}", "step_ratio": "{:.3f}x"}
    return header, [[row["system"], *(form.format(row[name]) for name, form in forms.items())] for row in rows]
