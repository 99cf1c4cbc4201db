"""Heads and a backbone for the tests' own Hub."""

import tempfile
from pathlib import Path

import torch
from conftest import make_lm

from llama_probe import ProbeModel


def same_weights(one: ProbeModel, other: ProbeModel) -> bool:
    """Return True if two heads have bit-identical weights."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def contents(probe: ProbeModel, folder) -> dict[str, bytes]:
    """The files of a head."""
    return {path.name: path.read_bytes() for path in probe.save_pretrained(folder).iterdir()}


def plain(hub) -> str:
    """A tiny backbone on the Hub."""
    if "org/tiny" not in hub.repositories:
        with tempfile.TemporaryDirectory() as folder:
            make_lm().save_pretrained(folder)
            hub.plant("org/tiny", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    return "org/tiny"
