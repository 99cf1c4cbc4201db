"""What heads keep beside a cache: prompts that go on from there are scored as a whole, and only their new tokens are run."""

import copy
import gc

import pytest
import torch
from cases import FORMS, MARKERS, REPLY, TOOL, USER
from conftest import HIDDEN, LAYERS, VOCAB, make_probe, make_prompts, probed, with_novelty
from hypothesis import given, settings
from hypothesis import strategies as st
from observers import Recorder, passes_of
from tiny_families import make
from transformers import DynamicCache, StaticCache

from llama_probe import AutoModelForProbedGeneration, ProbeCache, ProbeError
from llama_probe.heads import probe_types
from llama_probe.heads.rules import TURN_SCOPES
from llama_probe.serving.session import session_of


pytestmark = pytest.mark.usefixtures("no_grad")

RESPONSE = {"probe_type": "gate", "token_scope": "response"}
WINDOWS = {"windows": {"probe_type": "multimax", "window": 4}, "mha-windows": {"probe_type": "mha", "window": 2}}
HEADS = {**FORMS, **WINDOWS, "follows": {"probe_type": "mha", "token_scope": "all"}, "reply": RESPONSE}


def with_heads(*names, **lm_changes):
    """A model with these heads, or all. A gate tells novelty."""
    heads = {name: make_probe(seed=i, **HEADS[name]) for i, name in enumerate(names or HEADS)}
    if "gate" in heads:
        with_novelty(heads["gate"])
    return probed(heads, **lm_changes)


@pytest.fixture
def model():
    return with_heads("gate", "mha")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        # The LM's own states differ by rounding between a cached pass and a whole one, which this one magnifies.
        tolerance = 1e-4 if name == "mha-max" else 1e-5
        torch.testing.assert_close(found[name], logits, atol=tolerance, rtol=1e-5, equal_nan=True)


def follow(model, out, ids, **call):
    """Go on from the cache and the state of a call, as the whole conversation is generated and scored without them."""
    call = {"max_new_tokens": 2, **call}
    found = model.generate(ids, cache=out.cache, probe_state=out.probe_state, **call)
    expected = model.generate(ids, **{**call, "probe_state": None})
    assert torch.equal(found.sequences, expected.sequences)
    assert_same(found.probe_logits, expected.probe_logits)
    torch.testing.assert_close(found.probe_novelty, expected.probe_novelty, atol=1e-4, rtol=1e-4)
    return found


def assert_goes_on(model, out, cached):
    """A call that left so many tokens in the cache can be followed."""
    assert out.probe_state.get_seq_length() == out.cache.get_seq_length() == cached
    follow(model, out, torch.cat([out.sequences, make_prompts(1, 4, seed=1)], 1))


TURNS = [{}, {"do_sample": True, "temperature": 0.8}, {"prefill_chunk_size": 3}]
TURNS += [{"max_new_tokens": 19}, {"max_new_tokens": 1}, {}]


@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
def test_a_turn_runs_its_new_tokens_alone_and_is_scored_as_the_whole_conversation(cache_type):
    model, fresh = with_heads(), with_heads()
    widths, ids, state = passes_of(model), make_prompts(1, 9), True
    cache = DynamicCache() if cache_type is DynamicCache else StaticCache(config=model.config, max_cache_len=200)
    for turn, way in enumerate(TURNS):
        cached = int(cache.get_seq_length())
        # a mask, because this LM writes its padding token
        kwargs = {"max_new_tokens": 5, "eos_token_id": None, "attention_mask": torch.ones_like(ids), **way}
        torch.manual_seed(turn)
        out = model.generate(ids, cache=cache, probe_state=state, **kwargs)
        torch.manual_seed(turn)
        expected = fresh.generate(ids, **kwargs)
        assert torch.equal(out.sequences, expected.sequences)
        assert_same(out.probe_logits, expected.probe_logits)
        assert_same(out.probe_token_logits, expected.probe_token_logits)
        assert sum(widths) == out.sequences.shape[1] - 1 - cached, "the new tokens, each once"
        widths.clear()
        cache, state = out.cache, out.probe_state
        assert state.get_seq_length() == int(cache.get_seq_length()) == out.sequences.shape[1] - 1
        assert torch.equal(state.input_ids, out.sequences[:, :-1])
        ids = torch.cat([out.sequences, make_prompts(1, 4, seed=turn + 1)], 1)


