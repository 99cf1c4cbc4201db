"""The options of a benchmark. This module is imported quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..backbone.loading import DtypeName, check_dtype, choose_device
from ..heads import get_probe_type


KINDS = ("pooling", "gate", "mha")
SHAPE = "llama-3b"  # a backbone without weights


@dataclass
class BenchmarkOptions:
    """Options of a benchmark. Every combination of the lists is measured.

    Attributes:
        backbone: name of the backbone; with `random_weights` also `SHAPE`.
        probes: heads. kinds: kinds of head, with fresh weights. Default to `KINDS` without `probes`.
        many: number of `mha` heads to measure together; 0 for none.
        tokens, batch_sizes: tokens of a prompt, and prompts of a batch.
        new_tokens: tokens to generate.
        pairs, warmup: timed and untimed runs of each system, alternating with the plain model.
        random_weights: read only the config of the backbone, and draw random weights.
    """

    backbone: str = "demo"
    probes: Sequence[str] = ()
    kinds: Sequence[str] | None = None
    many: int = 8
    tokens: Sequence[int] = (64, 512)
    batch_sizes: Sequence[int] = (1,)
    new_tokens: int = 1
    pairs: int = 9
    warmup: int = 2
    device: str = "auto"
    dtype: DtypeName = "auto"
    random_weights: bool = False

    def __post_init__(self):
        if self.kinds is None:
            self.kinds = () if self.probes else KINDS
        for kind in self.kinds:
            get_probe_type(kind)  # raises
        check_dtype(self.dtype)
        choose_device(self.device)
