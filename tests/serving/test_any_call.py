"""Any call of `generate()`: whatever model, heads, prompts and settings come together, the text is the plain model's, and the scores
are those of each prompt by itself."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from cases import HEAD_TYPES
from conftest import make_probe, score_turns
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import IMAGE, LAYERS, TINY, tiny

from llama_probe import AutoModelForProbedGeneration
from llama_probe.heads.rules import TURN_SCOPES
from llama_probe.heads.turns import turn_mask
from llama_probe.serving import reader


FAMILIES = sorted(set(TINY) - {"llama4"})  # the forward of its whole model fails by itself
# What all prompts begin with: heads over the "content" leave it out, those over turns take it for a user's.
PREFIX = [5, 6]
MARKERS = (("user", 5, 1), ("assistant", 8, 0), ("tool", 9, 2))
TURNS = {role: {"ids": [token], "skip": skip} for role, token, skip in MARKERS}
WAYS = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "prefill_chunk_size": 3},
    {"do_sample": False, "cache_implementation": "static"},
    {"do_sample": True},
    {"do_sample": True, "num_return_sequences": 2},
]
BUDGETS = st.one_of(st.integers(1, 60_000), st.just(1 << 30))  # bytes: of one layer each, of a few, of all at once
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


@st.composite
def configs(draw, scopes):
    """What a head may be, of the tiny models' size."""
    head_type = draw(st.sampled_from(sorted(HEAD_TYPES)))
    config = {
        "probe_type": head_type,
        "num_labels": draw(st.integers(2, 4)),
        "num_hidden_layers": LAYERS,
        "normalize": draw(st.sampled_from(["none", "layernorm", "rms"])),
        "layers": draw(st.one_of(st.just("all"), st.lists(st.integers(0, LAYERS), min_size=1, unique=True))),
        "token_scope": draw(st.sampled_from(scopes)),
    }
    if head_type in ("pooling", "mha"):
        config["pool"] = draw(st.sampled_from(["mean", "max"]))
    if config["token_scope"] in ("content", "all"):
        config["prefix_ids"] = PREFIX
    if config["token_scope"] in TURN_SCOPES:
        config["turn_markers"] = TURNS
    return config


@st.composite
def batches(draw):
    """Prompts of several lengths, with padding on one side."""
    lengths = draw(st.lists(st.integers(3, 20), min_size=1, max_size=4))
    left, generator = draw(st.booleans()), torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(max(lengths) - length, None) if left else slice(length)
        # small ids are markers of turns
        ids[row, place] = torch.randint(5, draw(st.sampled_from((12, IMAGE))), (length,), generator=generator)
        ids[row, place][: len(PREFIX)] = torch.tensor(PREFIX)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def counted(head, prompt_tokens, tokens, ids):
    """Which of so many tokens, the first of them a prompt's, count for a head."""
    places, scope = torch.arange(tokens), head.config.token_scope
    if scope in TURN_SCOPES:
        return turn_mask(scope, TURNS, ids[None])
    first = {"prompt": 0, "content": len(PREFIX), "all": len(PREFIX), "response": prompt_tokens}[scope]
    return (places >= first)[None]


def score(head, states, prompt_tokens, ids=None):
    """`[1, num_labels]`, of the states of one row, `[1, tokens, hidden_size]` each."""
    mask, config = counted(head, prompt_tokens, states[0].shape[1], ids), head.config
    if config.token_scope == "user" and config.num_labels == 2 and config.probe_type != "last":
        return score_turns(head, states, mask)
    with torch.no_grad():
        return head(hidden_states=states, attention_mask=mask).logits


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    drawn=st.lists(configs(("prompt", "content", *TURN_SCOPES)), min_size=1, max_size=3),
    alike=st.booleans(),
    batch=batches(),
    way=st.sampled_from(WAYS),
    budget=BUDGETS,
)
def test_text_and_scores(family, drawn, alike, batch, way, budget):
    lm, rows = tiny(family), []
    torch.manual_seed(0)
    expected = lm.generate(**batch, **way, max_new_tokens=4)
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            rows.append((lm(input_ids=ids[mask][None], output_hidden_states=True).hidden_states, ids[mask]))
    heads, wanted = {str(seed): make_probe(seed, **config) for seed, config in enumerate(drawn * (1 + alike))}, {}
    for name, head in heads.items():
        wanted[name] = torch.cat([score(head, states, len(ids), ids) for states, ids in rows])

    model = AutoModelForProbedGeneration.from_causal_lm(lm, heads)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    torch.manual_seed(0)
    with patch.object(reader, "state_budget", return_value=budget), torch.no_grad():
        out = model.generate(**batch, **way, max_new_tokens=4)
        forward = model(**batch, position_ids=positions).probe_logits
        classified = {name: output.logits for name, output in model.classify(**batch).items()}
    assert torch.equal(out.sequences, expected)
    for found in (out.probe_logits, forward, classified):
        torch.testing.assert_close(found, wanted, **TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    config=configs(("response", "all")),
    batch=batches(),
    patience=st.integers(1, 3),
    budget=BUDGETS,
    data=st.data(),
)
def test_replies_end_where_a_head_says_so(family, config, batch, patience, budget, data):
    lm, head, eos = tiny(family), make_probe(**config), 2
    ways = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [eos]}  # none ends by itself
    plain = lm.generate(**batch, **ways, return_dict_in_generate=True, output_hidden_states=True)
    width = batch["input_ids"].shape[1]
    scores = []  # of each row, that of the prompt first where the head reads it
    for row, mask in enumerate(batch["attention_mask"].bool()):
        steps = [[state[row] for state in step] for step in plain.hidden_states]
        steps[0] = [state[mask] for state in steps[0]]
        prompt = len(steps[0][0])
        lengths = range(1 if config["token_scope"] == "response" else 0, len(steps))
        whole = [torch.cat(states)[None] for states in zip(*steps, strict=True)]
        logits = [score(head, [state[:, : prompt + more] for state in whole], prompt) for more in lengths]
        scores.append(torch.cat(logits).softmax(1)[:, 0].tolist())
    values = sorted({0.0, 1.0, *(value for row in scores for value in row)})
    # between two scores that rounding does not confuse
    thresholds = [(low + high) / 2 for low, high in pairwise(values) if high - low > 1e-3]
    threshold = data.draw(st.sampled_from(thresholds))

    model = AutoModelForProbedGeneration.from_causal_lm(lm, {"guard": head})
    rule = {"label": head.config.id2label[0], "threshold": threshold, "patience": patience}
    with patch.object(reader, "state_budget", return_value=budget):
        out = model.generate(**batch, **ways, halt_on={"guard": rule})
    for row, probabilities in enumerate(scores):
        flagged = [value >= threshold for value in probabilities]
        ends = [end for end in range(patience, len(flagged) + 1) if all(flagged[end - patience : end])]
        halt, reply = out.probe_halts[row], out.sequences[row, width:].tolist()
        kept = plain.sequences[row, width:].tolist()
        assert (halt is None) == (not ends)
        if ends:
            kept = kept[: ends[0] - (config["token_scope"] == "all")]
            assert halt.token == (len(kept) - 1 if kept else None)
            assert halt.score == pytest.approx(probabilities[ends[0] - 1], abs=1e-3)
        assert reply[: len(kept)] == kept
        assert set(reply[len(kept) :]) <= {0, eos}
