"""Finished parts are whole, and known by their settings."""

import pytest

from llama_probe import ProbeError
from llama_probe.experiments.reproduction.part_store import PartStore


def test_a_store_keeps_whole_parts(tmp_path):
    store = PartStore(tmp_path)
    assert store.find("a/b", {}) is None
    store.write("a/b", {"seeds": (0, 1)}, {"x": 1}, 2.345, ["a/b"])
    assert store.find("a/b", {"seeds": [0, 1]}).result == {"x": 1}
    with pytest.raises(TypeError):
        store.write("a/b", {}, {"x": object()}, 0, [])
    assert store.find("a/b", {"seeds": [0, 1]}).seconds == 2.3
    with pytest.raises(ProbeError, match=r"seeds=\[0, 1\] \(now \[0\]\)"):
        store.find("a/b", {"seeds": [0]})
