"""Families of models: the table, the search by structure, wrappers that read images, and what is refused."""

import copy
import pickle

import pytest
import torch
import transformers
from conftest import make_lm, make_probe, save_head
from tiny_families import (
    HIDDEN,
    IMAGE,
    LAYERS,
    TINY,
    TOLERANCE,
    VOCAB,
    WRAPPERS,
    assert_same,
    assert_serves,
    make,
    make_heads,
    padded_prompts,
    plain_pass,
    scores,
    tiny,
    with_images,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llama_probe import AutoModelForProbedGeneration, ProbeConfig, ProbeError, ProbeModel, register_family
from llama_probe.backbone import families, passes
from llama_probe.backbone.capture import capturing, check_states, collect_hidden_states
from llama_probe.backbone.decoder import find_decoder
from llama_probe.backbone.families import FAMILIES
from llama_probe.backbone.fingerprint import fingerprint
from llama_probe.data.disk_states import DiskStates
from llama_probe.data.prompts import PromptDataset
from llama_probe.heads.match import compare


@pytest.fixture(autouse=True)
def _whole_llama4(monkeypatch):
    # In transformers 5.24 the forward of Llama4ForConditionalGeneration asks the output of its own language model for a
    # field that this has not, and raises in every call; with the field it runs.
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_sees_the_states_of_the_plain_model(family):
    """Captured, while it generates, in `classify`, in training: positions and windows count from the first token of text."""
    lm, inputs = tiny(family), padded_prompts()
    mask, decoder = inputs["attention_mask"], find_decoder(lm)
    assert decoder.origin == "table" and decoder.embeddings is lm.get_input_embeddings()
    states = {}
    with torch.no_grad(), capturing(decoder, states.__setitem__, range(LAYERS + 1)):
        expected = lm(**inputs, output_hidden_states=True).hidden_states
    assert len(expected) == len(states) == LAYERS + 1
    assert all(torch.equal(states[layer], hidden) for layer, hidden in enumerate(expected))
    # The model without its LM head has the same states.
    assert find_decoder(lm.base_model).origin == "table"
    found, whole = (collect_hidden_states(model, range(LAYERS + 1), **inputs) for model in (lm.base_model, lm))
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    head = make_heads()["gate"]
    head.set_backbone(lm)
    with torch.no_grad():
        trained = head(**inputs).logits
    model = assert_serves(lm, inputs, mask)
    torch.testing.assert_close(trained, model.classify(**inputs)["gate"].logits, **TOLERANCE)
    stem = TINY[family][1].partition("For")[0].removesuffix("LMHeadModel")
    assert type(model).__name__ == f"{stem}ForProbed{'Conditional' if family in WRAPPERS else ''}Generation"


def test_models_and_outputs_pickle(tmp_path):
    inputs = padded_prompts()
    model = AutoModelForProbedGeneration.from_causal_lm(tiny("mixtral"), make_heads())
    model.set_active_probes("mha")
    with torch.no_grad():
        outputs = [model(**inputs), model.generate(**inputs, max_new_tokens=2)]
        torch.save(model, tmp_path / "model.pt")
        saved = torch.load(tmp_path / "model.pt", weights_only=False)
        for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), saved):
            assert type(copied) is type(model) and copied.active_probes == ["mha"]
            assert torch.equal(copied(**inputs).probe_logits["mha"], outputs[0].probe_logits["mha"])
    for output in outputs:
        for copied in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
            assert type(copied) is type(output) and copied.keys() == output.keys()
            assert copied.probe_labels == output.probe_labels
    model.__class__ = type("Derived", (type(model),), {})
    assert type(copy.deepcopy(model)) is type(model), "a class derived from a probed one stays what it is"


