"""The options of `llama-probe benchmark`. This module is imported quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...backbone.loading import DtypeName, check_dtype, choose_device
from ...data.sources import setting
from ...errors import ProbeError
from ...heads import get_probe_type
from .models import SHAPES


KINDS = ("pooling", "gate", "mha")
_LEAST = {"many": 0, "new_tokens": 1, "pairs": 1, "tokens": 1, "batch_sizes": 1}


@dataclass
class BenchmarkOptions:
    """Options of a benchmark, as the metadata of each field describes them. Every combination of lists is measured.

    Attributes:
        backbone: `"demo"`, a folder or a Hub id; with `random_weights` also one of `SHAPES`.
        dtype: of backbone and guards.
        warmup: untimed pairs before the timed ones.

    Raises:
        ProbeError: a value is not allowed.
    """

    backbone: str = "demo"
    probes: Sequence[str] = setting((), "A head folder, a Hub id or an alias. Repeatable.", "probe")
    kinds: Sequence[str] | None = setting(
        None,
        "A kind of head, with fresh weights. Repeatable. Default, without --probe: pooling, gate and mha.",
        "kind",
    )
    many: int = setting(8, "Number of mha heads to measure together; 0 for none.")
    tokens: Sequence[int] = setting((64, 512), "Tokens of a prompt. Repeatable.")
    batch_sizes: Sequence[int] = setting((1,), "Prompts of a batch. Repeatable.", "batch-size")
    new_tokens: int = setting(1, "Tokens to generate. With more than 1, also the time of each.")
    pairs: int = setting(9, "Timed runs of each system, alternating with the plain model.")
    warmup: int = 2
    device: str = setting("auto", "auto (an accelerator if there is one), cpu, cuda, cuda:1 ...")
    dtype: DtypeName = "auto"
    naive: bool = setting(True, "Also measure heads on the tensors of output_hidden_states=True.")
    guards: Sequence[str] = setting(
        (),
        "A model that reads each prompt first: a sequence classifier, an encoder-decoder or a causal LM, as a folder or a Hub "
        f"id; with --random-weights also one of {', '.join(SHAPES)}. Repeatable.",
        "guard",
    )
    random_weights: bool = setting(
        False, "Read only the configs of backbone and guards, and draw random weights: the times are the same."
    )
    compile: bool = setting(False, "Run the backbone with torch.compile, with heads and without.", "compile")

    def __post_init__(self):
        if self.kinds is None:
            self.kinds = () if self.probes else KINDS
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if (value if isinstance(value, int) else min(value)) < least:
                raise ProbeError(f"{name}={value} must be at least {least}")
        for kind in self.kinds:
            get_probe_type(kind)  # raises
        check_dtype(self.dtype)
        choose_device(self.device)
