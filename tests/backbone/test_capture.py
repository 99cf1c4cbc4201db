"""Capture: equal to output_hidden_states, for any subset of states, and gone afterwards."""

import threading

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm, make_probe

from llama_probe import AutoModelForProbedGeneration, ProbeConfig, ProbeError
from llama_probe.backbone.capture import (
    Capture,
    collect_hidden_states,
    handing_states_to,
    prefill,
    stay_in_layers,
)
from llama_probe.backbone.decoder import find_decoder


@pytest.mark.parametrize("layers", [range(LAYERS + 1), [0], [LAYERS], [3, 1]])
def test_equals_output_hidden_states(lm, prompts, layers):
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)  # as generate() counts them
    expected = lm(prompts, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states
    found = collect_hidden_states(lm, layers, prompts, mask)
    assert len(found) == len(layers)
    for layer, hidden in zip(layers, found, strict=True):
        assert torch.equal(hidden, expected[layer]) and not hidden.requires_grad


def test_a_shared_prefix_runs_once(lm, prompts):
    prefix = torch.tensor([[5, 6, 7]]).expand(len(prompts), -1)
    mask = torch.ones_like(prompts)
    mask[1, -3:] = 0
    whole = collect_hidden_states(
        lm, range(LAYERS + 1), torch.cat([prefix, prompts], 1), torch.cat([torch.ones_like(prefix), mask], 1)
    )
    cache = prefill(lm, [5, 6, 7])
    for _ in range(2):  # the cache may be used again
        rest = collect_hidden_states(lm, range(LAYERS + 1), prompts, mask, cache)
        for a, b in zip(whole, rest, strict=True):
            torch.testing.assert_close(b[mask.bool()], a[:, 3:][mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.fixture
def steered(lm):
    """A model with hooks that change in place what enters a layer, which is the state before it."""
    direction = torch.linspace(-1, 1, HIDDEN)
    for layer in lm.model.layers:
        layer.register_forward_pre_hook(lambda _, args: (None, args[0].add_(direction))[0])
    return lm


def test_a_state_stays_what_it_was_when_the_layer_gave_it(steered, prompts):
    given = []
    for layer in steered.model.layers:
        layer.register_forward_hook(lambda _, args, out: given.append(out.clone()))
    found = collect_hidden_states(steered, range(1, LAYERS), prompts)
    assert all(torch.equal(state, copy) for state, copy in zip(found, given[: LAYERS - 1], strict=True))


def test_it_is_the_same_whenever_it_is_read(steered, prompts):
    """At once, or after the pass."""
    model = AutoModelForProbedGeneration.from_causal_lm(steered, {"gate": make_probe(probe_type="gate")})
    at_once = model.generate(prompts, max_new_tokens=1)
    states = collect_hidden_states(steered, range(LAYERS + 1), prompts)
    with torch.no_grad():
        after = model.probes["gate"](hidden_states=torch.stack(states, dim=1))
    torch.testing.assert_close(after.logits, at_once.probe_logits["gate"])


def test_hooks_go_even_after_an_error(lm, prompts):
    def fail(layer, hidden):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), Capture(find_decoder(lm), fail, [0, 2]):
        lm(prompts)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.modules())


def test_only_the_opening_thread_is_heard(lm, prompts):
    seen = []
    with Capture(find_decoder(lm), lambda layer, hidden: seen.append(layer), range(LAYERS + 1)):
        thread = threading.Thread(target=lambda: lm(prompts))
        thread.start()
        thread.join()
        assert seen == []
        lm(prompts)
    assert seen == list(range(LAYERS + 1))


def test_a_hook_that_is_half_registered_harms_no_other_thread(lm, prompts):
    """Another thread may run a layer after torch has noted the hook, and before it has noted that it takes keywords."""
    errors = []

    def run():
        try:
            lm(prompts)
        except TypeError as error:
            errors.append(error)

    with Capture(find_decoder(lm), lambda layer, hidden: None, [0]):
        lm.model.layers[0]._forward_pre_hooks_with_kwargs.clear()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert errors == []


class Recorder:
    def __init__(self):
        self.states = {}

    def on_state(self, layer, hidden):
        assert layer not in self.states
        self.states[layer] = hidden


def test_hooks_that_stay_hear_what_others_do_and_only_when_asked(lm, prompts):
    expected = collect_hidden_states(lm, range(LAYERS + 1), prompts)
    assert stay_in_layers(lm) and stay_in_layers(lm)  # once is enough
    lm(prompts)
    recorder, elsewhere = Recorder(), threading.Thread(target=lm, args=(prompts,))
    with handing_states_to(recorder):
        elsewhere.start()
        elsewhere.join()
        assert not recorder.states
        lm(prompts)
    assert all(torch.equal(recorder.states[layer], state) for layer, state in enumerate(expected))
    with pytest.raises(RuntimeError, match="out of memory"), handing_states_to(Recorder()):
        raise RuntimeError("out of memory")
    lm(prompts)
    assert len(recorder.states) == LAYERS + 1


def test_match_fills_in_and_refuses():
    decoder = find_decoder(make_lm())
    config = decoder.match(ProbeConfig(probe_type="gate"))
    assert (config.hidden_size, config.num_hidden_layers, config.base_model_type) == (32, LAYERS, "llama")
    with pytest.raises(ProbeError, match=r"num_hidden_layers=9 .* this backbone has 4: .* \(org/name\)"):
        decoder.match(ProbeConfig(probe_type="gate", num_hidden_layers=9, base_model_name_or_path="org/name"))
