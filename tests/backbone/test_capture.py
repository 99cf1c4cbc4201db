"""Captured states, beside hooks of others and in several threads. test_families.py compares them with output_hidden_states."""

import threading

import torch
from conftest import HIDDEN, LAYERS, make_probe

from llama_probe import AutoModelForProbedGeneration
from llama_probe.backbone.capture import capturing, collect_hidden_states
from llama_probe.backbone.decoder import find_decoder


def test_hooks_that_change_a_layers_input_in_place_leave_the_captured_state(lm, prompts):
    direction, given = torch.linspace(-1, 1, HIDDEN), []
    for layer in lm.model.layers:
        layer.register_forward_pre_hook(lambda _, args: (None, args[0].add_(direction))[0])
        layer.register_forward_hook(lambda _, args, out: given.append(out.clone()))
    found = collect_hidden_states(lm, range(LAYERS + 1), prompts)
    assert all(torch.equal(state, copy) for state, copy in zip(found[1:LAYERS], given, strict=False))
    # Heads that read at once, while the LM runs, see the same.
    model = AutoModelForProbedGeneration.from_causal_lm(lm, {"gate": make_probe(probe_type="gate")})
    at_once = model.generate(prompts, max_new_tokens=1).probe_logits["gate"]
    with torch.no_grad():
        after = model.probes["gate"](hidden_states=torch.stack(found, dim=1)).logits
    torch.testing.assert_close(after, at_once)


def test_a_hook_that_is_half_registered_does_not_break_another_thread(lm, prompts):
    """Another thread may run a layer after torch has noted the hook, and before it has noted that it takes keywords."""
    done = []
    with capturing(find_decoder(lm), lambda layer, hidden: None, [0]):
        lm.model.layers[0]._forward_pre_hooks_with_kwargs.clear()
        thread = threading.Thread(target=lambda: done.append(lm(prompts)))
        thread.start()
        thread.join()
    assert done
