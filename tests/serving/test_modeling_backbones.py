"""Backbones in other states: half precision, quantised, with PEFT, offloaded."""

import copy

import pytest
import torch
from cases import HEAD_TYPES
from conftest import LAYERS, expected_logits, make_lm, make_probe, make_tokenizer, padded, probed
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError
from llama_probe.backbone.loading import weights_digest


HEADS = {name: make_probe(seed, **form) for seed, (name, form) in enumerate(HEAD_TYPES.items())}
HEADS |= {"max": make_probe(5, probe_type="pooling", pool="max"), "follows": make_probe(6, token_scope="all")}


def check_all_heads(model, prompts):
    """Every way to a score gives that of the states which the same model returns by `output_hidden_states`."""
    mask = padded(prompts)
    # as generate() counts positions: others are rounded otherwise in half precision
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    call = {"attention_mask": mask, "max_new_tokens": 4, "eos_token_id": None}
    with torch.no_grad():
        plain = model(prompts, **inputs, output_hidden_states=True, probes=[])
        passed = model(prompts, **inputs)
        generated = model.generate(prompts, **call, probe_state=True)
        classified = {name: output.logits for name, output in model.classify(prompts, **inputs).items()}
        assert torch.equal(passed.logits, plain.logits)
        assert torch.equal(generated.sequences, model.generate(prompts, **call, probes=[]))
        for found in (passed.probe_logits, generated.probe_logits, classified):
            assert list(found) == list(HEADS)
            for name, head in model.probes.items():
                expected = head(hidden_states=plain.hidden_states, attention_mask=mask).logits
                assert found[name].dtype == torch.float32
                torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
    assert generated.probe_token_logits["follows"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbones_keep_fp32_heads(dtype, prompts):
    model = LlamaForProbedGeneration.from_causal_lm(make_lm().to(dtype), HEADS)
    before = {name: tensor.clone() for name, tensor in model.probes.state_dict().items()}
    check_all_heads(model, prompts)
    model.to(torch.bfloat16 if dtype == torch.float16 else torch.float16)
    for name, tensor in model.probes.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_backbones(dtype, prompts, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    make_lm().save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=dtype, probe=HEADS)
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter, "quantised"
    check_all_heads(model, prompts)


def test_lora_around_and_inside(prompts, tmp_path):
    torch.manual_seed(3)
    model = probed(copy.deepcopy(HEADS))
    before = {name: tensor.clone() for name, tensor in model.probes.state_dict().items()}
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    around = get_peft_model(model, lora).train()
    around(input_ids=prompts, labels=prompts).loss.backward()
    assert any(parameter.grad is not None for parameter in around.parameters())
    check_all_heads(around.eval().get_base_model(), prompts)
    out = around.generate(input_ids=prompts, max_new_tokens=2)
    assert not torch.allclose(out.probe_logits["gate"], expected_logits(HEADS["gate"], prompts)), "LoRA acts"
    for name in HEADS:
        saved = load_file(model.save_probe(tmp_path / name, name) / "probe_model.safetensors")
        assert all(torch.equal(tensor, before[f"{name}.{key}"]) for key, tensor in saved.items())
    adapted = get_peft_model(make_lm(), lora)
    inside = AutoModelForProbedGeneration.from_causal_lm(adapted, {"a": make_probe()})
    assert type(inside) is LlamaForProbedGeneration
    expected = expected_logits(inside.probes["a"], prompts, lm=adapted)
    for lm in (inside, adapted):
        torch.testing.assert_close(lm.generate(input_ids=prompts, max_new_tokens=2).probe_logits["a"], expected)


@torch.no_grad()
def test_virtual_tokens_before_the_prompt(prompts):
    """PEFT's prompt tuning runs the LM over embeddings, of which the prompt's are not the first: only a mask can tell."""
    model = probed({"a": make_probe()})
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ProbeError, match=r"does not run the LM over the prompt as it was given.*PEFT's prompt tuning"):
        tuned.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=2)
    mask = torch.cat([torch.zeros(3, 4), torch.ones_like(prompts)], dim=1)
    out = tuned(input_ids=prompts, probe_mask=mask, output_hidden_states=True)
    expected = model.probes["a"](hidden_states=out.hidden_states, attention_mask=mask).logits
    torch.testing.assert_close(out.probe_logits["a"], expected)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers(prompts, tmp_path, place):
    """accelerate rebuilds the outputs, which know their labels all the same."""
    plain = probed(copy.deepcopy(HEADS))
    expected = plain(prompts, use_cache=True)
    make_lm().save_pretrained(tmp_path / "lm")
    # with one device only for all, accelerate puts no hook around the whole
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "model.norm": "disk"}
    device_map |= {f"model.layers.{i}": place if i else "disk" for i in range(LAYERS)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "lm", device_map=device_map, offload_folder=tmp_path / "offload", probe=copy.deepcopy(HEADS)
    )
    out = model(prompts, use_cache=True)
    assert "_hf_hook" in model.__dict__ and out.probe_labels == expected.probe_labels
    torch.testing.assert_close(out.probe_probabilities, expected.probe_probabilities)
    longer = torch.cat([prompts, prompts], dim=1)
    going_on = {"cache": out.cache, "probe_state": out.probe_state}
    turn = model(prompts, attention_mask=torch.ones_like(longer), **going_on)
    assert turn.probe_labels == plain(longer).probe_labels
    assert list(out.keys()) == list(expected.keys())
    check_all_heads(model, prompts)
    assert weights_digest(model) == weights_digest(plain), "heads that train on either share cached states"


def test_a_model_that_is_offloaded_as_a_whole(prompts, tmp_path):
    """Its own device is "meta" then, to which nothing can be moved."""
    make_lm(vocab_size=260).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload", probe=make_probe()
    )
    halted = {"halt_on": lambda outputs: [True], "halt_reply": [5, 6], "max_new_tokens": 2}
    found, expected = [], []
    for lm, results in ((model, found), (probed(make_probe(), vocab_size=260), expected)):
        results.append(lm.classify(["Hi", "Hello"], tokenizer=make_tokenizer())["probe"].logits)
        results.append(lm.generate(prompts[:1], **halted).sequences)
    torch.testing.assert_close(found, expected)
