"""`import llama_probe` changes the auto classes of transformers, before or after they are imported, and costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llama_probe


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


CHANGED = "print(*(c.from_pretrained.__code__.co_filename[-15:] for c in (AutoModel, AutoConfig, AutoTokenizer)))"


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_imports_does_not_matter(order):
    imports = ["from transformers import AutoConfig, AutoModel, AutoTokenizer", "import llama_probe"][::order]
    lines = [*imports, CHANGED, "from transformers import pipeline"]
    tasks = "from transformers.pipelines import PIPELINE_REGISTRY as r; print('probed-text-generation' in r.supported_tasks)"
    assert run("\n".join([*lines, tasks])) == "auto_classes.py auto_classes.py auto_classes.py\nTrue\n"


def test_the_import_takes_neither_torch_nor_transformers():
    code = "import sys, llama_probe; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert run(code) == "set()\n"


def test_every_public_name_is_there():
    assert set(llama_probe.__all__) <= set(dir(llama_probe))
    assert all(getattr(llama_probe, name) is not None for name in llama_probe.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'ProbeHeads'"):
        llama_probe.ProbeHeads  # noqa: B018


def test_what_reads_the_package_without_importing_it_finds_every_public_name():
    """Editors, type checkers and the site follow these imports, which never run."""
    tree = ast.parse(Path(llama_probe.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    modules = {line.names[0].asname: line.module for line in block.body}
    assert modules == llama_probe._MODULES
