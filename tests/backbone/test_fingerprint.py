"""What a head knows of its backbone, and what it makes of another one."""

import copy
import logging

import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCAB, make_lm, make_probe, read_head, save_head
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from llama_probe import LlamaForProbedGeneration, ProbeConfig, ProbeError, ProbeModel
from llama_probe.backbone.fingerprint import check_backbone, compare, describe, distance, fingerprint, tolerance


def described(lm, **changes) -> ProbeConfig:
    return describe(lm, ProbeConfig(probe_type="gate", base_model_name_or_path="org/tiny", **changes))


def verdicts(config, lm, **kwargs) -> dict[str, str]:
    return {check.field: check.verdict for check in compare(config, lm, **kwargs)}


def rounded_to(lm, bits: int):
    """A copy with each row of its matrices rounded as symmetric integer quantisation does."""
    lm = copy.deepcopy(lm)
    for parameter in lm.parameters():
        if parameter.dim() == 2:
            scale = parameter.data.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            parameter.data = (parameter.data / scale).round() * scale
    return lm


def fine_tuned(lm, steps: int = 5, lr: float = 1e-3):
    """A copy that was trained on random text for a few steps."""
    lm = copy.deepcopy(lm).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr)
    ids = torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        lm(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm.eval()


def test_a_new_head_learns_its_backbone(lm):
    config = described(lm)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (HIDDEN, LAYERS, VOCAB)
    assert (config.base_model_type, config.base_model_class) == ("llama", "LlamaForCausalLM")
    assert (config.base_model_dtype, config.base_model_quantization) == ("float32", None)
    assert len(config.fingerprint) == 32 and config.base_model_name_or_path == "org/tiny"
    for head in (
        ProbeModel(ProbeConfig(probe_type="gate"), backbone=lm),
        LlamaForProbedGeneration.from_causal_lm(lm).add_probe("new", ProbeConfig(downcast=4)),
    ):
        assert head.config.fingerprint == config.fingerprint and head.config.base_model_class == "LlamaForCausalLM"


def test_a_backbone_that_gives_no_numbers_takes_no_new_head(lm):
    lm.model.layers[1].mlp.down_proj.weight.data *= 1e5
    described(lm)
    with pytest.raises(
        ProbeError, match=r"in float16, are no finite numbers, and no head can read them: .*bfloat16 hold more"
    ):
        described(lm.half())


def test_a_head_keeps_what_it_knows(lm, tmp_path):
    folder = save_head(ProbeModel(described(lm)), tmp_path / "head")
    other = fine_tuned(lm, steps=20)
    assert read_head(folder, backbone=other).config.fingerprint == fingerprint(lm) != fingerprint(other)
    assert ProbeModel(described(lm), backbone=other).config.fingerprint == fingerprint(lm)


def test_it_is_the_same_wherever_the_model_is_used(lm):
    found = fingerprint(lm)
    assert found == fingerprint(lm) == fingerprint(copy.deepcopy(lm).train())
    probed = LlamaForProbedGeneration.from_causal_lm(copy.deepcopy(lm), {"a": make_probe()})
    assert fingerprint(probed) == found
    assert all(not module.training for module in lm.modules())


def test_training_mode_survives(lm):
    lm.train()
    lm.model.norm.eval()
    fingerprint(lm)
    assert lm.training and lm.model.layers[0].training and not lm.model.norm.training


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.sampled_from([8, 16, 48]), st.integers(40, 300))
def test_models_of_every_size_have_one(layers, hidden, vocab):
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    one = fingerprint(LlamaForCausalLM(config))
    other = fingerprint(LlamaForCausalLM(config))
    assert len(one) == 32 and distance(one, one) == 0
    assert distance(one, other) > 0.4, "unrelated models are farther apart than any rounding explains"


@pytest.mark.parametrize("copied", ["bfloat16", "float16", "8bit"])
def test_a_copy_in_another_precision_is_the_same_backbone(lm, copied, caplog):
    config = described(lm)
    if copied == "8bit":
        other = rounded_to(lm, 8)
        other.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    else:
        other = copy.deepcopy(lm).to(getattr(torch, copied))
    other.config._name_or_path = "/somewhere/tiny"
    assert fingerprint(other) != config.fingerprint
    found = verdicts(config, other)
    assert found["fingerprint"] == "same" and "differs" not in found.values()
    check_backbone("head", config, other, strict=True)


