"""Operations that heads add to a pass of a model of the demo backbone's sizes, as a GPU would launch them."""

import pytest
import torch
from accelerator import DEVICE, Accelerator
from conftest import make_lm, make_prompts, with_novelty

from llama_probe import LlamaForProbedGeneration, ProbeConfig
from llama_probe.heads import probe_types


# Operations over those of the plain model: one head, eight heads, and a decoding step with a head that follows the reply.
ONE, EIGHT, STEP = 1.03, 1.10, 1.05
EIGHT_HEADS = [f"mha-{number}" for number in range(8)]
WINDOWS = [f"{head_type}-windows" for head_type in probe_types() if head_type != "last"]
# The states of 512 tokens are read in more groups of layers than those of 16, so every head is counted there.
CASES = [([name], ONE, 512) for name in (*probe_types(), *WINDOWS, "multimax-novelty")] + [(EIGHT_HEADS, EIGHT, 512)]
CASES += [(["mha"], ONE, 16), (EIGHT_HEADS, EIGHT, 16)]


@pytest.fixture(scope="module")
def count():
    """A function of names of heads and a number of tokens: operations of the prompt's pass, and of a step of the reply."""
    narrow = {"intermediate_size": 16, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
    lm = make_lm(hidden_size=576, num_hidden_layers=30, max_position_embeddings=1024, **narrow)
    model = LlamaForProbedGeneration.from_causal_lm(lm.to(torch.bfloat16))
    for head_type in probe_types():
        model.add_probe(head_type, ProbeConfig(probe_type=head_type))
        model.add_probe(f"{head_type}-reply", ProbeConfig(probe_type=head_type, token_scope="response"))
    for name in WINDOWS:
        model.add_probe(name, ProbeConfig(probe_type=name.split("-")[0], window=16))
    with_novelty(model.add_probe("multimax-novelty", ProbeConfig(probe_type="multimax")))
    for name in EIGHT_HEADS:
        model.add_probe(name, ProbeConfig(probe_type="mha"))
    counts = {}

    def count(heads, tokens):
        if (key := (*heads, tokens)) not in counts:
            after_token = []

            def hear(ids, *_, **__):
                after_token.append(device.operations)
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

            prompts = make_prompts(1, tokens).to(DEVICE)
            call = {"do_sample": False, "eos_token_id": None, "probes": heads, "stopping_criteria": [hear]}
            start = device.operations
            model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=2, **call)
            counts[key] = after_token[0] - start, after_token[1] - after_token[0]
        return counts[key]

    with torch.no_grad(), Accelerator() as device:
        model.to(DEVICE)
        yield count


@pytest.mark.parametrize("heads, limit, tokens", CASES, ids=[f"{names[0]}-{tokens}" for names, _, tokens in CASES])
def test_operations_of_the_pass_over_the_prompt(count, heads, limit, tokens):
    (base, base_step), (prefill, step) = count([], tokens), count(heads, tokens)
    assert 1 < prefill / base <= limit
    assert step == base_step, "a head of the prompt costs nothing in a reply"


@pytest.mark.parametrize("head_type", probe_types())
def test_operations_of_a_step_that_a_head_follows(count, head_type):
    (_, base_step), (_, step) = count([], 16), count([f"{head_type}-reply"], 16)
    assert 1 < step / base_step <= STEP


def test_novelty_adds_few_operations(count):
    added = count(["multimax-novelty"], 512)[0] - count(["multimax"], 512)[0]
    assert 0 < added <= 3  # one is a cast from bf16
