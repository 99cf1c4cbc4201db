"""A tiny random model of each family, and what a model that serves heads must give."""

import copy
import functools

import conftest
import torch
import transformers
from conftest import HIDDEN, make_probe
from transformers import AutoConfig

from llama_probe import AutoModelForProbedGeneration


LAYERS, VOCAB = 3, 96
IMAGE, VIDEO, START, END = 90, 91, 92, 93
TOLERANCE = {"atol": 1e-5, "rtol": 0}

SIZES = {**conftest.SIZES, "vocab_size": VOCAB, "num_hidden_layers": LAYERS, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 4}  # shorter than the prompts
ALTERNATING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {**ALTERNATING, "query_pre_attn_scalar": 8, "head_dim": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
PATCHES = {"image_size": 16, "patch_size": 4}
IMAGE_IDS = {"image_token_index": IMAGE, "image_token_id": IMAGE}
# fmt: off
QWEN_VISION = {
    "hidden_size": 16, "out_hidden_size": HIDDEN, "intermediate_size": 16, "depth": LAYERS, "num_heads": 2, "patch_size": 4,
}
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}
LLAMA4 = {
    "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 8,
    "head_dim": 8,
}

# One for each family of the table: its name, its class, and what its config has beside `SIZES`.
TINY = {
    "deepseek_v3": ("DeepSeek-V3", "DeepseekV3ForCausalLM", {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    }),
    "gemma": ("Gemma", "GemmaForCausalLM", {"head_dim": 8}),
    "gemma2": ("Gemma 2", "Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma 3", "Gemma3ForConditionalGeneration", {
        "text_config": {**SIZES, **GEMMA},
        "vision_config": {**VISION, **PATCHES},
        "mm_tokens_per_image": 4, **IMAGE_IDS,
    }),
    "gemma3_text": ("Gemma 3", "Gemma3ForCausalLM", GEMMA),
    "gpt2": ("GPT-2", "GPT2LMHeadModel", {"n_head": 4}),
    "gpt_neox": ("GPT-NeoX", "GPTNeoXForCausalLM", {}),
    "gpt_oss": ("GPT-OSS", "GptOssForCausalLM", {**EXPERTS, **ALTERNATING, "head_dim": 8}),
    "llama": ("Llama", "LlamaForCausalLM", {}),
    "llama4": ("Llama 4", "Llama4ForConditionalGeneration", {
        "text_config": {**SIZES, **LLAMA4},
        "vision_config": {
            **VISION, **PATCHES, "intermediate_size": 64,
            "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
        },
        **IMAGE_IDS,
    }),
    "llama4_text": ("Llama 4", "Llama4ForCausalLM", LLAMA4),
    "mistral": ("Mistral", "MistralForCausalLM", WINDOW),
    "mixtral": ("Mixtral", "MixtralForCausalLM", {**EXPERTS, **WINDOW}),
    "olmo": ("OLMo", "OlmoForCausalLM", {}),
    "olmo2": ("OLMo 2", "Olmo2ForCausalLM", {}),
    "phi3": ("Phi-3", "Phi3ForCausalLM", WINDOW),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen2_5_vl": ("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", {
        "text_config": {**SIZES, **MROPE},
        "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN_IDS,
    }),
    "qwen2_vl": ("Qwen2-VL", "Qwen2VLForConditionalGeneration", {
        "text_config": {**SIZES, **MROPE},
        "vision_config": {"embed_dim": 16, "hidden_size": HIDDEN, "depth": LAYERS, "num_heads": 2, "patch_size": 4},
        **QWEN_IDS,
    }),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3-MoE", "Qwen3MoeForCausalLM", {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0],
    }),
    "qwen3_vl": ("Qwen3-VL", "Qwen3VLForConditionalGeneration", {
        "text_config": {**SIZES, **MROPE, "head_dim": 8},
        "vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    }),
}
# fmt: on
WRAPPERS = tuple(name for name in TINY if "text_config" in TINY[name][2])


def make(model_type: str, class_name: str, changes: dict):
    config = AutoConfig.for_model(model_type, **(changes if "text_config" in changes else {**SIZES, **changes}))
    torch.manual_seed(0)
    lm = getattr(transformers, class_name)(config).eval()
    for parameter in lm.parameters():
        if not parameter.any():  # what Gemma 3 makes of images is zero at first
            parameter.data.normal_(std=0.2)
    return lm


@functools.cache
def _made(family: str):
    return make(family, *TINY[family][1:])


def tiny(family: str):
    """A fresh copy of the tiny model of a family."""
    return copy.deepcopy(_made(family))


def make_heads():
    sizes = {"num_hidden_layers": LAYERS}
    gate = make_probe(0, probe_type="gate", num_labels=2, **sizes)
    return {"gate": gate, "mha": make_probe(1, probe_type="mha", num_labels=3, **sizes)}


def padded_prompts():
    ids = torch.randint(3, IMAGE, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    ids[2, :1], mask[2, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def with_images(family: str):
    """Prompts with an image of four tokens in each row, and what the model takes for it."""
    inputs = padded_prompts()
    ids = inputs["input_ids"]
    ids[:, 4], ids[:, 5:9], ids[:, 9] = START, IMAGE, END
    generator = torch.Generator().manual_seed(2)
    if family.startswith("qwen"):  # 4 x 4 patches of two frames, merged by fours
        inputs["pixel_values"] = torch.randn(len(ids) * 16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(ids))
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    else:
        inputs["pixel_values"] = torch.randn(len(ids), 3, 16, 16, generator=generator)
        if family == "gemma3":
            inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def plain_pass(lm, inputs, new_tokens=4):
    """The tokens that the plain model writes, and the hidden states of its pass over the prompts."""
    fields = {"return_dict_in_generate": True, "output_hidden_states": True}
    out = lm.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **fields)
    return out.sequences, out.hidden_states[0]


def scores(states, mask):
    with torch.no_grad():
        return {name: head(hidden_states=states, attention_mask=mask).logits for name, head in make_heads().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, **TOLERANCE)


def assert_serves(lm, inputs, counted):
    """`lm`, converted, writes what the plain one writes, and its heads say what they say of the plain one's states."""
    tokens, states = plain_pass(lm, inputs)
    expected = scores(states, counted)
    model = AutoModelForProbedGeneration.from_causal_lm(lm, make_heads())
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(out.sequences, tokens)
    assert_same(out.probe_logits, expected)
    assert_same({name: output.logits for name, output in model.classify(**inputs).items()}, expected)
    return model
