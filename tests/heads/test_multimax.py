"""Multi-max pooling: its definition, members that learn apart, what it looks at, and its options."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe


@pytest.mark.parametrize("maxima, members", [(1, 1), (3, 2)])
def test_multimax_is_the_mean_of_its_members(maxima, members):
    options = {"num_maxima": maxima, "num_members": members}
    probe = make_probe(probe_type="multimax", normalize="none", num_labels=3, options=options)
    states = [torch.randn(1, 5, HIDDEN) for _ in range(LAYERS + 1)]
    stage, layer_stage, found = probe.token_stage, probe.layer_stage, []
    for member in range(members):
        own = slice(member * maxima, (member + 1) * maxima)
        maxima_of = [(x[0] @ stage.value[slot, own].T).max(0).values for slot, x in enumerate(states)]
        gates, biases = layer_stage.gate[:, member], layer_stage.bias[:, member]
        scores = [maxima_of[slot] @ gates[slot] + biases[slot] for slot in range(LAYERS + 1)]
        weights = torch.stack(scores).softmax(0) * (LAYERS + 1)
        vector = torch.cat([weight * values for weight, values in zip(weights, maxima_of, strict=True)])
        part = slice(member * len(vector), (member + 1) * len(vector))
        found.append(probe.classifier.weight[:, part] @ vector + probe.classifier.bias)
    out = probe(hidden_states=states)
    torch.testing.assert_close(out.logits[0], torch.stack(found).mean(0), atol=1e-5, rtol=1e-5)
    assert out.member_logits is None

    probe.train()
    learns = probe(hidden_states=states, labels=torch.tensor([2]))
    expected = torch.stack([-part.log_softmax(0)[2] for part in found]).mean()
    torch.testing.assert_close(learns.loss, expected, atol=1e-5, rtol=1e-5)


def test_a_multimax_head_looks_at_the_tokens_that_are_largest():
    probe = make_probe(probe_type="multimax", normalize="none", options={"num_maxima": 2, "num_members": 1})
    states = [torch.zeros(1, 6, HIDDEN) for _ in range(LAYERS + 1)]
    with torch.no_grad():
        for slot, state in enumerate(states):
            state[0, 2] = probe.token_stage.value[slot, 0]
            state[0, 4] = probe.token_stage.value[slot, 1] - probe.token_stage.value[slot, 0]
    weights = probe(hidden_states=states, output_attentions=True).token_weights[0]
    assert (weights[:, 2] >= 0.5).all(), "where one direction is largest"
    assert (weights[:, [2, 4]].sum(-1) == 1).all()
