"""The runtime that an exported repository carries: `modeling/`, of which `heads_llama_probe.py` is made of modules of `heads`.

`python -m llama_probe.serving.remote_code` writes that file anew.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..files import write_atomically


SUFFIX = "_llama_probe"
_IMPORT = re.compile(r"^(import|from) .*?(\([^)]*\))?\n", re.MULTILINE)
# Whole modules of `heads`, in the order of their imports.
_MODULES = (
    "device states aggregator low_rank pooling gate last attentive multimax mean_attention attention turns scope"
)
_HEADS = f"heads{SUFFIX}.py"
_HEADER = f'''"""Kinds of probe heads, and the tokens that they read: modules of the package, as they are but for their imports.

Written by `python -m llama_probe.serving.remote_code`. SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from .configuration{SUFFIX} import TURN_SCOPES, ProbeConfig, ProbeError, get_probe_type, register_probe_type
'''


def runtime_folder() -> Path:
    """Return `modeling/`: beside the package's modules, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path / "modeling" for path in (package, package.parents[1]) if (path / "modeling").is_dir())


def heads_file() -> str:
    """Return the text of `heads_llama_probe.py`: the modules with their imports of other packages in front."""
    folder, texts = Path(__file__).resolve().parents[1] / "heads", []
    imports: dict[str, set[str]] = {}  # names by module
    for name in _MODULES.split():
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        for module, names in re.findall(r"^from ([a-z][\w.]*) import ([\w, ]*)", text, re.MULTILINE):
            imports.setdefault(f"from {module} import ", set()).update(names.strip().split(", "))
        for line in re.findall(r"^import .*", text, re.MULTILINE):
            imports[line] = set()
        texts.append(f"# heads/{name}.py\n" + re.sub(r'"""\n{2,}', '"""\n\n', _IMPORT.sub("", text), count=1))
    header = _HEADER + "".join(f"{line}{', '.join(sorted(names))}\n" for line, names in sorted(imports.items()))
    return re.sub(r"\n{4,}", "\n\n\n", "\n\n".join([header, *texts]))


def runtime_files() -> dict[str, str]:
    """Return the texts of the runtime by file name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(runtime_folder().glob(f"*{SUFFIX}.py"))}


if __name__ == "__main__":
    write_atomically({runtime_folder() / _HEADS: heads_file()})
