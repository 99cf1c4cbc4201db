"""Heads and a backbone for the tests' own Hub."""

import tempfile
from pathlib import Path

import torch
from conftest import make_lm
from transformers import PreTrainedModel

from llama_probe import ProbeModel


def same_weights(one: ProbeModel, other: ProbeModel) -> bool:
    """Return True if two heads have bit-identical weights."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def plant_model(hub, repo_id: str, model: PreTrainedModel | ProbeModel, start: str = "", branch: str = "main") -> None:
    """Commit the files of a head or a backbone, with `start` before their names, to a repository that may be new."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "model"))
        files = {f"{start}{path.name}": path.read_bytes() for path in Path(folder, "model").iterdir()}
    hub.plant(repo_id, files, branch=branch)


def plain(hub) -> str:
    """A tiny backbone on the Hub."""
    if "org/tiny" not in hub.repositories:
        plant_model(hub, "org/tiny", make_lm())
    return "org/tiny"