def test_a_fine_tuned_copy_is_not(lm):
    config = described(lm)
    other = fine_tuned(lm)
    other.config._name_or_path = "org/tiny"
    assert verdicts(config, other)["fingerprint"] == "differs"
    with pytest.raises(ProbeError, match=r"head 'head' has a fingerprint [\d.]+% away .*fine-tuned"):
        check_backbone("head", config, other, strict=True)
    assert verdicts(config, other.to(torch.bfloat16))["fingerprint"] == "differs"


def test_all_that_differs_is_one_warning(lm, caplog):
    config = described(lm)
    other = fine_tuned(make_lm(vocab_size=VOCAB + 3))
    other.config._name_or_path = "org/other"
    with caplog.at_level(logging.WARNING):
        model = LlamaForProbedGeneration.from_causal_lm(other, {"a": ProbeModel(config)})
    assert model.active_probes == ["a"] and len(caplog.records) == 1
    assert "was trained on org/tiny, this backbone is org/other" in caplog.text
    with pytest.raises(
        ProbeError, match=r"was trained on org/tiny.*fingerprint|fingerprint.*was trained on org/tiny"
    ) as raised:
        check_backbone("a", config, other, strict=True)
    assert "vocab_size 97, here it is 100" in str(raised.value)


def test_the_fingerprint_vouches_for_a_new_commit(lm):
    config = described(lm).replace(base_model_revision="a" * 40)
    lm.config._commit_hash = "b" * 40
    assert verdicts(config, lm)["base_model_revision"] == "explained"
    assert verdicts(config.replace(fingerprint=None), lm)["base_model_revision"] == "differs"
    assert verdicts(config, lm, behaviour=False)["base_model_revision"] == "differs"


def test_the_fingerprint_vouches_for_a_copy_in_a_folder_but_not_for_another_name(lm, tmp_path):
    config = described(lm)
    lm.config._name_or_path = str(tmp_path)
    assert verdicts(config, lm)["base_model_name_or_path"] == "explained"
    assert verdicts(config.replace(fingerprint=None), lm)["base_model_name_or_path"] == "differs"
    lm.config._name_or_path = "org/other"
    assert verdicts(config, lm)["base_model_name_or_path"] == "differs"
    lm.config.base_model_name_or_path = "org/tiny"  # as an exported repository says
    assert verdicts(config, lm)["base_model_name_or_path"] == "same"


def test_sizes_are_fatal(lm):
    config = described(make_lm(num_hidden_layers=3))
    assert verdicts(config, lm)["num_hidden_layers"] == "differs"
    with pytest.raises(ProbeError, match="num_hidden_layers=3"):
        check_backbone("head", config, lm)


def test_tokens_added_to_the_vocabulary_leave_the_fingerprint(lm):
    config = described(lm)
    lm.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    found = verdicts(config, lm)
    assert found["vocab_size"] == "differs" and found["fingerprint"] == "same"


@pytest.mark.parametrize(
    "recorded, found, expected",
    [
        (("float32", None), ("float32", None), 0.003),
        (("float32", None), ("bfloat16", None), 0.02),
        (("bfloat16", None), ("float16", "bitsandbytes-8bit"), 0.06),
        (("bfloat16", None), ("float32", "gguf-q4_1"), 0.4),
        (("float32", "gguf-q4_1"), ("float32", "gguf-q4_1"), 0.003),
        ((None, None), ("float32", None), 0.02),
    ],
)
def test_what_rounding_explains(recorded, found, expected):
    assert tolerance(recorded, found) == tolerance(found, recorded) == expected


@pytest.mark.parametrize(
    "settings_, name",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-4bit"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_quantisation_is_recorded(lm, settings_, name):
    lm.config.quantization_config = settings_
    assert described(lm).base_model_quantization == name
