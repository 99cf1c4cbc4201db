"""Prefill time with heads beside the plain model's: medians of paired ratios, in one run, on the demo backbone."""

import statistics
import time

import torch
from transformers import AutoModel
from transformers.utils import logging

from llama_probe import ProbeConfig
from llama_probe.backbones import demo_backbone


PAIRS = 9

logging.set_verbosity_error()
model = AutoModel.from_pretrained(demo_backbone(), probe=[])
for kind in ("pooling", "gate", "mha"):
    model.add_probe(kind, ProbeConfig(probe_type=kind))


def prefill(ids: torch.Tensor, heads: list[str]) -> float:
    model.set_active_probes(heads)
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1, do_sample=False)
    return time.perf_counter() - start


print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {PAIRS} pairs a cell; prefill and one token")
print("tokens  " + "  ".join(f"{kind:>8}" for kind in model.probes))
for length in (64, 512):
    ids = torch.randint(3, 40_000, (1, length), generator=torch.Generator().manual_seed(length))
    cells = []
    for heads in (["pooling"], ["gate"], ["mha"]):
        prefill(ids, heads), prefill(ids, [])
        ratios = []
        for pair in range(PAIRS):  # which of the two comes first alternates, so that a drift hits both
            order = ([], heads) if pair % 2 else (heads, [])
            seconds = {bool(chosen): prefill(ids, chosen) for chosen in order}
            ratios.append(seconds[True] / seconds[False])
        cells.append(statistics.median(ratios))
    print(f"{length:>6}  " + "  ".join(f"{ratio:>7.3f}x" for ratio in cells))
