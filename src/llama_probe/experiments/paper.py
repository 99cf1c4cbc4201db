"""The figures of arXiv 2601.13288 (v2, 27 April 2026), for Llama-3.2-3B-Instruct.

They are shares, not percent. On ToxicChat the paper tests on the human-annotated rows only.
"""

from __future__ import annotations


SOURCE = "arXiv 2601.13288v2"
BACKBONE = "Llama-3.2-3B-Instruct"
BACKBONE_SIZE = "3.2 billion parameters, 28 layers, hidden size 3,072"

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
METHODS = tuple(_ROWS)

# Out of distribution: trained on WildGuardMix, tested on ToxicChat, F1.
OUT_OF_DISTRIBUTION = {"pooling": 0.533, "gate": 0.648, "mha": 0.729}

# Table 7: F1 of mha on ToxicChat by downcast.
DOWNCAST = {4: 0.841, 8: 0.829, 16: 0.830, 32: 0.845, 64: 0.828}

# Table 5: milliseconds of a prompt, by kind of head or shape. Those of the guard models include the base model's.
SERVING_SETTING = "one RTX 3090, batch size 1, prompts of up to 512 tokens, one new token"
SERVING = {
    "base": 26.43,
    "pooling": 29.66,
    "gate": 30.90,
    "mha": 40.27,
    "t5-large": 88.33,
    "llama-7b": 100.32,  # WildGuard
    "llama-8b": 123.21,  # Llama Guard 3
}


def figure(method: str, data: str, metric: str) -> dict[str, float | None] | None:
    """Return the paper's number for a method on a data set as `mean` and `std` (`None` if not given), or `None`."""
    column = f"{data} {metric}"
    value = dict(zip(_COLUMNS, _ROWS.get(method, ()), strict=False)).get(column)
    return None if value is None else {"mean": value, "std": _STD.get(method) if column == _COLUMNS[0] else None}


def serving_ratio(system: str | None) -> float | None:
    """Return the paper's time of a system over that of the base model alone, or `None`."""
    return SERVING[system] / SERVING["base"] if system in SERVING else None
