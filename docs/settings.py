"""The table of all settings in `recipes.md`, from the fields and the docstrings of the dataclasses of a recipe.

`python docs/settings.py` writes the table anew; a test compares it with the page.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llama_probe import ProbeConfig, ProbeTrainingArguments
from llama_probe.training.recipe import CardFacts, Recipe


PAGE = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- settings: written by docs/settings.py -->\n", "<!-- end of settings -->\n"
# Sections whose fields are those of a dataclass that other code uses as well.
_OF_OTHERS = {"head": ProbeConfig, "training": ProbeTrainingArguments}
# What a recipe takes for a field of the head that it leaves out.
_HEAD_DEFAULTS = {
    "probe_type": "by the number of rows",
    "dropout": "that of the head type",
    "layer_dropout": "that of the head type",
    "token_scope": "by the rows",
    "prompt_format": "`chat`",
    "max_length": "`512`",
}
_NOT_SHOWN = {
    Recipe: {"values"},
    CardFacts: {"command"},
    # Fields that follow from the labels and the backbone, and fields that a training or a measurement fills.
    ProbeConfig: {
        *("num_labels", "id2label", "problem_type", "flagged"),
        *("hidden_size", "num_hidden_layers", "vocab_size", "prefix_ids", "turn_markers", "chat_template_hash"),
        *("threshold", "thresholds", "temperature", "novelty", "fingerprint"),
        *("weights_sha256", "llama_probe_version", "transformers_version"),
        *(f"base_model_{name}" for name in ("name_or_path", "revision", "type", "class", "dtype", "quantization")),
    },
    # Settings of a machine, of logs, and of what the collator takes.
    ProbeTrainingArguments: {
        *("use_cpu", "log_on_each_node", "logging_strategy", "dataloader_pin_memory"),
        *("label_names", "remove_unused_columns"),
    },
}
_WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number", Any: "value", object: "value"}


def meanings(docstring: str) -> dict[str, str]:
    """Return what the section `Args` of a docstring says of each name."""
    section = re.search(r"\n    Args:\n(.*?)(?=\n    \S|\s*$)", docstring, re.DOTALL)[1]
    by_name = {}
    for entry in re.split(r"\n(?= {8}\S)", section):
        names, text = entry.strip().split(": ", 1)
        for name in names.split(", "):
            by_name[name] = " ".join(text.replace("\n            - ", " ").split())
    return by_name


def type_words(hint: Any) -> str:
    """Return the type of a field in words."""
    origin = get_origin(hint)
    parts = [part for part in get_args(hint) if part is not type(None)]
    if origin is Literal:
        return " or ".join(f"`{str(value).lower()}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(part) for part in parts if part is not int or float not in parts))
    if origin is list:
        return f"list of {type_words(parts[0])}"
    if origin is dict:
        return "fields" if parts[1] is Any else f"{type_words(parts[0])}: {type_words(parts[1])}"
    if is_dataclass(hint):
        return "source" if hint.__name__ == "Source" else "section"
    return _WORDS[hint]


def shown_fields(owner: type) -> Iterator[Field]:
    """Yield the fields of a dataclass that a recipe may set and this package defines."""
    for item in fields(owner):
        if item.name in owner.__annotations__ and item.name not in _NOT_SHOWN.get(owner, ()):
            yield item


def default_of(owner: type, item: Field) -> str:
    """Return the default of a field as YAML, or nothing if there is none."""
    if owner is ProbeConfig and item.name in _HEAD_DEFAULTS:
        return _HEAD_DEFAULTS[item.name]
    value = item.default
    if item.default_factory is not MISSING and not is_dataclass(item.default_factory):
        value = item.default_factory()
    if value in (None, MISSING, [], {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def lines_of(owner: type, prefix: str, listed: set[type]) -> Iterator[str]:
    """Yield a line of the table for each field of a section and of the sections inside; each dataclass once."""
    listed.add(owner)
    explained = meanings(owner.__doc__)
    hints = get_type_hints(owner)
    for item in shown_fields(owner):
        hint = hints[item.name]
        if owner is ProbeTrainingArguments and item.name not in explained:
            meaning = "as in `TrainingArguments`"
        else:
            meaning = explained[item.name]
        yield f"| `{prefix}{item.name}` | {type_words(hint)} | {default_of(owner, item)} | {meaning} |"
        candidates = [_OF_OTHERS.get(item.name) if owner is Recipe else None, hint, *get_args(hint)]
        section = next(filter(is_dataclass, candidates), None)
        if section is not None and section not in listed:
            number = ".0" if get_origin(hint) is list else ""
            yield from lines_of(section, f"{prefix}{item.name}{number}.", listed)


def table() -> str:
    """Return the table of all settings of a recipe."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|", *lines_of(Recipe, "", set())]
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """Return a page with the table in its place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
