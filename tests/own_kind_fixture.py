"""A saved head of a kind that is not the package's, as a fixture for all tests."""

import sys

import pytest
import torch

from llama_probe import ProbeConfig, ProbeModel
from llama_probe.heads import import_kinds, registry


CODE = """
import torch
from llama_probe.heads import Aggregator, Classifier, masked_max, register_probe_type


@register_probe_type("top")
class Top(Aggregator):
    @classmethod
    def create_classifier(cls, config):
        return Classifier(2 * config.hidden_size, config.num_labels)

    def update(self, state, x, mask, slots):
        top = masked_max(x, mask)
        return top if state is None else torch.maximum(state, top)

    def result(self, state, slots):
        return state if self.num_slots > 1 else torch.cat([state, -state], dim=-1)
"""


@pytest.fixture
def own_kind(tmp_path, monkeypatch):
    """A saved head of a kind that is then forgotten, as in another process."""
    monkeypatch.setattr(registry, "_PROBE_TYPES", dict(registry._PROBE_TYPES))
    path = tmp_path / "top.py"
    path.write_text(CODE)
    import_kinds(path)
    torch.manual_seed(0)
    config = ProbeConfig(probe_type="top", hidden_size=32, num_hidden_layers=4)
    ProbeModel(config).save_pretrained(tmp_path / "head")
    forget()
    yield tmp_path / "head"
    forget()  # the test may have loaded it, and the next one imports it anew


def forget():
    registry._PROBE_TYPES.pop("top", None)
    for name in [name for name in sys.modules if name.startswith(("top_", "probe_kind_"))]:
        del sys.modules[name]
