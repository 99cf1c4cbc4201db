"""classify() of long prompts: in pieces over one KV cache, with the scores of one pass."""

from functools import partial

import pytest
import torch
from cases import FORMS, MARKERS, REPLY, TOOL, USER
from conftest import HIDDEN, LAYERS, make_probe, make_prompts, make_tokenizer, padded, probed, with_novelty
from memory import peak_memory
from observers import passes_of
from tiny_families import LAYERS as FAMILY_LAYERS
from tiny_families import TINY, make, tiny

from llama_probe import AutoModelForProbedGeneration
from llama_probe.backbone import passes as passes_module
from llama_probe.data import batches
from llama_probe.data.prompts import PromptFormat
from llama_probe.serving import modeling, reader


PIECE = 5


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(passes_module, "PASS_TOKENS", PIECE)


def whole(model, **inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes_module, "PASS_TOKENS", 1 << 20)
        return model.classify(**inputs)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, output in expected.items():
        torch.testing.assert_close(found[name].logits, output.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_scores_are_those_of_one_pass(in_pieces, side):
    model = probed({name: make_probe(seed, **FORMS[name]) for seed, name in enumerate(FORMS)})
    model.add_probe("new", with_novelty(make_probe(probe_type="gate")))
    inputs = {"input_ids": make_prompts(3, 23)}
    if side != "none":
        inputs["attention_mask"] = (
            padded(inputs["input_ids"]).flip(1) if side == "right" else padded(inputs["input_ids"])
        )
    expected = whole(model, **inputs)
    widths = passes_of(model)
    found = model.classify(**inputs)
    assert widths == [5, 5, 5, 5, 3]
    assert_same(found, expected)
    torch.testing.assert_close(found["new"].novelty, expected["new"].novelty, atol=1e-4, rtol=1e-4)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_same(model.classify(inputs_embeds=embeds, **inputs), expected)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("scope", ["user", "tool"])
def test_turns_and_windows_over_several_pieces(in_pieces, scope, window):
    head = make_probe(
        1, probe_type="gate", token_scope=scope, turn_markers=MARKERS, window=window, flagged=["LABEL_1"]
    )
    model = probed({"a": head})
    ids = torch.randint(TOOL, REPLY + 5, (4, 31), generator=torch.Generator().manual_seed(0))
    ids[:, ::9] = TOOL if scope == "tool" else USER
    ids[:, 4::9] = REPLY
    expected = whole(model, input_ids=ids)
    found = model.classify(ids)
    assert_same(found, expected)
    assert found["a"].logits[:, 1].unique().numel() > 1, "or nothing was compared"
    assert (found["a"].spans is None) == (window == 0)
    assert window == 0 or torch.equal(found["a"].spans, expected["a"].spans)


@pytest.mark.parametrize("layers", ["all", [0, 1]])
@pytest.mark.parametrize("family", sorted(TINY))
def test_families(in_pieces, family, layers):
    """A pass may end at the last layer that a head reads: the KV cache of the layers behind it stays empty."""
    head = make_probe(layers=layers, num_hidden_layers=FAMILY_LAYERS)
    model = AutoModelForProbedGeneration.from_causal_lm(tiny(family), {"a": head})
    ids = torch.randint(5, 90, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # longer than a piece
    assert_same(model.classify(ids, mask), whole(model, input_ids=ids, attention_mask=mask))


def test_the_rest_behind_a_cache_runs_in_pieces(in_pieces):
    model, ids = probed({"a": make_probe()}), make_prompts(2, 23)
    start = model(ids[:, :4], use_cache=True)
    expected = whole(model, input_ids=ids)
    widths = passes_of(model)
    found = model.classify(ids, cache=start.cache, probe_state=start.probe_state)
    assert widths == [5, 5, 5, 4] and start.cache.get_seq_length() == 4, "a copy of the cache is filled"
    assert_same(found, expected)


def test_weights_need_one_pass(in_pieces):
    model, ids = probed({"a": make_probe(probe_type="mha")}), make_prompts(1, 12)
    widths = passes_of(model)
    assert model.classify(ids, output_attentions=True)["a"].token_weights.shape[-1] == 12 and widths == [12]


def test_linear_attention_needs_one_pass(in_pieces):
    """A layer of linear attention cannot go on from its state with several tokens."""
    linear = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    layer_types = ["linear_attention", "full_attention", "linear_attention"]
    lm = make("qwen3_next", "Qwen3NextForCausalLM", {"layer_types": layer_types, "head_dim": 8, **linear, **experts})
    model = AutoModelForProbedGeneration.from_causal_lm(lm, {"a": make_probe(num_hidden_layers=FAMILY_LAYERS)})
    widths = passes_of(model)
    model.classify(make_prompts(1, 12))
    assert widths == [12]


def test_memory_grows_by_the_cache_alone(monkeypatch):
    monkeypatch.setattr(passes_module, "PASS_TOKENS", 32)
    monkeypatch.setattr(reader, "state_budget", lambda device: 2 * 4 * HIDDEN * 32)
    model = probed({"a": make_probe(probe_type="gate")}, max_position_embeddings=4096, intermediate_size=2048)
    head_width = HIDDEN // model.config.num_attention_heads
    in_cache = LAYERS * 2 * model.config.num_key_value_heads * head_width * 4  # bytes of a token
    in_pass = 32 * 4 + 2 * HIDDEN * 4  # and in one layer of a pass: its column of the mask, its key and its value

    def growth(classify):
        short, long = make_prompts(1, 1024), make_prompts(1, 2048)
        peaks = [peak_memory(partial(classify, input_ids=ids), torch.device("cpu")) for ids in (short, long)]
        return (peaks[1] - peaks[0]) / 1024

    assert in_cache <= growth(model.classify) <= in_cache + 2 * in_pass
    assert growth(partial(whole, model)) > 4 * 2048, "the states inside an MLP"


def test_a_long_text_shows_its_progress(in_pieces, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, title, unit, delay, is_hidden):
            self.total, self.unit, self.hidden, self.updates = total, unit, is_hidden, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.updates.append(count)

    for module in (batches, modeling):
        monkeypatch.setattr(module, "ProgressBar", Bar)
    tokenizer = make_tokenizer()
    model = probed({"a": make_probe(**PromptFormat(tokenizer).config_fields())}, vocab_size=260)
    model.classify(["A text of some length", "Hi"], tokenizer=tokenizer)
    assert all(bar.unit == "tokens" and sum(bar.updates) == bar.total for bar in bars)
    for tokens in bars[1:]:
        assert len(tokens.updates) > 2 and not tokens.hidden
    bars.clear()
    monkeypatch.setattr(passes_module, "PASS_TOKENS", 2048)
    model.classify(make_prompts(1, 9))
    assert all(bar.hidden for bar in bars), "nothing to wait for"
