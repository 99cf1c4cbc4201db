"""Heads that follow a reply: the score of every token, and replies that end where one is flagged."""

import pytest
import torch
from cases import FOLLOWED_MODES as MODES
from cases import FORMS, flag, guard
from conftest import LAYERS, make_lm, make_probe, make_prompts, probed
from hypothesis import given, settings
from hypothesis import strategies as st
from observers import Recorder, assert_no_hooks, hooks_in_passes, passes_of

from llama_probe import Halt, HoldBackStreamer, ProbeError


def both_scopes(**changes):
    return {
        f"{name}-{scope}": make_probe(seed=i, token_scope=scope, **form, **changes)
        for scope in ("response", "all")
        for i, (name, form) in enumerate(FORMS.items())
    }


@pytest.fixture
def model():
    return probed({"guard": guard(), "mood": make_probe(seed=3)})


@settings(max_examples=8, deadline=None)
@given(
    mode=st.sampled_from(sorted(MODES)),
    padding=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    pad=st.sampled_from([0, 2]),
    seed=st.integers(0, 1000),
)
def test_each_score_is_that_of_the_text_so_far(mode, padding, pad, seed):
    """Streamed while the reply is written, and read at once from the whole text: the same."""
    prompts = make_prompts(len(padding), 7, seed=seed)
    mask = torch.ones_like(prompts)
    for row, width in enumerate(padding):
        prompts[row, :width], mask[row, :width] = pad, 0
    heads = both_scopes()
    model = probed(heads, pad_token_id=pad, seed=seed)
    torch.manual_seed(seed)
    out = model.generate(prompts, attention_mask=mask, max_new_tokens=6, **MODES[mode])
    rows, length = len(out.sequences), prompts.shape[1]
    width = out.sequences.shape[1] - length - 1
    mask = mask.bool().repeat_interleave(rows // len(prompts), 0)
    replies = out.sequences[:, length:]
    live = (replies == 2).cumsum(1) == 0
    attention = torch.cat([mask, torch.ones_like(replies, dtype=torch.bool)], 1)
    with torch.no_grad():
        # no padding behind the reply can change what stands before it
        lm = make_lm(pad_token_id=pad, seed=seed)
        states = lm(out.sequences, attention_mask=attention, output_hidden_states=True).hidden_states
        for name, head in heads.items():
            found = out.probe_token_logits[name]
            assert found.shape == (rows, width, 2)
            for step in range(width):
                stop = length + step + 1
                chosen = torch.cat([mask & ("all" in name), live[:, : step + 1]], 1)
                on = live[:, step]
                assert found[~on, step].isnan().all()
                if on.any():
                    part = [state[on, :stop] for state in states]
                    whole = head(hidden_states=part, probe_mask=chosen[on]).logits
                    torch.testing.assert_close(found[on, step], whole, atol=1e-4, rtol=1e-4)


def test_a_reply_that_is_given_is_scored_by_classify_and_forward(prompts):
    heads = both_scopes()
    model = probed(heads)
    model.set_active_probes([name for name in heads if "response" in name])
    out = model.generate(prompts, max_new_tokens=5, eos_token_id=None, pad_token_id=96)
    mask = torch.zeros_like(out.sequences)
    mask[:, 9:-1] = 1
    whole, passed = model.classify(out.sequences, probe_mask=mask), model(out.sequences, probe_mask=mask)
    for name, logits in out.probe_token_logits.items():
        torch.testing.assert_close(whole[name].logits, logits[:, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(passed.probe_logits[name], logits[:, -1], atol=1e-4, rtol=1e-4)
    for call in (model.classify, model):
        with pytest.raises(ProbeError, match="probe_mask"):
            call(out.sequences)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(prompts), max_new_tokens=5, eos_token_id=None)
    torch.testing.assert_close(embedded.probe_token_logits, out.probe_token_logits, atol=1e-4, rtol=1e-4)


def test_what_is_said_of_the_prompt(prompts):
    """A head of the reply alone says nothing; one of both says of the prompt what it would say by itself."""
    model = probed({"reply": guard(), "both": make_probe(token_scope="all"), "prompt": make_probe(seed=2)})
    out = model.generate(prompts, max_new_tokens=3)
    assert list(out.probe_logits) == list(out.probe_labels) == ["both", "prompt"]
    assert list(out.probe_token_logits) == ["reply", "both"]
    probabilities = out.probe_token_probabilities["reply"]
    torch.testing.assert_close(probabilities, out.probe_token_logits["reply"].softmax(-1), equal_nan=True)
    classified = model.classify(prompts, probes=["both"])["both"].logits
    torch.testing.assert_close(classified, out.probe_logits["both"])
    assert model.generate(prompts, max_new_tokens=3, probes="prompt").probe_token_logits is None


READ = [("prompt", None, [1, 0, 0]), ("content", None, [1, 0, 0]), ("response", None, [0, 1, 1])]


@pytest.mark.parametrize("scope, keeps, read", [*READ, ("prompt", True, [1, 1, 1])])
def test_a_pass_costs_something_only_where_a_head_reads_it(prompts, scope, keeps, read):
    model = probed({"a": make_probe(token_scope=scope)})
    found = hooks_in_passes(model)
    out = model.generate(prompts, max_new_tokens=3, eos_token_id=None, probe_state=keeps)
    assert found == [(LAYERS + 1) * is_read for is_read in read]
    assert (out.probe_token_logits is None) == (scope != "response") and (out.probe_state is None) == (not keeps)


class TestCallback:
    def test_it_sees_every_token(self, model, prompts):
        seen = []
        out = model.generate(prompts, max_new_tokens=5, on_probe_token=seen.append, eos_token_id=None)
        assert [scores.step for scores in seen] == [0, 1, 2, 3]
        found = torch.stack([scores.outputs["guard"].logits for scores in seen], 1)
        assert torch.equal(found, out.probe_token_logits["guard"]) and list(seen[0].outputs) == ["guard"]
        assert out.probe_halts == [None] * 3 and seen[0].outputs["guard"].labels[0] in ("fine", "awful")

    def test_it_may_end_a_reply(self, model, prompts):
        free = model.generate(prompts, max_new_tokens=6).sequences
        why = Halt("mine", "bad", 0.5)
        out = model.generate(prompts, max_new_tokens=6, on_probe_token=flag(1))
        assert out.probe_halts == [Halt(token=1), None, None]
        assert out.sequences[0, 9:13].tolist() == [*free[0, 9:11].tolist(), 2, 0]
        assert torch.equal(out.sequences[1:], free[1:, : out.sequences.shape[1]])
        assert out.probe_token_logits["guard"][0, 2:].isnan().all()
        out = model.generate(prompts[:1], max_new_tokens=6, on_probe_token=lambda scores: [why])
        assert out.probe_halts == [Halt("mine", "bad", 0.5, token=0)] and out.sequences.shape[1] == 11

    @pytest.mark.parametrize("held, shown", [(None, 3), (1, 1)])
    def test_an_error_lets_nothing_through(self, model, prompts, held, shown):
        def callback(scores):
            if scores.step == 2:
                raise RuntimeError("out of order")

        recorder = Recorder()
        streamer = recorder if held is None else HoldBackStreamer(recorder, held)
        call = {"max_new_tokens": 9, "eos_token_id": None, "streamer": streamer}
        with pytest.raises(RuntimeError, match="out of order"):
            model.generate(prompts[:1], on_probe_token=callback, **call)
        assert len(recorder.reply) == shown and recorder.ended == 1
        assert_no_hooks(model)
        out = model.generate(prompts[:1], on_probe_token=lambda scores: None, **call)
        assert out.probe_token_logits["guard"].shape[1] == 8 and recorder.ended == 2, "it can be used again"


class TestHalting:
    def test_decoding_ends_with_the_last_row(self, prompts):
        for eos in (2, None):
            model = probed({"guard": guard()}, eos_token_id=eos)
            passes = passes_of(model)
            out = model.generate(prompts, max_new_tokens=9, halt_on={"guard": {"threshold": 0.0}})
            assert passes == [9, 1] and out.sequences.shape[1] == 9 + 2
            assert [halt.token for halt in out.probe_halts] == [0, 0, 0]

    @pytest.mark.parametrize("window", [2, 3])
    def test_a_window_takes_the_mean_of_the_last_scores(self, model, prompts, window):
        kwargs = {"max_new_tokens": 8, "eos_token_id": None}
        free = model.generate(prompts, **kwargs).probe_token_probabilities["guard"][..., 1]  # [rows, 7]
        means = torch.stack([free[:, max(0, t + 1 - window) : t + 1].sum(dim=1) / window for t in range(7)], dim=1)
        threshold = float(means.amax(dim=1).median()) - 1e-5
        out = model.generate(prompts, halt_on={"guard": {"threshold": threshold, "window": window}}, **kwargs)
        first = [(row >= threshold).nonzero().flatten().tolist()[:1] for row in means]
        assert [[] if halt is None else [halt.token] for halt in out.probe_halts] == first

    def test_beside_a_head_that_halts_prompts(self, model, prompts):
        mood = model.generate(prompts, max_new_tokens=1).probe_probabilities["mood"][:, 1]
        rules = {"mood": {"threshold": float(mood.max())}, "guard": {"threshold": 0.0, "patience": 2}}
        out = model.generate(prompts, max_new_tokens=6, halt_on=rules, eos_token_id=None, pad_token_id=96)
        first = int(mood.argmax())
        assert [halt.token for halt in out.probe_halts] == [None if row == first else 1 for row in range(3)]
        assert (out.sequences[first, 9:] == 96).all() and out.probe_token_logits["guard"][first].isnan().all()

    def test_each_return_sequence_by_itself(self, model, prompts):
        torch.manual_seed(0)
        kwargs = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5}
        out = model.generate(prompts, on_probe_token=flag(1, rows=(3,)), **kwargs)
        assert [halt is not None for halt in out.probe_halts] == [False] * 3 + [True] + [False] * 2
        assert out.probe_logits["mood"].shape[0] == 3 and out.sequences[3, 11] == 2
        out = model.generate(prompts, halt_on={"mood": {"threshold": 0.0}, "guard": None}, **kwargs)
        assert len(out.probe_halts) == 6, "one a row, also where the prompt is halted"

    def test_what_is_put_in_place_of_the_rest(self, model, prompts):
        free = model.generate(prompts, max_new_tokens=6).sequences
        streamer = Recorder()
        kwargs = {"max_new_tokens": 6, "halt_reply": [5, 6, 7, 8, 9, 10, 11]}
        out = model.generate(prompts, on_probe_token=flag(1), **kwargs)
        assert out.sequences[0, 9:].tolist() == [*free[0, 9:11].tolist(), 5, 6, 7, 8, 9, 10, 11]
        assert torch.equal(out.sequences[1:, : free.shape[1]], free[1:])
        assert (out.sequences[1:, free.shape[1] :] == 0).all()
        model.generate(prompts[:1], on_probe_token=flag(1), streamer=streamer, **kwargs)
        assert streamer.reply == [*free[0, 9:11].tolist(), 5, 6, 7, 8, 9, 10, 11, 2]
        assert streamer.ended == 1


@pytest.mark.parametrize(
    "active, call, words",
    [
        ("mood", {"halt_on": "other"}, "'other'.* active: mood"),
        ("mood", {"halt_on": []}, "no head"),
        ("guard", {"halt_on": {"guard": "awful"}}, "'guard' are 'awful'"),
        ("mood", {"halt_on": True}, "halt_on=True"),
        ("mood", {"halt_on": {"mood": {"above": 0.5}}}, "'above'"),
        ("mood", {"halt_on": "mood", "probes": []}, "no head is active"),
        *(
            ("guard", {"halt_on": "guard", "halt_reply": ids}, "token ids of one")
            for ids in (["No."], torch.eye(3), [1.7])
        ),
        ("guard", {"num_beams": 2}, "num_beams"),
        ("guard", {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ("guard", {"assistant_model": make_lm(seed=1)}, "assistant_model"),
        ("guard", {"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
        ("mood", {"token_healing": True}, "token_healing"),
        ("mood", {"cache_implementation": "paged"}, "paged cache"),
        ("mood", {"on_probe_token": print}, "no active head reads replies"),
        ("guard", {"halt_on": lambda outputs: [False] * 3}, "on_probe_token="),
        ("guard", {"halt_on": "guard", "streamer": HoldBackStreamer(Recorder())}, "one row"),
        ("guard", {"streamer": HoldBackStreamer(Recorder())}, "a HoldBackStreamer needs halt_on="),
    ],
)
def test_refusals_before_any_work(model, prompts, active, call, words):
    """Beside those of the page on troubleshooting."""
    passes = passes_of(model)
    model.set_active_probes(active)
    with pytest.raises(ProbeError, match=words):
        model.generate(prompts, max_new_tokens=3, **call)
    assert not passes


def test_what_is_refused_when_it_happens(model, prompts, monkeypatch):
    prepare = model.prepare_inputs_for_generation

    def two_at_once(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        if inputs["input_ids"].shape[1] == 1:
            inputs["input_ids"] = inputs["input_ids"].repeat(1, 2)
        return inputs

    with pytest.raises(ProbeError, match="on_probe_token returned"):
        model.generate(prompts, max_new_tokens=3, on_probe_token=lambda scores: [False])
    monkeypatch.setattr(model, "prepare_inputs_for_generation", two_at_once)
    with pytest.raises(ProbeError, match="one more token of each reply"):
        model.generate(prompts, max_new_tokens=6)


def say(*tokens):
    """Have the model write these tokens behind the prompts, which have nine."""
    return {"prefix_allowed_tokens_fn": lambda row, ids: [tokens[len(ids) - 9]]}


class TestPadTokens:
    """One that the model writes is a token as any other; behind the end of a reply it is none."""

    @pytest.fixture
    def model(self):
        return probed({"both": make_probe(probe_type="gate", token_scope="all")})

    @pytest.mark.parametrize("stops", [None, [lambda ids, scores, **_: ids[:, -1] == 96]])
    def test_written_by_the_model(self, model, prompts, stops):
        call = {"max_new_tokens": 6, "stopping_criteria": stops, **say(10, 0, 0, 0, 11, 12)}
        out = model.generate(prompts[:1], probe_state=True, **call)
        assert out.sequences[0, 9:].tolist() == [10, 0, 0, 0, 11, 12] and out.probe_state.attention_mask.all()
        whole = [model.classify(out.sequences[:, :stop])["both"].logits for stop in range(10, 15)]
        torch.testing.assert_close(out.probe_token_logits["both"], torch.stack(whole, 1), atol=1e-5, rtol=1e-5)
        out = model.generate(prompts[:1], on_probe_token=flag(2), **call)
        assert out.probe_halts == [Halt(token=2)] and out.sequences[0, 9:12].tolist() == [10, 0, 0]

    def test_behind_the_end_of_a_reply(self, model, prompts):
        """One that is stopped, or halted also where there is no token that ends one."""

        def stop(ids, scores, **_):
            return torch.tensor([ids.shape[1] >= 11, False])

        stopped = {"stopping_criteria": [stop]}, [[False, True, True, True], [False, True, False, False]]
        halted = {"eos_token_id": None, "on_probe_token": flag(1)}, [[False, False, True, True], [False] * 4]
        for ways, unread in (stopped, halted):  # of a stopped one nothing tells those apart that the model writes
            call = {"max_new_tokens": 5, **say(10, 0, 13, 14, 11), **ways}
            out = model.generate(prompts[:2], probe_state=True, **call)
            assert out.sequences[:, 9:].tolist() == [[10, 0, 0, 0, 0], [10, 0, 13, 14, 11]]
            assert out.probe_token_logits["both"][..., 0].isnan().tolist() == unread
            assert (~out.probe_state.attention_mask[:, 9:]).tolist() == unread
