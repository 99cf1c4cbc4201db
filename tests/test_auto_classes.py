"""`import llama_probe` changes the auto classes of transformers, before or after they are imported, and costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llama_probe


CHANGED = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY
classes = (AutoModel, AutoModelForCausalLM, AutoConfig, AutoTokenizer)
changed = [each.from_pretrained.__code__.co_filename.endswith("auto_classes.py") for each in classes]
assert changed == [True, True, False, False]
assert "probed-text-generation" in PIPELINE_REGISTRY.get_supported_tasks()
"""


def test_transformers_may_be_imported_first():
    """As conftest.py does."""
    imported = list(sys.modules)
    assert imported.index("transformers.pipelines") < imported.index("llama_probe")
    exec(CHANGED, {})


@pytest.mark.slow
def test_this_package_may_be_imported_first_and_imports_little_before_a_command_is_known_and_allowed():
    """In one process, since what is imported stays."""
    code = """
import llama_probe, shlex, sys
assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)
from llama_probe.cli import main
assert 'torch' not in sys.modules
heavy = {'transformers.modeling_utils', 'datasets', 'sklearn', 'scipy', 'matplotlib'}
for number, line in enumerate(sys.stdin):
    sys.argv = shlex.split(line)
    try: main()
    except SystemExit: print((heavy | {'torch'} if number < 3 else heavy) & set(sys.modules), file=sys.stderr)
assert llama_probe.ProbeConfig and llama_probe.__version__"""
    ends = ["--help", "--version", "trian"]
    refused = ["train --train=x --output=x --probe-type=x", "classify x --probe=x"]
    refused += ["calibrate --benign=x --probe=x", "plot x --output=x", "export x --probe=x"]
    lines = "\n".join(f"llama-probe {line}" for line in ends + refused)
    done = subprocess.run([sys.executable, "-c", code + CHANGED], input=lines, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("set()\n") == 8, done.stderr
    assert done.stderr.count("llama-probe: ") == 6


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
