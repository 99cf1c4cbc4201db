"""Digests of an LM's weights, and GGUF files; tests/cli/test_demo.py loads the demo backbone, which is one."""

import shutil

import gguf
import pytest
import torch
from conftest import LAYERS, SIZES, make_lm, make_probe
from peft import LoraConfig, get_peft_model
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_probe import ProbeError
from llama_probe.backbone.fingerprint import backbone_facts
from llama_probe.backbone.loading import load_backbone, load_causal_lm, weights_digest


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", None], ids=["pointer", "cut"])
def test_damaged_weights_are_refused_in_one_line(backbone_folder, tmp_path, content):
    shutil.copytree(backbone_folder, tmp_path / "lm")
    weights = tmp_path / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ProbeError, match=r"cannot be loaded: [^\n]*$"):
        load_backbone(str(tmp_path / "lm"))


def test_a_digest_tells_weights_apart():
    """Quantised ones as well, and adapters."""

    def digest(number=3, scale=0.5):
        lm = make_lm()
        packed = TwoTensor(torch.full((4, 4), float(number)), torch.full((4, 4), scale))  # as torchao's
        lm.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
        return weights_digest(lm)

    assert digest() == digest()
    assert len({digest(), digest(number=4), digest(scale=0.25)}) == 3
    digests = set()
    for place in (None, 1, -1):
        lm = make_lm().to(torch.bfloat16)
        if place is not None:
            lm.model.layers[1].mlp.up_proj.weight.data.view(-1)[place] += 1
        digests.add(weights_digest(lm))
    assert len(digests) == 3, "one edited value of a weight counts"
    adapted = get_peft_model(make_lm(), LoraConfig())
    adapted.add_adapter("two", LoraConfig())
    digests = {weights_digest(adapted)}
    adapted.set_adapter("two")
    digests.add(weights_digest(adapted))
    with adapted.disable_adapter():
        digests.add(weights_digest(adapted))
    assert len(digests) == 3, "what runs differs"


def write_gguf(path, lm):
    """Write the weights of the tiny model as llama.cpp does. Keys and queries are permuted there."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(lm.config.rms_norm_eps)
    writer.add_vocab_size(SIZES["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in lm.state_dict().items():
        for part, heads in (("q_proj", SIZES["num_attention_heads"]), ("k_proj", SIZES["num_key_value_heads"])):
            if part in name:
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("form", ["file", "folder"])
def test_gguf(tmp_path, backbone_folder, prompts, monkeypatch, form):
    write_gguf(tmp_path / "tiny-Q8_0.gguf", make_lm())
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, gguf_file: load(backbone_folder / gguf_file[:0]))
    lm, _ = load_backbone(str(tmp_path / "tiny-Q8_0.gguf" if form == "file" else tmp_path), device="cpu")
    torch.testing.assert_close(lm(prompts).logits, make_lm()(prompts).logits)
    assert load_causal_lm(tmp_path / "tiny-Q8_0.gguf").config.dequantized_from == "gguf-q8_0"
    facts = backbone_facts(lm)
    assert facts["base_model_quantization"] == "gguf-q8_0" and facts["base_model_dtype"] == "float32"
    assert facts["base_model_name_or_path"] == str(tmp_path / "tiny-Q8_0.gguf")
    lm.save_pretrained(tmp_path / "saved")
    make_probe().save_pretrained(tmp_path / "mood")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny-Q8_0.gguf", probe="mood")
    assert plain.active_probes == ["mood"], "an alias is looked up without a config.json"
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ProbeError, match=r"other\.gguf"):
        load_backbone(str(tmp_path))
