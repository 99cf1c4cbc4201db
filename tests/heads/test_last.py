"""The last-token probe: which item it takes, and that nothing else is read."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe, make_prompts, probed

from llama_probe import ProbeConfig


MASKS = {
    "none": [[1] * 6, [1] * 6],
    "left": [[0, 0, 0, 1, 1, 1], [1] * 6],
    "right": [[1, 1, 0, 0, 0, 0], [1] * 6],
    "both, with a hole": [[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]],
}


@pytest.mark.parametrize("layers", ["all", [2], [0, 1, 3]])
@pytest.mark.parametrize("padding", MASKS)
def test_it_is_a_linear_map_of_the_last_token_that_counts(padding, layers):
    mask = torch.tensor(MASKS[padding])
    probe = make_probe(probe_type="last", layers=layers, normalize="none")
    states = [torch.randn(2, 6, HIDDEN) for _ in range(LAYERS + 1)]
    last = [max(column for column, counts in enumerate(row) if counts) for row in MASKS[padding]]
    state = states[LAYERS if layers == "all" else layers[-1]]
    expected = probe.classifier(torch.stack([state[row, column] for row, column in enumerate(last)]))
    found = probe(hidden_states=states, attention_mask=mask, output_attentions=True)
    assert torch.equal(found.logits, expected)
    assert found.layer_weights.tolist() == [[1.0], [1.0]]
    for row, column in enumerate(last):
        assert found.token_weights[row, 0].nonzero().flatten().tolist() == [column]


def test_only_one_layer_is_read():
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    for layers, read in (("all", [LAYERS]), ([3, 1], [3])):
        config = ProbeConfig(probe_type="last", layers=layers, **sizes)
        assert config.layer_indices == read and config.layers == (layers if layers == "all" else sorted(layers))


def test_what_is_kept_is_one_item_and_not_all():
    probe = make_probe(probe_type="last", normalize="none")
    model, prompts = probed({"a": probe}), make_prompts(rows=2, length=50)
    passed, written = model(prompts, use_cache=True), model.generate(prompts, max_new_tokens=2, probe_state=True)
    for out in (passed, written):
        state = out.probe_state.heads["a"].state
        assert state.untyped_storage().nbytes() == 4 * 2 * HIDDEN
