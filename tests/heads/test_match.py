"""What a head records of its backbone, compared with other backbones."""

import contextlib
import copy
import logging
import re

import pytest
import torch
from conftest import VOCAB, make_lm, read_head, save_head

from llama_probe import LlamaForProbedGeneration, ProbeConfig, ProbeError, ProbeModel
from llama_probe.backbone.fingerprint import fingerprint
from llama_probe.heads import match as matching
from llama_probe.heads.match import check_backbone, compare, describe


def described(lm) -> ProbeConfig:
    return describe(lm, ProbeConfig(probe_type="gate", base_model_name_or_path="org/tiny"))


def verdicts(config, lm) -> dict[str, str]:
    return {check.field: check.verdict for check in compare(config, lm)}


def rounded(lm, bits, settings):
    """A copy with rounded matrices, with one scale a row."""
    lm = copy.deepcopy(lm)
    for parameter in lm.parameters():
        if parameter.dim() == 2:
            scale = parameter.data.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            parameter.data = (parameter.data / scale).round() * scale
    lm.config.quantization_config = settings
    return lm


def fine_tuned(lm):
    lm = copy.deepcopy(lm).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
    ids = torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        lm(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm.eval()


def test_a_backbone_whose_states_are_not_finite_takes_no_new_head(lm):
    lm.model.layers[1].mlp.down_proj.weight.data *= 1e5
    described(lm)
    with pytest.raises(ProbeError, match="float16"):
        described(lm.half())


@pytest.mark.parametrize("copied", ["bfloat16", "float16", 4, 8])
def test_a_copy_in_another_precision_is_the_same_backbone(lm, copied):
    config = described(lm)
    if isinstance(copied, int):
        other = rounded(lm, copied, {"quant_method": "torchao", "quant_type": f"Int{copied}WeightOnlyConfig"})
    else:
        other = copy.deepcopy(lm).to(getattr(torch, copied))
    other.config._name_or_path = "/somewhere/tiny"
    assert fingerprint(other) != config.fingerprint and "differs" not in verdicts(config, other).values()
    check_backbone("head", config, other, strict=True)
    guesses = [check.guess for check in compare(config, other) if check.guess]
    assert guesses == ([f"a quantised copy (torchao-{copied}bit)"] if isinstance(copied, int) else [])
    assert not any(check.guess for check in compare(described(other), other)), "nothing is new"


def test_a_fine_tuned_copy_is_another_backbone(lm, tmp_path):
    config, other = described(lm), fine_tuned(lm)
    other.config._name_or_path = "org/tiny"
    assert verdicts(config, other)["fingerprint"] == "differs"
    with pytest.raises(ProbeError, match="'head' has a fingerprint"):
        check_backbone("head", config, other, strict=True)
    # a head keeps its record
    folder = save_head(ProbeModel(config), tmp_path / "head")
    for head in (read_head(folder, backbone=other), ProbeModel(config, backbone=other)):
        assert head.config.fingerprint == fingerprint(lm) != fingerprint(other)
    assert verdicts(config, other.to(torch.bfloat16))["fingerprint"] == "differs"


@pytest.mark.parametrize(
    "apart, quantization, guess",
    [
        (0.001, None, None),
        (0.2, None, "a quantised copy, or fine-tuned since"),
        (0.7, None, "fine-tuned since, or another model"),
        (0.2, 8, "a quantised copy (torchao-8bit), or fine-tuned since"),
        (1.2, 4, "another model"),
    ],
)
def test_a_distance_tells_a_quantised_copy_from_another_model(lm, monkeypatch, apart, quantization, guess):
    config = described(lm)
    monkeypatch.setattr(matching, "distance", lambda recorded, found: apart)
    if quantization:
        lm.config.quantization_config = {"quant_method": "torchao", "quant_type": f"Int{quantization}WeightOnlyConfig"}
    lm.config._name_or_path = "org/tiny"
    (check,) = [check for check in compare(config, lm) if check.field == "fingerprint"]
    assert check.guess == guess
    if check.verdict == "differs":
        with pytest.raises(ProbeError, match=rf"\({re.escape(guess)}\?\)"):
            check_backbone("head", config, lm, strict=True)
    is_another = guess == "another model"
    with pytest.raises(ProbeError, match="no bundled head") if is_another else contextlib.nullcontext():
        check_backbone("head", config, lm, alias="safety")


def test_all_that_differs_is_one_warning(lm, caplog):
    config = described(lm)
    other = make_lm(seed=1, vocab_size=VOCAB + 3)
    other.config._name_or_path = "org/other"
    with caplog.at_level(logging.WARNING):
        model = LlamaForProbedGeneration.from_causal_lm(other, {"a": ProbeModel(config)})
    assert model.active_probes == ["a"] and len(caplog.records) == 1
    with pytest.raises(ProbeError) as raised:
        check_backbone("a", config, other, strict=True)
    for text in (caplog.text, str(raised.value)):
        assert all(word in text for word in ("org/tiny", "org/other", "fingerprint", "vocab_size"))


def test_the_fingerprint_explains_another_commit_folder_and_padding_but_not_another_name(lm, tmp_path):
    config = described(lm).replace(base_model_revision="a" * 40)
    lm.config._commit_hash, lm.config._name_or_path = "b" * 40, str(tmp_path)
    lm.resize_token_embeddings(lm.config.vocab_size + 3)
    for name in ("base_model_revision", "base_model_name_or_path", "vocab_size"):
        assert verdicts(config, lm)[name] == "explained"
        assert verdicts(config.replace(fingerprint=None), lm)[name] == "differs"
    lm.config._name_or_path = "org/other"
    assert verdicts(config, lm)["base_model_name_or_path"] == "differs"
    lm.config._name_or_path = str(tmp_path / "Tiny-Q8_0.gguf")  # a copy of the model that it is named after
    assert verdicts(config, lm)["base_model_name_or_path"] == "same"
    lm.config._name_or_path, lm.config.base_model_name_or_path = "org/exported", "org/tiny"
    assert verdicts(config, lm)["base_model_name_or_path"] == "same"
    assert describe(lm, ProbeConfig(probe_type="gate")).base_model_name_or_path == "org/tiny"
