"""A kind of one's own: its code goes with the head, and runs only where it is trusted."""

import sys

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm, make_prompts

from llama_probe import LlamaForProbedGeneration, ProbeConfig, ProbeError, ProbeModel
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
def folder(tmp_path, monkeypatch):
    """A saved head of a kind that is then forgotten, as in another process."""
    monkeypatch.setattr(registry, "_PROBE_TYPES", dict(registry._PROBE_TYPES))
    path = tmp_path / "top.py"
    path.write_text(CODE)
    import_kinds(path)
    torch.manual_seed(0)
    config = ProbeConfig(probe_type="top", hidden_size=HIDDEN, num_hidden_layers=LAYERS)
    ProbeModel(config).save_pretrained(tmp_path / "head")
    forget()
    return tmp_path / "head"


def forget():
    del registry._PROBE_TYPES["top"]
    for name in [name for name in sys.modules if name.startswith(("top_", "probe_kind_"))]:
        del sys.modules[name]


def test_the_code_lies_beside_the_head_and_is_not_run_unasked(folder):
    assert (folder / "probe_kind.py").read_text() == CODE
    with pytest.raises(ProbeError, match="trust_remote_code"):
        ProbeModel.from_pretrained(folder)
    assert "top" not in registry._PROBE_TYPES


def test_trusted_it_serves(folder):
    model = LlamaForProbedGeneration.from_causal_lm(make_lm())
    with pytest.raises(ProbeError, match="trust_remote_code"):
        model.load_probe(folder)
    model.load_probe(folder, trust_remote_code=True)
    ids = make_prompts()
    out = model.generate(ids, max_new_tokens=2)
    torch.testing.assert_close(out.probe_logits["head"], model.classify(ids)["head"].logits)
    assert model.classify(ids, output_attentions=True)["head"].token_weights is None


def test_another_head_in_the_folder_takes_the_code_away(folder):
    ProbeModel(ProbeConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS, downcast=4)).save_pretrained(folder)
    assert not (folder / "probe_kind.py").exists()


def test_a_file_that_registers_nothing(tmp_path):
    (tmp_path / "empty.py").write_text("")
    for path in (tmp_path / "empty.py", tmp_path / "gone.py"):
        with pytest.raises(ProbeError, match=path.name):
            import_kinds(path)
