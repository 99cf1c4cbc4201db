"""The table of training arguments in `recipes.md`, from the fields and the docstring of `ProbeTrainingArguments`.

`python docs/settings.py` writes it anew; a test compares it with the page.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

from llama_probe import ProbeTrainingArguments


PAGE = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- settings: written by docs/settings.py -->\n", "<!-- end of settings -->\n"
# Settings of a machine, of logs, and of what the collator takes.
_NOT_SHOWN = {
    "use_cpu",
    "log_on_each_node",
    "logging_strategy",
    "dataloader_pin_memory",
    "label_names",
    "remove_unused_columns",
}


def meanings(docstring: str) -> dict[str, str]:
    """Return what the section `Args` of a docstring says of each name."""
    section = re.search(r"\n    Args:\n(.*?)\n\n", docstring, re.DOTALL)[1]
    entries = re.split(r"\n(?= {8}\S)", section)
    by_name = {}
    for entry in entries:
        names, text = entry.strip().split(": ", 1)
        for name in names.split(", "):
            by_name[name] = " ".join(text.split())
    return by_name


def table() -> str:
    """Return the table of the arguments that `ProbeTrainingArguments` adds to those of the Trainer, or sets otherwise."""
    explained = meanings(ProbeTrainingArguments.__doc__)
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for item in fields(ProbeTrainingArguments):
        if item.name not in ProbeTrainingArguments.__annotations__ or item.name in _NOT_SHOWN:
            continue
        default = "" if item.default in (None, MISSING) else f"`{item.default}`"
        lines.append(f"| `{item.name}` | {default} | {explained.get(item.name, 'as in `TrainingArguments`')} |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """Return a page with the table in its place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
