"""The figures of arXiv 2601.13288 (v2, 27 April 2026), for Llama-3.2-3B-Instruct.

They are shares, not percent. On ToxicChat the paper tests on the human-annotated rows only.
"""

from __future__ import annotations

from dataclasses import dataclass


SOURCE = "arXiv 2601.13288v2"
BACKBONE = "Llama-3.2-3B-Instruct"
BACKBONE_SIZE = "3.2 billion parameters, 28 layers, hidden size 3,072"


@dataclass(frozen=True)
class Figure:
    """A number of the paper, and its standard deviation if the paper gives one."""

    value: float
    std: float | None = None


# Tables 1, 3 and 4. Methods without a counterpart here keep the paper's names.
_COLUMNS = ("toxicchat f1", "toxicchat auprc", "wildguardmix f1", "imdb accuracy", "sst2 accuracy", "emotion accuracy")
_ROWS = {
    "pooling": (0.7353, 0.812, 0.8284, 0.9407, 0.9229, 0.6918),
    "gate": (0.8049, 0.854, 0.8598, 0.9505, 0.9442, 0.8458),
    "mha": (0.8451, 0.898, 0.8855, 0.9515, 0.9539, 0.8768),
    "muli": (0.778, 0.829, 0.8379, 0.8650, 0.9319, 0.6405),
    "zero-shot": (None, None, None, 0.776, 0.840, 0.446),
    "few-shot": (None, None, None, 0.761, 0.853, 0.334),
    "chain-of-thought prompting": (None, None, None, 0.915, 0.931, 0.561),
    "T5-large classifier": (0.822, 0.885, None, None, None, None),
    "WildGuard 7B": (0.708, None, 0.889, None, None, None),
}
_STD = {"pooling": 0.0068, "gate": 0.0117, "mha": 0.0043}  # of F1 on ToxicChat
MAIN = {
    method: {
        column: Figure(value, _STD.get(method) if column == _COLUMNS[0] else None)
        for column, value in zip(_COLUMNS, values, strict=True)
        if value is not None
    }
    for method, values in _ROWS.items()
}

# Out of distribution: trained on WildGuardMix, tested on ToxicChat, F1.
OUT_OF_DISTRIBUTION = {"pooling": Figure(0.533), "gate": Figure(0.648), "mha": Figure(0.729)}

# Table 7: F1 of mha on ToxicChat by downcast.
DOWNCAST = {4: Figure(0.841), 8: Figure(0.829), 16: Figure(0.830), 32: Figure(0.845), 64: Figure(0.828)}


@dataclass(frozen=True)
class Serving:
    """Time of a prompt in milliseconds, and peak memory in MB, of the whole system."""

    latency: float
    peak_memory: float


# Table 5. Times and memory of the guard models include the base model's.
SERVING_SETTING = "one RTX 3090, batch size 1, prompts of up to 512 tokens, one new token"
SERVING = {
    "base": Serving(26.43, 6498),
    "pooling": Serving(29.66, 6498),
    "gate": Serving(30.90, 6749),
    "mha": Serving(40.27, 6969),
    "T5-large": Serving(88.33, 7992),
    "WildGuard-7B": Serving(100.32, 21084),
    "Llama Guard 3 8B": Serving(123.21, 22769),
}

# The paper's conclusion: each kind is better than the one before.
ORDERS = (("pooling", "gate", "mha"), ("muli", "gate"))


def figure(method: str, data: str, metric: str) -> Figure | None:
    """Return the paper's number for a method on a data set, or `None`."""
    return MAIN.get(method, {}).get(f"{data} {metric}")


def serving_ratio(system: str) -> float | None:
    """Return the paper's time of a system over that of the base model alone, or `None`."""
    found = SERVING.get(system)
    return None if found is None else found.latency / SERVING["base"].latency
