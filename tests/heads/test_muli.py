"""MULI: log odds of the next token, from the LM's own output embeddings, in every way that a head is used."""

import copy
import pickle
import weakref

import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCAB, make_lm, make_probe, make_prompts, probed, read_head, save_head
from peft import LoraConfig, get_peft_model

from llama_probe import LlamaForProbedGeneration, ProbeConfig, ProbeError, ProbeModel
from llama_probe.heads.muli import token_log_odds


LM = make_lm()
STATES = [torch.randn(1, 3, HIDDEN)] * (LAYERS + 1)


def muli(seed=0, lm=LM, **changes):
    probe = make_probe(seed, probe_type="muli", vocab_size=VOCAB, **changes)
    if lm is not None:
        probe.bind(lm)
    return probe


def expected_of(probe, ids, mask=None, lm=LM):
    """From the LM's own logits at the last token of each row, one row at a time and in fp64."""
    rows = []
    for row in range(len(ids)):
        alone = ids[row : row + 1] if mask is None else ids[row : row + 1, mask[row].bool()]
        with torch.no_grad():
            p = lm(alone).logits[0, -1].double().softmax(-1)
        rows.append(probe.classifier.weight.double() @ (p.log() - (1 - p).log()) + probe.classifier.bias.double())
    return torch.stack(rows).float()


def test_log_odds_at_all_probabilities():
    p = torch.tensor([1e-30, 1e-8, 1e-3, 0.25, 0.499, 0.5, 0.501, 0.9, 1 - 1e-6], dtype=torch.float64)
    found = token_log_odds(p.log().float())
    torch.testing.assert_close(found.double(), p.log() - torch.log1p(-p), rtol=1e-4, atol=0.05)
    extreme = token_log_odds(torch.tensor([0.0, -500.0]))
    assert extreme.isfinite().all() and extreme[0] > 16 and extreme[1] == -500


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_generate_gives_what_the_lms_logits_say(padding):
    ids, mask = make_prompts(), torch.ones(3, 9, dtype=torch.long)
    if padding != "none":
        mask[0, :4], mask[2, :1] = 0, 0
    if padding == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    probe = muli(num_labels=3)
    expected = expected_of(probe, ids, mask)
    model = probed({"a": muli(num_labels=3, lm=None)})
    plain = make_lm().generate(ids, attention_mask=mask, max_new_tokens=3)
    for kwargs in ({}, {"prefill_chunk_size": 2}, {"num_beams": 2}, {"cache_implementation": "static"}):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, **kwargs)
        torch.testing.assert_close(out.probe_logits["a"], expected, atol=1e-4, rtol=1e-4)
        assert kwargs.get("num_beams") or torch.equal(out.sequences, plain)
    torch.testing.assert_close(model(ids, attention_mask=mask).probe_logits["a"], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.classify(ids, mask)["a"].logits, expected, atol=1e-4, rtol=1e-4)


def test_it_holds_a_weight_a_token_and_nothing_of_the_lm(tmp_path):
    probe = muli(num_labels=3)
    assert probe.num_parameters() == (VOCAB + 1) * 3
    assert set(probe.state_dict()) == {"classifier.weight", "classifier.bias"}
    fresh = ProbeModel(ProbeConfig(probe_type="muli"), backbone=make_lm())
    assert fresh.config.normalize == "none" and fresh.layer_indices == [LAYERS]
    assert not fresh.classifier.weight.any(), "an untrained head says nothing"
    back = read_head(save_head(probe, tmp_path / "a"), backbone=LM)
    ids = make_prompts()
    torch.testing.assert_close(back(input_ids=ids).logits, expected_of(probe, ids), atol=1e-4, rtol=1e-4)


def test_a_head_for_another_vocabulary_is_refused():
    with pytest.raises(ProbeError, match=r"120 next tokens.* 97"):
        probed({"a": muli(lm=None)}, vocab_size=120)


def test_without_an_lm_it_says_what_to_do():
    with pytest.raises(ProbeError, match="has no LM"):
        muli(lm=None)(hidden_states=STATES)
    with pytest.raises(ProbeError, match="vocab_size"):
        ProbeModel(ProbeConfig(probe_type="muli", hidden_size=HIDDEN, num_hidden_layers=LAYERS))


