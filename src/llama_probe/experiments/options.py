"""The options of `llama-probe benchmark`. This module is imported quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..backbone.loading import DtypeName, check_dtype, choose_device
from ..data.row_sources import setting
from ..errors import ProbeError
from ..heads import get_probe_type


KINDS = ("pooling", "gate", "mha")
SHAPE = "llama-3b"  # a backbone without weights


@dataclass
class BenchmarkOptions:
    """Options of a benchmark, as the metadata of each field describes them. Every combination of lists is measured."""

    backbone: str = "demo"
    probes: Sequence[str] = setting((), "A head folder, a Hub id or an alias. Repeatable.", "probe")
    kinds: Sequence[str] | None = setting(
        None, f"A kind of head, with fresh weights. Repeatable. Default, without --probe: {', '.join(KINDS)}.", "kind"
    )
    many: int = setting(8, "Number of mha heads to measure together; 0 for none.")
    tokens: Sequence[int] = setting((64, 512), "Tokens of a prompt. Repeatable.")
    batch_sizes: Sequence[int] = setting((1,), "Prompts of a batch. Repeatable.", "batch-size")
    new_tokens: int = setting(1, "Tokens to generate. With more than 1, also the time of each.")
    pairs: int = setting(9, "Timed runs of each system, alternating with the plain model.")
    warmup: int = 2  # untimed pairs before the timed ones
    device: str = setting("auto", "auto (an accelerator if there is one), cpu, cuda, cuda:1 ...")
    dtype: DtypeName = "auto"
    random_weights: bool = setting(
        False, "Read only the config of the backbone, and draw random weights: the times are the same."
    )

    def __post_init__(self):
        if self.kinds is None:
            self.kinds = () if self.probes else KINDS
        for name in ("new_tokens", "pairs", "tokens", "batch_sizes", "many"):
            value, least = getattr(self, name), 0 if name == "many" else 1
            if (value if isinstance(value, int) else min(value)) < least:
                raise ProbeError(f"{name}={value} must be at least {least}")
        for kind in self.kinds:
            get_probe_type(kind)  # raises
        check_dtype(self.dtype)
        choose_device(self.device)
