"""Finished parts are whole."""

import pytest

from llama_probe import ProbeError
from llama_probe.experiments.reproduction.part_store import PartStore


def test_a_store_keeps_whole_parts(tmp_path):
    store = PartStore(tmp_path)
    assert store.find("a/b") is None and store.missing("a", ["b", "c"]) == {"b": "a/b", "c": "a/c"}
    store.write("a/b", {"x": 1}, 2.345, ["a/b"])
    with pytest.raises(TypeError):
        store.write("a/b", {"x": object()}, 0, [])
    assert store.find("a/b") == {"result": {"x": 1}, "seconds": 2.3, "together": ["a/b"]}
    assert store.missing("a", ["b", "c"]) == {"c": "a/c"}
    (tmp_path / "a" / "b.json").write_text("{")
    with pytest.raises(ProbeError, match=r"b\.json is damaged"):
        store.find("a/b")
