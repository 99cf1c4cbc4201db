"""Writes `modeling/heads_llama_probe.py`, which is made of modules of `heads`: `make runtime`."""

import re

from repository import ROOT

from llama_probe.files import write_atomically


_IMPORT = re.compile(r"^(import|from) .*?(\([^)]*\))?\n", re.MULTILINE)
# Whole modules of `heads`, in the order of their imports.
_MODULES = "aggregator low_rank pooling gate last multimax mean_attention attention turns scope segments"
HEADS_FILE = ROOT / "modeling" / "heads_llama_probe.py"
_HEADER = '''"""Head types, and the tokens that they read: modules of the package, without their imports.

Written by `make runtime`. SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from .configuration_llama_probe import TURN_SCOPES, ProbeConfig, ProbeError, get_probe_type, register_probe_type
'''


def heads_file() -> str:
    """Return the text of `heads_llama_probe.py`: the modules with their imports of other packages in front."""
    folder, texts = ROOT / "src" / "llama_probe" / "heads", []
    imports: dict[str, set[str]] = {}  # names by module
    for name in _MODULES.split():
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        for module, names in re.findall(r"^from ([a-z][\w.]*) import ([\w, ]*)", text, re.MULTILINE):
            imports.setdefault(f"from {module} import ", set()).update(names.strip().split(", "))
        for line in re.findall(r"^import .*", text, re.MULTILINE):
            imports[line] = set()
        texts.append(re.sub(r'"""\n{2,}', '"""\n\n', _IMPORT.sub("", text), count=1))
    header = _HEADER + "".join(f"{line}{', '.join(sorted(names))}\n" for line, names in sorted(imports.items()))
    return "\n\n".join([header, *texts])


if __name__ == "__main__":
    write_atomically(HEADS_FILE, heads_file())
