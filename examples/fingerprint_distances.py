"""Print how far the fingerprints of quantised or trained copies are from that of the demo backbone, in about a minute.

Run it with `python examples/fingerprint_distances.py` (extra `demo`); `--steps 5 20` sets the training steps.
"""

import argparse
import copy
from importlib.util import find_spec

import torch

from llama_probe.backbone.fingerprint import distance, fingerprint
from llama_probe.backbone.loading import load_backbone


SENTENCES = [
    "The ferry leaves at six and comes back after dark.",
    "Nobody had told her that the shop was closed on Mondays.",
    "He counts the stairs every time, although there are always nineteen.",
    "A good knife is cheaper than a bad one in the end.",
    "They painted the door green because it was the only tin left.",
    "When the rain stopped, the street smelled of dust and bread.",
    "The map was right, and the mountain was in the wrong place.",
    "It took them a week to agree on the name of the dog.",
]


def rounded(lm, bits: int, group: int | None = None):
    """Return a copy with rounded matrices, with one scale for each row, or for each `group` weights."""
    lm = copy.deepcopy(lm)
    for parameter in lm.model.layers.parameters():
        if parameter.dim() == 2:
            weights = parameter.data.reshape(-1, group or parameter.shape[1])
            scale = weights.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            parameter.data = ((weights / scale).round() * scale).reshape(parameter.shape)
    return lm


def torchao_copies(lm):
    """Yield a title and a copy in bf16, for each way in which torchao quantises it."""
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup

    four_bits = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64))
    for title, config in (
        ("int8 weights", quantization.Int8WeightOnlyConfig()),
        ("int8 weights, activations", quantization.Int8DynamicActivationInt8WeightConfig()),
        ("int4 weights, groups of 64", four_bits),
    ):
        copied = copy.deepcopy(lm).bfloat16()
        quantization.quantize_(copied, config)
        yield title, copied


def trained(lm, tokenizer, steps: list[int], learning_rate: float):
    """Train a copy on eight sentences with AdamW. Yield the copy after each of these numbers of steps."""
    lm = copy.deepcopy(lm).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=learning_rate, weight_decay=0)
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for step in range(1, max(steps) + 1):
        lm(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            yield step, lm


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20], metavar="N")
    steps = parser.parse_args().steps
    lm, tokenizer = load_backbone("demo", "float32")
    original = fingerprint(lm)

    def show(title: str, changed) -> None:
        print(f"{title:32} {distance(original, fingerprint(changed)):7.2%}", flush=True)

    show("bfloat16", copy.deepcopy(lm).bfloat16())
    show("float16", copy.deepcopy(lm).half())
    show("8 bits, a scale a row", rounded(lm, 8))
    show("4 bits, a scale for 32 weights", rounded(lm, 4, 32))
    show("4 bits, a scale for 64 weights", rounded(lm, 4, 64))
    if find_spec("torchao"):
        for title, copied in torchao_copies(lm):
            show(f"torchao, {title}", copied)
    for rate in ("1e-5", "5e-5"):
        for number, changed in trained(lm, tokenizer, steps, float(rate)):
            show(f"{number} steps at {rate}", changed)
