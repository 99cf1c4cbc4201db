"""Heads that read tool results: prompts without one are not flagged, those with one are scored as any prompt."""

import pytest
import torch
from cases import FORMS, MARKERS, REPLY, TOOL, USER
from conftest import expected_logits, make_lm, make_probe, make_prompts, probed

from llama_probe import ProbeError


def tool_head(**changes):
    labels = {"id2label": {0: "injection", 1: "clean"}, "flagged": ["injection"], "threshold": 0.5}
    fields = {"probe_type": "gate", "token_scope": "tool", "turn_markers": MARKERS}
    return make_probe(**{**labels, **fields, **changes})


def agent_prompts():
    """Return ids of three rows, of which the first holds two results, the second none and the last one, and the tokens read."""
    ids = make_prompts(length=14) % 40 + 8
    ids[:, 0], ids[:, -1] = USER, REPLY
    ids[0, 3], ids[0, 5], ids[0, 9] = REPLY, TOOL, TOOL
    ids[2, 3], ids[2, 7] = REPLY, TOOL
    read = torch.zeros_like(ids)
    read[0, 6:], read[2, 8:] = 1, 1
    return ids, read


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 4}, {"num_beams": 2}], ids=["whole", "chunks", "beams"])
def test_rows_with_a_result_are_scored_and_others_are_not_flagged(mode):
    heads, (ids, read) = {name: tool_head(**form) for name, form in FORMS.items()}, agent_prompts()
    out = probed(heads).generate(ids, max_new_tokens=2, **mode)
    with torch.no_grad():
        states = make_lm()(ids[[0, 2]], output_hidden_states=True).hidden_states
    for name, head in heads.items():
        expected = head(hidden_states=states, attention_mask=read[[0, 2]]).logits
        torch.testing.assert_close(out.probe_logits[name][[0, 2]], expected, atol=1e-5, rtol=1e-5)
        assert out.probe_probabilities[name][1].tolist() == [0.0, 1.0]


FLAGS_NOTHING = {"flagged": None, "threshold": None}


@pytest.mark.parametrize(
    "changes, label",
    [
        ({}, "clean"),
        ({"problem_type": "multi_label_classification", **FLAGS_NOTHING}, []),
        ({"problem_type": "regression", **FLAGS_NOTHING}, [0.0, 0.0]),
    ],
)
def test_labels_without_a_result(changes, label):
    (ids, _), model = agent_prompts(), probed({"tools": tool_head(**changes)})
    assert model.generate(ids[1:2], max_new_tokens=1).probe_labels["tools"] == [label]
    assert model.classify(ids[1:2])["tools"].labels == [label]
    with torch.no_grad():  # a loop of one's own keeps the cache
        assert model(ids, use_cache=True).probe_labels == model.generate(ids, max_new_tokens=1).probe_labels


@pytest.mark.parametrize("bias", [0.0, float("nan")])
@pytest.mark.parametrize("rows", [[0, 1, 2], [1], [1, 1]])
def test_only_prompts_with_a_result_halt(rows, bias):
    """Also if what the head gives for a result is no number."""
    ids, head, other = agent_prompts()[0][rows], tool_head(), make_probe(seed=1)
    head.classifier.bias.data += bias
    model = probed({"tools": head, "all": other})
    out = model.generate(ids, max_new_tokens=2, halt_on={"tools": {"threshold": 1e-6}})
    assert [halt is not None for halt in out.probe_halts] == [row != 1 for row in rows]
    torch.testing.assert_close(out.probe_logits["all"], expected_logits(other, ids))


def test_a_template_without_tool_results_needs_a_mask():
    ids, read = agent_prompts()
    model = probed({"tools": tool_head(turn_markers={role: MARKERS[role] for role in ("user", "assistant")})})
    with pytest.raises(ProbeError, match="probe_mask"):
        model.generate(ids, max_new_tokens=1)
    out = model.generate(ids, max_new_tokens=1, probe_mask=read)
    assert out.probe_logits["tools"].shape == (3, 2) and out.probe_probabilities["tools"][1, 0] == 0
