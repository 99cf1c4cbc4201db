"""A new kind of head is one class: streaming, files and generate() follow from it."""

import pytest
import torch
from conftest import make_lm, make_prompts, read_head, save_head
from torch import nn

from llama_probe import LlamaForProbedGeneration, ProbeConfig, ProbeError, ProbeModel
from llama_probe.heads import Aggregator, get_probe_type, probe_types, register_probe_type, registry


@pytest.fixture
def final_item():
    """A kind that keeps the last valid item, scaled by an option."""

    class FinalItem(Aggregator):
        def __init__(self, num_slots, config):
            super().__init__(num_slots, config)
            self.scale = nn.Parameter(torch.full((num_slots, 1), float(config.options["scale"])))

        @classmethod
        def check(cls, config):
            if "scale" not in config.options:
                raise ProbeError("options['scale'] is missing")

        def update(self, state, x, mask, slots):
            index = (
                torch.full(x.shape[1:2], x.shape[2] - 1)
                if mask is None
                else mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
            )
            last = x[:, torch.arange(x.shape[1]), index]
            if state is None or mask is None:
                return last
            return torch.where(mask.any(1)[None, :, None], last, state)

        def result(self, state, slots):
            return state * self.scale[slots].unsqueeze(-1)

        def weights(self, x, mask, slots):
            valid = x.new_ones(x.shape[1:3]) if mask is None else mask.to(x.dtype)
            last = valid.cumsum(1) == valid.sum(1, keepdim=True)
            return (valid * last).expand(x.shape[:3])

    register_probe_type("final")(FinalItem)
    yield FinalItem
    del registry._PROBE_TYPES["final"]


def test_it_works_everywhere(final_item, tmp_path):
    torch.manual_seed(0)
    assert "final" in probe_types() and get_probe_type("final") is final_item
    head = ProbeModel(
        ProbeConfig(probe_type="final", options={"scale": 2}, hidden_size=32, num_hidden_layers=4)
    ).eval()
    back = read_head(save_head(head, tmp_path / "h"))
    prompts = make_prompts()
    mask = torch.ones_like(prompts)
    mask[0, -3:] = 0
    model = LlamaForProbedGeneration.from_causal_lm(make_lm(), {"h": back})
    states = make_lm()(prompts, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = head(hidden_states=states, attention_mask=mask).logits
    for kwargs in ({}, {"prefill_chunk_size": 2}):
        out = model.generate(prompts, attention_mask=mask, max_new_tokens=2, **kwargs)
        torch.testing.assert_close(out.probe_logits["h"], expected, atol=1e-5, rtol=0)


def test_its_own_check_runs(final_item):
    with pytest.raises(ProbeError, match="scale"):
        ProbeConfig(probe_type="final")


def test_a_kind_must_be_complete():
    class Half(Aggregator):
        def update(self, state, x, mask, slots):
            return x

    with pytest.raises(TypeError, match="result"):
        Half(1, ProbeConfig(probe_type="gate", hidden_size=4))


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="'mha' is taken by AttentionAggregator"):
        register_probe_type("mha")(type("Other", (Aggregator,), {}))