COPIES = [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


def attached(probe, seed=0):
    return probed({"a": probe}, seed=seed)


class TestWhichLM:
    """A head is bound to one LM, and follows what becomes of it."""

    def test_it_serves_no_two(self):
        ids, probe = make_prompts(), muli(lm=None)
        model, other = attached(probe), make_lm(1)
        expected = model.classify(ids)["a"].logits
        for bind in (
            lambda lm: LlamaForProbedGeneration.from_causal_lm(lm, {"a": probe}),
            probe.bind,
            probe.set_backbone,
        ):
            with pytest.raises(ProbeError, match="another LM"):
                bind(other)
        assert probe.backbone is None and all(parameter.requires_grad for parameter in other.parameters())
        second = attached(copy.deepcopy(probe), seed=1)
        found = second.classify(ids)["a"].logits
        torch.testing.assert_close(found, expected_of(probe, ids, lm=make_lm(1)), atol=1e-4, rtol=1e-4)
        assert torch.equal(model.classify(ids)["a"].logits, expected)

    def test_a_refused_attachment_binds_nothing(self):
        probe, other = muli(lm=None), make_lm(1)
        with pytest.raises(ProbeError, match="hidden_size=64"):
            LlamaForProbedGeneration.from_causal_lm(other, {"a": probe, "b": make_probe(hidden_size=64)})
        attached(probe)

    def test_it_is_free_once_it_is_taken_away(self):
        probe = muli(lm=None)
        model = attached(probe)
        model.add_probe("again", probe)
        model.delete_probe("a")
        with pytest.raises(ProbeError, match="another LM"):
            attached(probe, seed=1)
        model.delete_probe("again")
        attached(probe, seed=1)
        probe = ProbeModel(probe.config, backbone=make_lm(2))
        backbone = probe.backbone
        probe.set_backbone(None)
        attached(probe, seed=3)
        assert not hasattr(backbone, "probes")

    def test_what_is_around_an_lm_is_the_same_lm(self):
        lm = make_lm()
        probe = muli(lm=lm)
        around = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        probe.set_backbone(around)
        model = LlamaForProbedGeneration.from_causal_lm(lm, {"a": probe})
        probe.set_backbone(model)
        ids = make_prompts()
        expected = expected_of(probe, ids, lm=around)
        torch.testing.assert_close(model.classify(ids)["a"].logits, expected, atol=1e-4, rtol=1e-4)

    def test_an_adapter_on_its_output_embeddings(self):
        ids, probe = make_prompts(), muli(lm=None)
        model = attached(probe)
        before = model.classify(ids)["a"].logits
        around = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        expected = expected_of(probe, ids, lm=around)
        assert not torch.allclose(before, expected, atol=1e-2)
        found = model.generate(ids, max_new_tokens=1).probe_logits["a"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def test_another_vocabulary(self):
        model = attached(muli(lm=None))
        model.resize_token_embeddings(VOCAB + 3)
        with pytest.raises(ProbeError, match=r"100 next tokens.* 97"):
            model.generate(make_prompts(), max_new_tokens=1)

    @pytest.mark.parametrize("copied", COPIES)
    def test_a_copy_of_its_lm(self, copied):
        ids, model = make_prompts(), attached(muli(lm=None))
        expected = model.classify(ids)["a"].logits
        clone = copied(model)
        assert torch.equal(clone.classify(ids)["a"].logits, expected)
        clone.lm_head.weight.data.mul_(2)
        assert not torch.allclose(clone.classify(ids)["a"].logits, expected, atol=1e-2)
        assert torch.equal(model.classify(ids)["a"].logits, expected)

    @pytest.mark.parametrize("copied", COPIES)
    def test_alone_it_travels_without_its_lm(self, copied):
        probe = muli(lm=None)
        probe.set_backbone(make_lm())
        clone = copied(probe)
        assert len(pickle.dumps(probe)) < 10_000 and clone.backbone is None and probe.backbone is not None
        with pytest.raises(ProbeError, match="has no LM"):
            clone(hidden_states=STATES)
        clone.bind(probe.backbone)
        ids = make_prompts()
        states = probe.backbone(ids, output_hidden_states=True).hidden_states
        assert torch.equal(clone(hidden_states=states).logits, probe(input_ids=ids).logits)

    def test_it_keeps_no_more_of_it_than_it_needs(self):
        probe = muli(lm=None)
        model = attached(probe)
        gone = weakref.ref(model)
        del model
        assert gone() is None, "and no reference cycle keeps it"
        assert probe(hidden_states=STATES).logits.shape == (1, 2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"problem_type": "regression", "num_labels": 1}, "problem_type"),
        ({"normalize": "rms"}, "normalize='rms'"),
        ({"layers": [1, 4]}, "layers="),
        ({"layers": [3], "num_hidden_layers": 4}, "layers="),
        ({"options": {"l1": 0}}, r"options\['l1'\]=0"),
        ({"options": {"l2": 1}}, "knows"),
    ],
)
def test_configs_that_cannot_be(changes, words):
    with pytest.raises(ProbeError, match=words):
        ProbeConfig(probe_type="muli", **changes)
    assert ProbeConfig(probe_type="muli", layers=[4], num_hidden_layers=4).layer_indices == [4]
