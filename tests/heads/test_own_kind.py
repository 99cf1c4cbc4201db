"""A kind of one's own: its code goes with the head, and runs only where it is trusted."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, OWN_KIND, expected_logits, make_prompts, probed

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.heads import Aggregator, probe_types, register_probe_type


def test_the_code_lies_beside_the_head_and_is_not_run_unasked(own_kind):
    assert (own_kind / "probe_kind.py").read_text() == OWN_KIND
    with pytest.raises(ProbeError, match="trust_remote_code"):
        ProbeModel.from_pretrained(own_kind)
    assert "top" not in probe_types()


def test_trusted_it_serves(own_kind):
    model = probed()
    with pytest.raises(ProbeError, match="trust_remote_code"):
        model.load_probe(own_kind)
    model.load_probe(own_kind, trust_remote_code=True)
    ids = make_prompts()
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    expected = expected_logits(model.probes["head"], ids, mask)
    for kwargs in ({}, {"prefill_chunk_size": 2}):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=2, **kwargs)
        torch.testing.assert_close(out.probe_logits["head"], expected, atol=1e-5, rtol=0)
    assert model.classify(ids, output_attentions=True)["head"].token_weights is None


def test_another_head_in_the_folder_takes_the_code_away(own_kind):
    ProbeModel(ProbeConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS, downcast=4)).save_pretrained(own_kind)
    assert not (own_kind / "probe_kind.py").exists()


def test_the_code_is_that_which_was_imported(own_kind, tmp_path):
    head = ProbeModel.from_pretrained(own_kind, trust_remote_code=True)
    (own_kind / "probe_kind.py").write_text("changed")
    assert (head.save_pretrained(tmp_path / "again") / "probe_kind.py").read_text() == OWN_KIND
    (own_kind / "probe_kind.py").unlink()
    assert (head.save_pretrained(tmp_path / "more") / "probe_kind.py").read_text() == OWN_KIND


def test_two_kinds_of_one_name_are_refused(own_kind, tmp_path, caplog):
    other = ProbeModel.from_pretrained(own_kind, trust_remote_code=True).save_pretrained(tmp_path / "other")
    (other / "probe_kind.py").write_text(OWN_KIND.replace("masked_max(x, mask)", "masked_max(-x, mask)"))
    with pytest.raises(ProbeError, match="other code"):
        ProbeModel.from_pretrained(other, trust_remote_code=True)
    assert ProbeModel.from_pretrained(other) and "other code" in caplog.text, "the user's own, which was changed since"


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'mha' is taken by AttentionAggregator"):
        register_probe_type("mha")(type("Other", (Aggregator,), {}))
