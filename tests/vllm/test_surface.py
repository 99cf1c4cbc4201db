"""The names of vLLM that heads depend on: the installed release has them, and a release that has changed is found out."""

import ast
import shutil
from pathlib import Path

import pytest
import vllm
from vllm.version import __version__

from llama_probe.compatibility import minor
from llama_probe.vllm import surface
from llama_probe.vllm.surface import SURFACE, missing_names


OURS = Path(surface.__file__).parent
ROOT = Path(vllm.__file__).parent
OVERRIDE = "v1/core/sched/scheduler.py", "def _update_request_with_output("


def imported_names() -> dict[str, str]:
    """By name of vLLM the file of ours that imports it."""
    found = {}
    for file in OURS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "vllm":
                found |= {alias.name: file.name for alias in node.names}
    return found


def test_installed_release_has_all_names():
    assert missing_names(ROOT, __version__) == []


def test_table_has_every_name_that_is_imported():
    """A module, and an instance that a class of the table makes, are imported by other names than those of the table."""
    listed = {name.place.partition(":")[2].split(".")[0] for name in SURFACE}
    modules = {name.place.partition(":")[0].split(".")[-1] for name in SURFACE}
    others = imported_names().keys() - listed - modules
    assert others == {"ModelRegistry"}


def test_every_row_can_fail(tmp_path):
    """Where vLLM has no sources, every name that it should have is missing."""
    due = [name for name in SURFACE if minor(name.first) <= minor(__version__) <= minor(name.last)]
    assert len(missing_names(tmp_path, __version__)) == len(due) > 100


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("_update_request_with_output(", "_settle_request(", "is missing"),
        (
            "request: Request, new_token_ids: list[int], is_stale",
            "request: Request, new_token_ids, step, is_stale",
            "step",
        ),
    ],
    ids=["renamed", "one more parameter"],
)
def test_changed_release_is_found_out(tmp_path, before, after, told):
    file, head = OVERRIDE
    for name in SURFACE:
        path = name.place.partition(":")[0].replace(".", "/")
        for source in (ROOT / f"{path}.py", ROOT / path / "__init__.py"):
            if source.is_file():
                (tmp_path / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, tmp_path / source.relative_to(ROOT))
    assert missing_names(tmp_path, __version__) == []
    text = (tmp_path / file).read_text()
    place = text.index(head)
    changed = text[place:].replace(before, after, 1)
    assert changed != text[place:]
    surface._body.cache_clear()
    (tmp_path / file).write_text(text[:place] + changed)
    (problem,) = missing_names(tmp_path, __version__)
    assert "_update_request_with_output" in problem and told in problem
