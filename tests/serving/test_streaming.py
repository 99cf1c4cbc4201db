"""HoldBackStreamer: nothing is shown that a head has flagged, and nothing is lost that none has."""

import pytest
import torch
from cases import flag, guard
from conftest import make_lm, make_probe, make_prompts, probed
from hypothesis import given, settings
from hypothesis import strategies as st
from observers import Recorder

from llama_probe import HoldBackStreamer, ProbeError


@pytest.fixture
def model():
    return probed({"guard": guard()})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), max_size=20), st.integers(0, 5), st.booleans())
def test_a_token_is_shown_once_it_and_what_follows_is_clear(flags, tokens, ends):
    recorder = Recorder()
    streamer = HoldBackStreamer(recorder, tokens)
    streamer.put(torch.tensor([[100, 101]]))
    assert recorder.tokens == [[100, 101]], "the prompt goes on at once"
    streamer.put(torch.tensor([0]))
    for token, flagged in enumerate(flags):
        streamer.scored(flagged)
        # the latest run of tokens + 1 clear ones, and everything before, but for the last `tokens`
        runs = [t for t in range(tokens, token + 1) if not any(flags[t - tokens : t + 1])]
        assert recorder.reply == list(range(runs[-1] - tokens + 1 if runs else 0))
        streamer.put(torch.tensor([token + 1]))
    before = recorder.reply
    if ends:
        streamer.end()
        assert recorder.reply == list(range(len(flags) + 1)), "the reply came to its own end"
    else:
        streamer.halt(torch.tensor([7, 8]))
        streamer.put(torch.tensor([2]))
        streamer.end()
        assert recorder.reply == [*before, 7, 8]
    assert recorder.ended == 1


@pytest.mark.parametrize("tokens, seen", [(0, 3), (1, 2), (2, 1), (20, 0)])
def test_what_is_held_goes_with_a_halt_and_comes_with_the_end(model, tokens, seen):
    ids, recorder = make_prompts(1), Recorder()
    call = {"max_new_tokens": 8, "eos_token_id": None, "streamer": HoldBackStreamer(recorder, tokens)}
    free = make_lm().generate(ids, max_new_tokens=8, eos_token_id=None)[0, 9:].tolist()
    halted, clear = {"on_probe_token": flag(3)}, {"halt_on": {"guard": {"threshold": 1.0}}}
    ways = [(halted | {"halt_reply": [5, 6]}, [*free[:seen], 5, 6]), (halted, free[:seen]), (clear, free)]
    for calls, (halting, shown) in enumerate(ways, start=1):  # it serves one call after another
        recorder.tokens.clear()
        model.generate(ids, **call, **halting)
        assert recorder.tokens[0] == ids[0].tolist() and recorder.reply == shown and recorder.ended == calls


def test_a_prompt_that_is_halted(model):
    model.add_probe("both", make_probe(token_scope="all"))
    recorder, halting = Recorder(), {"halt_on": {"both": {"threshold": 0.0}}, "halt_reply": [5, 6]}
    out = model.generate(make_prompts(1), max_new_tokens=3, streamer=HoldBackStreamer(recorder, 2), **halting)
    assert recorder.reply == [5, 6] == out.sequences[0, 9:].tolist() and recorder.ended == 1


@pytest.mark.parametrize(
    "kwargs", [{"halt_on": "nobody"}, {"halt_on": {"guard": {"threshold": 2}}}, {"probe_state": 1}]
)
def test_the_stream_of_a_call_that_is_refused_ends(model, prompts, kwargs):
    """A reader in another thread waits for the end."""
    recorder = Recorder()
    with pytest.raises(ProbeError):
        model.generate(prompts[:1], streamer=recorder, **kwargs)
    assert recorder.ended == 1 and recorder.reply == []


def test_fewer_tokens_than_none_are_refused():
    with pytest.raises(ProbeError, match="tokens=-1"):
        HoldBackStreamer(Recorder(), -1)