def assert_a_shared_start_runs_once(lm, folder, monkeypatch):
    """The states that are kept for training are those of each prompt by itself, whatever the prompts begin with."""
    monkeypatch.setattr(passes, "_PASS_COST", 0)  # else so short a start is not worth a pass
    start = [5, 6, 7, 8, 9, 10]  # longer than the windows
    prompts = [start + torch.randint(3, IMAGE, (n,)).tolist() for n in (4, 9, 1)]
    assert passes.shared_start(prompts, [len(start)] * 3) == start
    config = make_probe(probe_type="gate", token_scope="content", prefix_ids=start, num_hidden_layers=LAYERS).config
    monkeypatch.setattr(passes, "BATCH_TOKENS", 20)
    kept = DiskStates(folder, torch.float32).dataset(lm, config, PromptDataset(prompts))
    for row, ids in enumerate(prompts):
        states = torch.stack(collect_hidden_states(lm, range(LAYERS + 1), torch.tensor([ids])))[:, 0]
        torch.testing.assert_close(kept[row]["hidden_states"], states[:, len(start) :], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_start_runs_once(family, tmp_path, monkeypatch):
    assert_a_shared_start_runs_once(tiny(family), tmp_path, monkeypatch)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama4", "mixtral", "qwen2_vl"])
def test_a_folder_loads_with_heads(family, tmp_path):
    lm, inputs = tiny(family), padded_prompts()
    lm.save_pretrained(tmp_path / "lm")
    head = save_head(make_heads()["gate"], tmp_path / "head")
    tokens, states = plain_pass(lm, inputs, new_tokens=2)
    expected = {"gate": scores(states, inputs["attention_mask"])["gate"]}
    for auto_class in (AutoModelForCausalLM, AutoModelForProbedGeneration):
        model = auto_class.from_pretrained(tmp_path / "lm", probe={"gate": head})
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.equal(out.sequences, tokens)
        assert_same(out.probe_logits, expected)
    model.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    # of Llama 4 the auto class for causal LMs loads the language model alone
    assert again.architectures == ["Llama4ForCausalLM" if family == "llama4" else TINY[family][1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_learns_its_backbone(family):
    lm = tiny(family)
    config = AutoModelForProbedGeneration.from_causal_lm(lm).add_probe("new", ProbeConfig(probe_type="gate")).config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (HIDDEN, LAYERS, VOCAB)
    assert (config.base_model_type, config.base_model_class) == (family, TINY[family][1])
    assert config.fingerprint == fingerprint(tiny(family))
    assert "differs" not in {check.verdict for check in compare(config, tiny(family))}


def test_the_table_is_tested():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("family", WRAPPERS)
def test_heads_read_the_text_around_an_image_or_what_a_mask_counts(family):
    inputs, lm = with_images(family), tiny(family)
    attended, is_image = inputs["attention_mask"].bool(), inputs["input_ids"] == IMAGE
    counted = attended & ~is_image
    _, states = plain_pass(lm, inputs)
    _, blank = plain_pass(lm, {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})
    model = assert_serves(lm, inputs, counted)
    # what is in the image reaches the heads all the same
    logits = model.classify(**inputs)["gate"].logits
    assert (logits - scores(blank, counted)["gate"]).abs().max() > 1e-4
    out = model.generate(**inputs, probe_mask=attended, max_new_tokens=1)
    assert_same(out.probe_logits, scores(states, attended))
    with pytest.raises(ProbeError, match="hold no token that a head reads"):
        model.generate(**{**inputs, "attention_mask": is_image.long()}, max_new_tokens=1)


UNKNOWN = {
    "bloom": ("BloomForCausalLM", {"n_head": 4}),
    "falcon": ("FalconForCausalLM", {}),
    "falcon_h1": ("FalconH1ForCausalLM", {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8,
    }),
    "gemma4_text": ("Gemma4ForCausalLM", {
        "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1,
    }),
    "gpt_neo": ("GPTNeoForCausalLM", {
        "attention_types": [[["global", "local", "global"], 1]], "window_size": 4, "num_heads": 4,
    }),
    "opt": ("OPTForCausalLM", {"word_embed_proj_dim": HIDDEN, "ffn_dim": 48}),
    "jamba": ("JambaForCausalLM", {
        "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    }),
}  # fmt: skip


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(families, "_REGISTERED", {})
    monkeypatch.setattr(families, "_FOUND", {})


class TestUnknownFamilies:
    @pytest.mark.parametrize("model_type", UNKNOWN)
    def test_are_found_by_their_structure(self, model_type, tmp_path, monkeypatch):
        lm = make(model_type, *UNKNOWN[model_type])
        assert find_decoder(lm).origin == "search" and find_decoder(lm).embeddings is lm.get_input_embeddings()
        assert_a_shared_start_runs_once(lm, tmp_path, monkeypatch)
        inputs = padded_prompts()
        if model_type == "jamba":  # it does not support padding
            inputs = {name: tensor[1:2] for name, tensor in inputs.items()}
        assert_serves(lm, inputs, inputs["attention_mask"])

    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
    def test_a_decoder_that_leaves_tokens_out(self, kwargs):
        """From its shared layers on Gemma 4 runs over the last tokens alone, unless heads read the others."""
        lm = make("gemma4_text", *UNKNOWN["gemma4_text"])
        ids = padded_prompts()["input_ids"][1:2].repeat(1, 2)
        call = {"max_new_tokens": 4, "do_sample": False, **kwargs}
        tokens, logits = lm.generate(ids, **call), lm(ids, logits_to_keep=2).logits
        model = AutoModelForProbedGeneration.from_causal_lm(lm, make_heads())
        out, passed = model.generate(ids, **call), model(ids, logits_to_keep=2)
        assert torch.equal(out.sequences, tokens)
        torch.testing.assert_close(passed.logits, logits)
        for found in (out, passed):
            assert_same(found.probe_logits, {name: output.logits for name, output in model.classify(ids).items()})

    @pytest.mark.usefixtures("registry")
    def test_states_that_the_model_does_not_list_are_refused(self):
        """Mamba lists other states than those between its layers, which can be registered."""
        lm = make("mamba", "MambaForCausalLM", {"state_size": 4})
        with pytest.raises(ProbeError, match=r"register_family\('mamba'"):
            AutoModelForProbedGeneration.from_causal_lm(lm, make_heads())
        with pytest.raises(ProbeError, match=r"register_family\('mamba'"):
            ProbeModel(ProbeConfig(probe_type="gate"), backbone=lm)
        assert type(lm) is transformers.MambaForCausalLM and not hasattr(lm, "probes")
        register_family("mamba", embeddings="backbone.embeddings", layers="backbone.layers", norm="backbone.norm_f")
        ids = padded_prompts()["input_ids"][1:2]
        states = collect_hidden_states(lm, range(LAYERS + 1), ids)
        tokens = lm.generate(ids, max_new_tokens=4, do_sample=False)
        out = AutoModelForProbedGeneration.from_causal_lm(lm, make_heads()).generate(ids, max_new_tokens=4)
        assert torch.equal(out.sequences, tokens)
        assert_same(out.probe_logits, scores(states, None))

    @pytest.mark.usefixtures("registry")
    @pytest.mark.parametrize("registered", [False, True])
    def test_states_that_later_layers_change_are_refused(self, registered):
        """Heads would read one thing in training, and another while the model runs."""

        class InPlace(LlamaDecoderLayer):
            def forward(self, hidden_states, **kwargs):
                hidden_states += self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
                return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

        lm = make_lm()
        lm.config.model_type = "in place"
        for layer in lm.model.layers:
            layer.__class__ = InPlace
        if registered:
            register_family("in place", embeddings="model.embed_tokens", layers="model.layers", norm="model.norm")
        with pytest.raises(ProbeError, match=r"in place.* is changed in place"):
            check_states(lm)

    @pytest.mark.usefixtures("registry")
    def test_of_two_places_none_is_chosen(self):
        lm = make("opt", *UNKNOWN["opt"])
        lm.model.decoder.other = copy.deepcopy(lm.model.decoder.layers)
        with pytest.raises(ProbeError, match=r"model.decoder.layers .*, model.decoder.other .*register_family\('opt'"):
            find_decoder(lm)
        paths = {"embeddings": "model.decoder.embed_tokens", "norm": "model.decoder.final_layer_norm"}
        register_family("opt", layers="model.decoder.stack", **paths)
        with pytest.raises(ProbeError, match=r"register_family\('opt', .*model.decoder.stack"):
            find_decoder(lm)
        register_family("opt", layers="model.decoder.layers", **{**paths, "norm": "final_norm"})
        with pytest.raises(ProbeError, match=r"register_family\('opt', .* and final_norm"):
            find_decoder(lm)
        register_family("opt", layers="model.decoder.layers", **paths)
        assert find_decoder(lm).layers is lm.model.decoder.layers
        assert_serves(lm, padded_prompts(), padded_prompts()["attention_mask"])

    @pytest.mark.usefixtures("registry")
    def test_registered_states_of_another_shape_are_refused(self):
        lm = make_lm()
        lm.config.model_type = "of one's own"
        register_family("of one's own", embeddings="model.embed_tokens", layers="model.layers", norm="lm_head")
        with pytest.raises(ProbeError, match=r"state 4 .* not \[batch, tokens, 32\]"):
            check_states(lm)


class TestRefused:
    def test_an_encoder_decoder(self, tmp_path):
        config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        lm = transformers.T5ForConditionalGeneration(config)
        for probe in (None, make_heads()):
            with pytest.raises(ProbeError, match="T5ForConditionalGeneration is an encoder-decoder"):
                AutoModelForProbedGeneration.from_causal_lm(lm, probe)
        assert type(lm) is transformers.T5ForConditionalGeneration
        lm.save_pretrained(tmp_path)
        with pytest.raises(ProbeError, match="no causal LM"):
            AutoModelForProbedGeneration.from_pretrained(tmp_path)

    def test_no_final_norm(self):
        lm = make("openai-gpt", "OpenAIGPTLMHeadModel", {"n_head": 4})
        with pytest.raises(ProbeError, match=r"found: none.*'openai-gpt'"):
            AutoModelForProbedGeneration.from_causal_lm(lm)