@settings(max_examples=8, deadline=None)
@given(
    padding=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    more=st.integers(1, 9),
    behind=st.integers(0, 3),
    pad=st.sampled_from([0, 2]),
    repeats=st.sampled_from([1, 2]),
    picked=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_batches_with_padding_and_replies_that_end(padding, more, behind, pad, repeats, picked, seed):
    """Any rows of them go on, once those of the cache and of the state are selected."""
    model = with_heads(pad_token_id=pad, seed=seed)
    ids = make_prompts(len(padding), 7, seed=seed)
    mask = torch.ones_like(ids)
    for row, width in enumerate(padding):
        ids[row, :width], mask[row, :width] = pad, 0
    torch.manual_seed(seed)
    kwargs = {"do_sample": True, "num_return_sequences": repeats}
    kwargs["sequence_bias"] = {(2,): 4.0}  # the end is likely, so that some replies end early
    first = model.generate(ids, attention_mask=mask, max_new_tokens=8, probe_state=True, **kwargs)
    replies = first.sequences[:, 7:]
    ended = (replies == 2).cumsum(1) - (replies == 2).int() > 0
    rows = torch.tensor(picked) % len(first.sequences)
    first.cache.batch_select_indices(rows)
    first.probe_state.batch_select_indices(rows.tolist())
    new = make_prompts(len(rows), more, seed=seed + 1)
    ids = torch.cat([first.sequences[rows], new], 1)
    mask = torch.cat([mask.repeat_interleave(repeats, 0)[rows], (~ended[rows]).long(), torch.ones_like(new)], 1)
    if behind:  # padding on the right as well
        ids, mask = torch.nn.functional.pad(ids, (0, behind), value=pad), torch.nn.functional.pad(mask, (0, behind))
    follow(model, first, ids, attention_mask=mask)


class TestSharedPrefix:
    @pytest.fixture
    def prefix(self):
        return make_prompts(1, 6, seed=9)

    def test_it_is_run_once_for_many_prompts(self, prefix):
        model = with_heads(*[name for name in HEADS if name != "reply"])
        widths, shared = passes_of(model), model(prefix, use_cache=True)
        for seed in (1, 2):  # the state stays as it is, the cache is copied
            ids = torch.cat([prefix.expand(4, -1), make_prompts(4, 5, seed=seed)], 1)
            copied = copy.deepcopy(shared)
            copied.cache.batch_repeat_interleave(4)
            copied.probe_state.batch_repeat_interleave(4)
            widths.clear()
            classified = model.classify(ids, cache=copied.cache, probe_state=copied.probe_state)
            assert copied.cache.get_seq_length() == 6
            generated = follow(model, copied, ids)
            assert widths == [5, 5, 1, 11, 1]
            assert_same({name: output.logits for name, output in classified.items()}, generated.probe_logits)
        assert shared.probe_state.get_seq_length() == 6 and shared.probe_state.batch_size == 1

    def test_a_cache_that_was_made_with_gradients_stays_as_it_is(self, model, prefix):
        ids = torch.cat([prefix, make_prompts(1, 5)], 1)
        with torch.enable_grad():
            shared = model(prefix, use_cache=True)
            found = model.classify(ids, cache=shared.cache, probe_state=shared.probe_state)
        for name, output in model.classify(ids).items():
            torch.testing.assert_close(found[name].logits, output.logits)
        assert shared.cache.get_seq_length() == 6 and shared.cache.layers[0].keys.requires_grad

    @pytest.mark.parametrize("length", [2, 4, 6])
    def test_around_the_constant_prefix(self, prefix, length):
        """A part of it, the whole of it, or more: none of it counts."""
        model = with_heads("gate")
        for scope in ("content", "all"):
            model.add_probe(scope, make_probe(token_scope=scope, prefix_ids=prefix[0, :4].tolist()))
        shared = model(prefix[:, :length], use_cache=True)
        assert list(shared.probe_logits) == ["gate", "content", "all"][: 3 if length > 4 else 1], "nothing to read yet"
        follow(model, shared, torch.cat([prefix, make_prompts(1, 3)], 1), max_new_tokens=3)


END = 8


class TestTurnScopes:
    """A chat whose heads read some of its turns is scored as the whole chat is."""

    @pytest.fixture(params=(*TURN_SCOPES, "tool"))
    def model(self, request):
        scope = {"token_scope": request.param, "turn_markers": MARKERS}
        return probed({name: make_probe(**form, **scope) for name, form in {**FORMS, **WINDOWS}.items()})

    def test_turns_of_a_tool_and_of_a_user_go_on(self, model):
        """The first turn holds no result of a tool. The last one is a reply that goes on."""
        ids = torch.tensor([[1, USER, 10, 11, 12, END, REPLY], [1, USER, 20, 21, 22, END, REPLY]])
        ways = {"max_new_tokens": 3, "suppress_tokens": [USER, TOOL, REPLY]}
        out = model.generate(ids, probe_state=True, **ways)
        for turn in ([TOOL, 30, 31], [USER, 32], [USER, 33, 34, 35]):
            ids = torch.cat([out.sequences, torch.tensor([[END, *turn, END, REPLY]]).expand(2, -1)], 1)
            out = follow(model, out, ids, **ways)
        skips_replies = model.probes["gate"].config.token_scope == "user"
        longer = model.generate(out.sequences, cache=out.cache, probe_state=out.probe_state, **ways)
        whole = model.generate(out.sequences, **ways)
        assert_same(longer.probe_logits, (out if skips_replies else whole).probe_logits)

    def test_pieces_of_forward(self, model):
        ids = torch.tensor([[1, USER, 10, 11, END, REPLY, 12, 13, END, TOOL, 14, 15, END, REPLY]])
        state, first = {}, 0
        for last in (1, 2, 8, 11, ids.shape[1]):
            out = model(ids[:, first:last], use_cache=True, **state)
            state, first = {"cache": out.cache, "probe_state": out.probe_state}, last
        assert_same(out.probe_logits, model(ids).probe_logits)


class TestForward:
    def test_padding(self, model):
        ids, mask, new = make_prompts(2, 6), torch.ones(2, 9, dtype=torch.long), make_prompts(2, 3, seed=1)
        ids[0, :3], mask[0, :3] = 0, 0
        first, whole = model(ids, attention_mask=mask[:, :6], use_cache=True), torch.cat([ids, new], 1)
        known = {"cache": first.cache, "probe_state": first.probe_state}
        with pytest.raises(ProbeError, match="padding: pass attention_mask"):
            model(new, **known)
        with pytest.raises(ProbeError, match="pass position_ids"):
            model.classify(whole, attention_mask=mask, **known)
        expected = model(whole, attention_mask=mask).probe_logits
        found = model.classify(whole, attention_mask=mask, position_ids=torch.tensor([[6, 7, 8]] * 2), **known)
        assert_same({name: output.logits for name, output in found.items()}, expected)
        out = model(new, attention_mask=mask, **known)
        assert out.probe_state.get_seq_length() == out.cache.get_seq_length() == 9
        assert_same(out.probe_logits, expected)

    def test_a_state_is_kept_where_it_is_asked_for(self, model, prompts):
        first, embeds = model(prompts, use_cache=True), model.get_input_embeddings()(prompts)
        assert isinstance(model(prompts, probe_state=True).probe_state, ProbeCache)
        assert model(prompts).probe_state is None and model(prompts, use_cache=False).probe_state is None
        assert model(prompts[:, :1], cache=first.cache).probe_state is None
        assert model(inputs_embeds=embeds, use_cache=True).probe_state is None


@pytest.mark.parametrize("head_type", probe_types())
def test_what_a_state_holds(head_type):
    """Of floats, per token, row and layer: nothing, or the low-rank projections. Views hold what they are of."""

    def floats(state):
        if isinstance(state, (tuple, list)):
            return sum(map(floats, state))
        is_float = isinstance(state, torch.Tensor) and state.is_floating_point()
        return state.untyped_storage().nbytes() // state.itemsize if is_float else 0

    model = with_heads(head_type)
    states = (model(make_prompts(2, n), use_cache=True).probe_state.heads[head_type].state for n in (5, 15))
    short, long = map(floats, states)
    assert long - short == 10 * 2 * (LAYERS + 1) * (24 if head_type == "mha" else 0)


class TestHalting:
    @pytest.mark.parametrize(
        "step, cached, reply", [(None, 9, [5, 6, 7]), (2, 12, None)], ids=["before the reply", "midway"]
    )
    def test_what_is_put_in_place_of_a_reply_or_its_rest_was_never_run(self, prompts, step, cached, reply):
        model = with_heads("gate", "mha", "reply")
        halting = {"halt_on": lambda outputs: [step is None], "on_probe_token": lambda scores: [scores.step == step]}
        out = model.generate(prompts[:1], max_new_tokens=9, probe_state=True, halt_reply=reply, **halting)
        assert out.probe_halts[0].token == step and (reply is None or out.sequences[0, cached:].tolist() == reply)
        assert_goes_on(model, out, cached)

    @pytest.mark.parametrize(
        "halting, kept",
        [
            ({"halt_on": lambda outputs: [False, True, False]}, 0),
            ({"on_probe_token": lambda scores: [False, scores.step == 1, False], "halt_reply": [5, 6]}, 2),
        ],
        ids=["before the reply", "midway"],
    )
    def test_one_of_a_batch(self, prompts, halting, kept):
        """What was forced behind its end is no token of it, and a halt reply stands there."""
        model = with_heads("pooling", "reply")
        out = model.generate(prompts, max_new_tokens=5, probe_state=True, eos_token_id=2, **halting)
        new, seen = make_prompts(3, 3, seed=1), out.probe_state.attention_mask.long()
        assert out.probe_halts[1] and seen[1, 9:].sum() == kept
        ids = torch.cat([out.sequences, new], 1)
        mask = torch.cat([seen, torch.ones(3, ids.shape[1] - seen.shape[1], dtype=torch.long)], 1)
        follow(model, out, ids, attention_mask=mask)


def test_tokens_that_generate_takes_back(model):
    """On an accelerator stops are noticed one step late: the last pass is undone, in the cache too."""
    ids, found = make_prompts(1, 7), []

    class AtTheEnd(Recorder):
        def end(self):
            found.append(session_of(model).reply.probe_cache(7 + 4))

    kwargs = {"eos_token_id": None, "probe_state": True}
    model.generate(ids, max_new_tokens=6, streamer=AtTheEnd(), **kwargs)
    out = model.generate(ids, max_new_tokens=5, **kwargs)
    assert torch.equal(found[0].input_ids, out.probe_state.input_ids)
    out["probe_state"] = found[0]
    assert_goes_on(model, out, cached=11)


def test_a_cache_that_the_model_makes_itself():
    """MiniMax takes none that is not its own."""
    lm = make("minimax", "MiniMaxForCausalLM", {"num_local_experts": 2, "head_dim": 8})
    head = make_probe(probe_type="gate", num_hidden_layers=3)
    model = AutoModelForProbedGeneration.from_causal_lm(lm, {"gate": head})
    for halted in (False, True):
        call = {"max_new_tokens": 4, "probe_state": True, "eos_token_id": None}
        out = model.generate(make_prompts(1, 9), halt_on=lambda _, on=halted: [on], **call)
        assert_goes_on(model, out, cached=9 if halted else 12)


def test_a_head_that_was_switched_off_is_left_out(model, prompts):
    first = model.generate(prompts, probe_state=True, max_new_tokens=3, eos_token_id=None)
    model.set_active_probes("gate")
    second = follow(model, first, torch.cat([first.sequences, prompts], 1), max_new_tokens=3, eos_token_id=None)
    model.set_active_probes(["gate", "mha"])
    ids = torch.cat([second.sequences, prompts], 1)
    with pytest.raises(ProbeError, match="head 'mha' has not read them"):
        model.generate(ids, cache=second.cache, probe_state=second.probe_state)


def at(place, ids):
    """A mask of one column."""
    return (torch.arange(ids.shape[1]) == place).expand(len(ids), -1)


def replace_head(model):
    model.delete_probe("gate")
    model.add_probe("gate", make_probe(seed=5, probe_type="gate"))
    gc.collect()


class TestRefusals:
    """Nothing is run, and nothing is scored in part or by what does not belong to it."""

    @pytest.fixture
    def first(self, model, prompts):
        return model.generate(prompts, max_new_tokens=4, probe_state=True, eos_token_id=None)

    @pytest.fixture
    def ids(self, first):
        return torch.cat([first.sequences, make_prompts(3, 4, seed=1)], 1)

    @pytest.mark.parametrize(
        "words, change",
        {
            "number 4": lambda model, first, ids: {"inputs": (ids + at(4, ids)) % VOCAB},
            "at least one new token": lambda model, first, ids: {"inputs": ids[:, :12]},
            "12 tokens, and the cache beside it holds 10": lambda model, first, ids: first.cache.crop(-2) or {},
            "pass probe_state=": lambda model, first, ids: {"probe_state": None},
            "pass probe_state= of the call": lambda model, first, ids: {"probe_state": True},
            "3 rows, and 2 prompts": lambda model, first, ids: {"inputs": ids[:2]},
            "attention_mask: .* number 2": lambda model, first, ids: {"attention_mask": ~at(2, ids)},
            "'gate' reads: .* number 2": lambda model, first, ids: {"probe_mask": ~at(2, ids)},
            "another head called 'gate'": lambda model, first, ids: replace_head(model) or {},
            "'gate', or by other weights": lambda model, first, ids: with_novelty(model.probes["gate"], 5) and {},
            "num_beams": lambda model, first, ids: {"num_beams": 2},
            "use_cache=False": lambda model, first, ids: {"use_cache": False},
            "return_dict_in_generate=False": lambda model, first, ids: {"return_dict_in_generate": False},
            "probe_state is a str": lambda model, first, ids: {"probe_state": "yes"},
            "none is active": lambda model, first, ids: {"probes": []},
            "probe_state needs input_ids": lambda *_: {"inputs": None, "inputs_embeds": torch.randn(3, 16, HIDDEN)},
        }.items(),
    )
    def test_generate(self, model, first, ids, words, change):
        call = {"inputs": ids, "cache": first.cache, "probe_state": first.probe_state, "max_new_tokens": 2}
        call |= change(model, first, ids)
        widths = passes_of(model)
        with pytest.raises(ProbeError, match=words):
            model.generate(**call)
        assert not widths

    def test_forward_and_classify(self, model, first, ids):
        cache, state = {"cache": first.cache}, {"probe_state": first.probe_state}
        for words, call in {
            "holds 12 tokens": lambda: model(ids[:, 12:], **cache, probe_state=True),
            "3 rows, and 2 prompts": lambda: model(ids[:2, 12:], **cache, **state),
            "holds 0": lambda: model.classify(ids, **state),
            "output_attentions": lambda: model.classify(ids, output_attentions=True, **cache, **state),
            "classify returns no probe_state": lambda: model.classify(ids, probe_state=True),
        }.items():
            with pytest.raises(ProbeError, match=words):
                call()

    def test_other_weights_of_the_same_head(self, model, first, ids):
        head = model.probes["mha"].to(torch.float64).to(torch.float32).requires_grad_(False)  # which changes nothing
        second = follow(model, first, ids, eos_token_id=None)
        head.classifier.bias.add_(1)  # in place, as optimizers do
        ids = torch.cat([second.sequences, ids[:, -2:]], 1)
        with pytest.raises(ProbeError, match="'mha', or by other weights of it"):
            model.generate(ids, cache=second.cache, probe_state=second.probe_state)

    def test_a_prompt_that_leaves_the_constant_prefix(self, prompts):
        head = make_probe(token_scope="content", prefix_ids=prompts[0, :4].tolist())
        model = probed({"content": head})
        shared = model(prompts[:1, :2], use_cache=True)
        ids = torch.cat([prompts[:1, :2], make_prompts(1, 5, seed=2)], 1)
        with pytest.raises(ProbeError, match=r"tokens that 'content' reads: of the 2 tokens .* other ones count now"):
            model.generate(ids, cache=shared.cache, probe_state=shared.probe_state)
