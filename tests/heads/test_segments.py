"""Segments: windows of a long text and turns of a chat, each judged by itself, of which the strongest counts."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe import ProbeConfig, ProbeError
from llama_probe.heads import select_rows
from llama_probe.heads.segments import find_segments, judges_segments, number_segments


HEAD_TYPES = ("multimax", "gate", "pooling", "mha")
SEVERAL = {"problem_type": "multi_label_classification", "num_labels": 3}
TURNS = {"user": {"ids": [1], "skip": 0}, "assistant": {"ids": [2], "skip": 0}}


def windows_of(columns: torch.Tensor, window: int) -> list[torch.Tensor]:
    """The windows of the columns of a turn: each begins half a window behind the one before it, and the last ends the turn."""
    found = [columns[:window]]
    while found[-1][-1] != columns[-1]:
        start = len(found) * window // 2
        found.append(columns[start : start + window])
    return found


def judge_one_by_one(probe, x, numbers):
    """Logits and spans of each row: each segment is scored by itself, from its tokens alone."""
    logits, spans = [], []
    for row, turns in enumerate(numbers):
        counted = [(turns == turn).nonzero().flatten() for turn in turns.unique() if turn]
        if probe.config.window:
            segments = [each for columns in counted for each in windows_of(columns, probe.config.window)]
        else:
            segments = [*counted, torch.cat(counted)]
        scores = torch.stack([probe.score(x[:, row, None, columns]).logits[0] for columns in segments])
        if probe.config.problem_type == "multi_label_classification":
            places = scores.argmax(dim=0)
        else:
            places = (scores[:, 1] - scores[:, 0]).argmax().expand(2)
        logits.append(scores.gather(0, places[None])[0])
        spans.append([[int(segments[place][0]), int(segments[place][-1]) + 1] for place in places])
    return torch.stack(logits), torch.tensor(spans)


@st.composite
def cases(draw):
    """A head that judges windows, turns or both, normalised states, a mask with holes and the turns in it."""
    window = draw(st.sampled_from([0, 2, 4, 8]))
    scope = draw(st.sampled_from(["user", "tool"] if window == 0 else ["user", "prompt"]))
    labels = draw(st.sampled_from([{}, SEVERAL]))
    head_type, pool, seed = (
        draw(st.sampled_from(HEAD_TYPES)),
        draw(st.sampled_from(["mean", "max"])),
        draw(st.integers(0, 99)),
    )
    probe = make_probe(seed, probe_type=head_type, pool=pool, window=window, token_scope=scope, **labels)
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, tokens, generator=generator) < draw(st.sampled_from([0.5, 0.9, 1.0]))
    mask[:, draw(st.integers(0, tokens - 1))] = True
    x = probe.normalize(torch.randn(LAYERS + 1, batch, tokens, HIDDEN, generator=generator))
    cuts = sorted(draw(st.sets(st.integers(1, tokens), max_size=4)) | {tokens})
    return probe, x, mask, number_segments(probe.config, mask, always=True), cuts


def read(probe, state, x, mask, numbers, start, stop, last):
    """Have a head read some columns, in groups of two layers."""
    ends = last and not state.keep
    segments = find_segments(numbers[:, :stop], probe.config.window, slice(start, stop), start, ends)
    for first in range(0, len(x), 2):
        layers = range(first, min(first + 2, len(x)))
        probe.step(state, layers, x[first : first + 2, :, start:stop], mask[:, start:stop], last, segments)


@pytest.mark.usefixtures("no_grad")
@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans(), st.booleans())
def test_the_strongest_segment_counts_however_the_prompt_is_cut(case, keep, resume):
    probe, x, mask, numbers, cuts = case
    expected, spans = judge_one_by_one(probe, x, numbers)
    whole = probe.score(x, mask, segments=numbers)
    state = probe.init_state(keep=keep or resume)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        read(probe, state, x, mask, numbers, start, stop, last=stop == cuts[-1])
        if resume and stop < cuts[-1]:
            state = probe.init_state(state.joined(), keep=True)
    streamed = probe.finish(state)
    for found in (whole, streamed):
        torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
        assert found.spans is None if probe.config.window == 0 else torch.equal(found.spans, spans)


@pytest.mark.usefixtures("no_grad")
@settings(max_examples=30, deadline=None)
@given(cases())
def test_rows_go_on_from_a_state_in_another_order(case):
    probe, x, mask, numbers, cuts = case
    rows, middle = torch.tensor([0, len(mask) - 1, 0]), cuts[0]
    state = probe.init_state(keep=True)
    read(probe, state, x, mask, numbers, 0, middle, last=False)
    state = probe.init_state(select_rows(state.joined(), rows), keep=True)
    if middle < mask.shape[1]:
        read(probe, state, x[:, rows], mask[rows], numbers[rows], middle, mask.shape[1], last=True)
        expected, _ = judge_one_by_one(probe, x, numbers)
        torch.testing.assert_close(probe.finish(state).logits, expected[rows], atol=1e-5, rtol=1e-5)


def test_what_is_kept_between_passes_does_not_grow_with_the_text():
    probe = make_probe(probe_type="multimax", window=4)

    def numbers_kept(tokens: int) -> int:
        mask = torch.ones(1, tokens, dtype=torch.bool)
        state = probe.init_state(keep=True)
        x = torch.randn(LAYERS + 1, 1, tokens, HIDDEN)
        read(probe, state, x, mask, mask.long(), 0, tokens, last=True)
        tensors, parts = [], [state.joined()]
        while parts:
            part = parts.pop()
            if isinstance(part, torch.Tensor):
                tensors.append(part)
            else:
                parts += part or ()
        return sum(tensor.numel() for tensor in tensors)

    assert numbers_kept(10) == numbers_kept(401 - 1)


def test_a_scope_of_one_window_is_judged_as_by_a_head_without_windows():
    plain, windows = make_probe(probe_type="multimax"), make_probe(probe_type="multimax", window=8)
    states = [torch.randn(2, 8, HIDDEN) for _ in range(LAYERS + 1)]
    mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
    found = windows(hidden_states=states, attention_mask=mask)
    torch.testing.assert_close(found.logits, plain(hidden_states=states, attention_mask=mask).logits)
    assert found.spans.tolist() == [[[3, 8]] * 2, [[0, 8]] * 2]


def test_training_gives_the_logits_of_each_window_and_which_hold_the_request():
    probe = make_probe(probe_type="multimax", window=4, dropout=0.0, options={"num_members": 3}).train()
    states = [torch.randn(2, 9, HIDDEN) for _ in range(LAYERS + 1)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    request = torch.zeros_like(mask)
    request[0, 5:7] = (
        True  # in the windows from 2 to 6 and from 4 to 8, and of the last, from 6 to 9, one of three tokens
    )
    found = probe(hidden_states=states, attention_mask=mask, request_mask=request)
    assert found.segment_logits.shape == (3, 2, 4, 2)
    assert found.segment_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert found.holds_request.tolist() == [[False, True, True, True], [False] * 4]
    assert found.touches_request.tolist() == [[False, True, True, True], [False] * 4]
    request[0, :2] = True  # the windows from 2 to 6 and from 6 to 9 now have one of four tokens
    found = probe(hidden_states=states, attention_mask=mask, request_mask=request)
    assert found.holds_request[0].tolist() == [True, False, True, False] and found.touches_request[0].all()
    with torch.no_grad():
        alone = probe(hidden_states=[state[:1, 4:8] for state in states])
    torch.testing.assert_close(found.segment_logits[:, 0, 2], alone.member_logits[:, 0])
    strongest = found.segment_logits[0, 0]
    place = (strongest[:, 1] - strongest[:, 0]).argmax()
    torch.testing.assert_close(found.member_logits[0, 0], strongest[place])


def test_attention_is_that_of_the_strongest_window():
    probe = make_probe(probe_type="gate", window=4)
    states = torch.randn(LAYERS + 1, 1, 11, HIDDEN)
    found = probe(hidden_states=list(states), output_attentions=True)
    first, stop = found.spans[0, 1].tolist()
    alone = probe(hidden_states=list(states[:, :, first:stop]), output_attentions=True)
    assert (first, stop) != (0, 11)
    torch.testing.assert_close(found.token_weights[..., first:stop], alone.token_weights)
    torch.testing.assert_close(found.layer_weights, alone.layer_weights)
    assert not found.token_weights[..., :first].any() and not found.token_weights[..., stop:].any()


def test_turns_are_numbered_and_other_scopes_are_one_turn():
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    turns = ProbeConfig(token_scope="user", turn_markers=TURNS)
    assert number_segments(turns, mask).tolist() == [[0, 1, 1, 0, 2], [0, 0, 1, 1, 1]]
    assert number_segments(turns, mask[1:]) is None, "one segment is all"
    assert number_segments(turns.replace(token_scope="turns"), mask) is None
    assert number_segments(turns.replace(probe_type="last"), mask) is None
    windows = ProbeConfig(window=2)
    assert number_segments(windows, mask).tolist() == [[0, 1, 1, 0, 1], [0, 0, 1, 1, 1]]
    assert number_segments(windows, mask[:, :3]) is None, "each row is one window"
    assert number_segments(windows, mask[:, :3], always=True).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert judges_segments(turns) and judges_segments(windows) and not judges_segments(ProbeConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 3}, "window=3 must be an even number of tokens"),
        ({"window": 8, "probe_type": "last"}, "reads all tokens of a prompt"),
        ({"window": 8, "token_scope": "response"}, "reads all tokens of a prompt"),
        ({"window": 8, "num_labels": 3}, "flags one of two labels, or a multi-label head"),
    ],
)
def test_what_no_windows_go_with(fields, message):
    with pytest.raises(ProbeError, match=message):
        ProbeConfig(**fields)
