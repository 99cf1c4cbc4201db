"""The dtype in which a backbone runs on a CPU: that of its checkpoint if the processor computes it, else float32."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.utils import logging

from ..errors import ProbeError


logger = logging.get_logger(__name__)

# Asks oneDNN, which multiplies the matrices, whether the processor has what it needs for a 16-bit dtype.
_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_TRIAL_SECONDS = 0.1  # of each of two dtypes


def settle_dtype(lm: transformers.PreTrainedModel, asked: object = "auto") -> None:
    """Put a backbone on the CPU into float32 if the processor does not compute its 16-bit dtype and no dtype was asked for.

    Without instructions for a dtype, torch multiplies its matrices many times as slowly as those of float32. A dtype that was asked
    for stays, and a warning names the factor. A quantised backbone stays as it is.

    Args:
        asked: the argument `dtype` of `from_pretrained`; `"auto"` and None ask for no dtype.

    Raises:
        ProbeError: the memory is too small for float32.
    """
    dtype = lm.dtype
    on_cpu = all(parameter.device.type == "cpu" for parameter in lm.parameters())
    is_quantized = getattr(lm, "hf_quantizer", None) is not None
    if not on_cpu or is_quantized or dtype not in _SUPPORT or is_computed(dtype):
        return
    name = str(dtype).removeprefix("torch.")
    if asked not in ("auto", None):
        logger.warning_once(
            f"this processor has no instructions for {name}: it multiplies matrices {_slowdown(dtype):.1f} times as slowly as in "
            "float32 (measured now); dtype auto takes float32"
        )
        return
    before = _bytes_of(lm)
    after = sum(4 * parameter.numel() for parameter in lm.parameters())
    free = _free_memory()
    if free is not None and after - before > free:
        raise ProbeError(
            f"this processor has no instructions for {name}, and float32 takes {after / 1e9:.1f} GB, of which {(before + free) / 1e9:.1f} GB "
            f"are there: take a smaller model, or dtype {name} ({before / 1e9:.1f} GB), {_slowdown(dtype):.0f} times as slow"
        )
    lm.float()
    lm.config.dtype = torch.float32
    logger.warning_once(
        f"this processor has no instructions for {name}, the dtype of the checkpoint: the backbone runs in float32, which takes "
        f"{after / 1e9:.2f} GB of memory instead of {before / 1e9:.2f} GB"
    )


def is_computed(dtype: torch.dtype) -> bool:
    """Return True if the processor has instructions for matrices of a dtype."""
    if dtype not in _SUPPORT:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _SUPPORT[dtype])())


@functools.cache
def _slowdown(dtype: torch.dtype) -> float:
    """Return the time of a product of matrices in a dtype, as a multiple of the time in float32. Takes a quarter of a second."""
    seconds = {}
    with torch.inference_mode():
        for each in (torch.float32, dtype):
            states = torch.ones(32, 256, dtype=each)
            weight = torch.ones(512, 256, dtype=each)
            nn.functional.linear(states, weight)  # sets up what later calls use
            calls = 0
            start = time.perf_counter()
            while time.perf_counter() - start < _TRIAL_SECONDS:
                nn.functional.linear(states, weight)
                calls += 1
            seconds[each] = (time.perf_counter() - start) / calls
    return seconds[dtype] / seconds[torch.float32]


def _bytes_of(lm: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in lm.parameters())


def _free_memory() -> int | None:
    """Return the bytes of memory that new data may take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024
