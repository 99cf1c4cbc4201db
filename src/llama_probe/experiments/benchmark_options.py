"""The options of a benchmark. This module is imported quickly."""

from __future__ import annotations

from dataclasses import dataclass

from ..backbone.loading import DtypeName
from ..errors import ProbeError


KINDS = ("pooling", "gate", "mha")
SHAPE = "llama-3b"  # a backbone without weights


@dataclass
class BenchmarkOptions:
    """Options of a benchmark. Every combination of the lists is measured.

    Attributes:
        backbone: 'demo', a folder, a GGUF file, or a Hub id; with --random-weights also llama-3b.
        probe: a head: a folder, a Hub id or an alias.
        kind: a kind of head, with fresh weights. Default, without --probe: pooling, gate, mha.
        many: number of mha heads to measure together; 0 for none.
        tokens: tokens of a prompt.
        batch_size: prompts of a batch.
        new_tokens: tokens to generate. With more than 1, also the time of each.
        pairs: timed runs of each system, alternating with the plain model.
        device: auto (an accelerator if there is one), cpu, cuda, cuda:1 ...
        random_weights: read only the config of the backbone, and draw random weights: the times are the same.
    """

    backbone: str = "demo"
    probe: list[str] = ()
    kind: list[str] | None = None
    many: int = 8
    tokens: list[int] = (64, 512)
    batch_size: list[int] = (1,)
    new_tokens: int = 1
    pairs: int = 9
    device: str = "auto"
    dtype: DtypeName = "auto"
    random_weights: bool = False

    def __post_init__(self):
        if self.kind is None:
            self.kind = [] if self.probe else list(KINDS)
        if min(*self.tokens, *self.batch_size, self.new_tokens, self.pairs, self.many + 1) < 1:
            raise ProbeError("tokens, batch_size, new_tokens and pairs must be at least 1, many at least 0")
