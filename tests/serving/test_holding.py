"""Which states wait for each other, and what heads are then given."""

import pytest
import torch
from conftest import make_lm
from transformers import DynamicCache

from llama_probe.serving.holding import HeldStates


DEEP, ROWS, TOKENS, WIDTH = 20, 2, 3, 8


def run(cache=None, numbers=ROWS * TOKENS * WIDTH, key_width=WIDTH // 2, states=None, together=True):
    """A pass over a model of `DEEP` layers, each of which fills its part of the cache before its state appears.

    Returns:
        How many states heads were given, each time that they were given any.
    """
    given, runs = [], []

    def read(layers, hidden):
        layers, hidden = (list(layers), hidden) if together else ([layers], hidden[None])
        given.extend((layer, each.clone()) for layer, each in zip(layers, hidden, strict=True))
        if together:
            runs.append(len(layers))

    held = HeldStates(read, numbers, DEEP + 1, cache, together)
    states = torch.randn(DEEP + 1, ROWS, TOKENS, WIDTH) if states is None else states
    for layer, hidden in enumerate(states):
        if cache is not None and layer:
            cache.update(*torch.zeros(2, ROWS, 1, TOKENS, key_width), layer - 1)
        before = len(given)
        held.add(layer, hidden)
        if not together and len(given) > before:
            runs.append(len(given) - before)
    left = len(given)
    held.read()
    if not together and len(given) > left:
        runs.append(len(given) - left)
    assert [layer for layer, _ in given] == list(range(DEEP + 1))
    assert all(torch.equal(hidden, states[layer]) for layer, hidden in given)
    return runs


def fresh_cache(**changes):
    return DynamicCache(config=make_lm(num_hidden_layers=DEEP, **changes).config)


def test_many_at_first_and_few_at_the_end():
    first, *runs = run(fresh_cache())
    assert first == 1, "before the first layer has filled its part nothing is known of the rest"
    assert runs[0] > 3 and runs[-1] <= 2 and runs == sorted(runs, reverse=True)
    assert len(runs) < DEEP / 2


def test_in_turn_more_wait_since_no_copy_is_made():
    in_turn, together = (run(fresh_cache(), together=together) for together in (False, True))
    assert in_turn[1] > together[1] and len(in_turn) < len(together)
    assert run(None, together=False) == [1] * (DEEP + 1)


def test_never_most_of_them_however_large_the_cache():
    assert max(run(fresh_cache(), key_width=100 * WIDTH)) <= 0.35 * (DEEP + 1) + 1


def test_a_smaller_cache_leaves_less_room():
    assert len(run(fresh_cache(), key_width=1)) > len(run(fresh_cache(), key_width=WIDTH))


@pytest.mark.parametrize("cache", [None, "full", "none of its own"])
def test_where_no_cache_will_grow_none_waits(cache):
    if cache == "full":
        cache = fresh_cache()
        for layer in range(DEEP):
            cache.update(*torch.zeros(2, ROWS, 1, TOKENS, WIDTH // 2), layer)
    elif cache is not None:
        cache = DynamicCache()  # makes its layers as they come
    assert run(cache) == [1] * (DEEP + 1)


def test_long_prompts_do_not_wait():
    assert run(fresh_cache(), numbers=1 << 20) == [1] * (DEEP + 1)


def test_half_precision_is_read_in_more_copies():
    states = torch.randn(DEEP + 1, ROWS, TOKENS, WIDTH)
    assert len(run(fresh_cache(), states=states.bfloat16())) > len(run(fresh_cache(), states=states))


def test_states_of_two_kinds_are_not_mixed():
    """As where the last layers lie on another device, or norms compute in fp32."""
    states = [torch.randn(ROWS, TOKENS, WIDTH).to(torch.bfloat16 if i < 4 else torch.float32) for i in range(DEEP + 1)]
    runs = run(fresh_cache(), states=states)
    assert 4 in torch.tensor(runs).cumsum(0)
