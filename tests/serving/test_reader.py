"""The reader: groups of layers by a budget, tokens that nobody reads, and memory. test_any_call.py draws budgets for the scores."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe, make_prompts, probed

from llama_probe.experiments.meters import peak_memory
from llama_probe.experiments.systems import Systems, fresh_config
from llama_probe.heads import mean_attention, probe_types
from llama_probe.heads.probe import ProbeModel
from llama_probe.serving import reader as module


LAYER = 2 * 4 * HIDDEN * 5  # bytes of two fp32 tensors of five tokens


@pytest.mark.parametrize("budget, groups", [(1, [1] * (LAYERS + 1)), (2 * LAYER, [2, 2, 1]), (1 << 30, [LAYERS + 1])])
def test_layers_go_together_as_the_budget_allows(monkeypatch, budget, groups):
    """Two tensors of a group, fp32, fit into the budget. Columns at both ends that no head reads are left out."""
    sizes, step = [], ProbeModel.step

    def count(self, state, layers, x, *args):
        sizes.append((len(layers), x.shape[2]))
        return step(self, state, layers, x, *args)

    monkeypatch.setattr(ProbeModel, "step", count)
    monkeypatch.setattr(module, "state_budget", lambda device: budget)
    mask = torch.tensor([[0] * 8 + [1] * 5 + [0]])
    probed({"a": make_probe()}).generate(make_prompts(1, 14), probe_mask=mask, prefill_chunk_size=7, max_new_tokens=1)
    assert sizes == [(size, 5) for size in groups], "nothing of the first chunk is read"


DEEP = 12  # deep enough for several groups of layers


@pytest.mark.parametrize("batch_size, tokens, dtype", [(3, 100, torch.float32), (2, 60, torch.bfloat16)])
def test_memory_above_the_plain_models(batch_size, tokens, dtype, monkeypatch):
    """Beside its parameters, which are there before the call, a head takes at most the reader's budget."""
    model = probed(num_hidden_layers=DEEP)
    for kind in probe_types():
        # As many directions as suit so narrow a model: the usual 64 are twice its hidden size.
        options = {"options": {"num_maxima": 2, "num_members": 2}} if kind == "multimax" else {}
        model.add_probe(kind, fresh_config(kind, HIDDEN, DEEP).replace(**options))
    systems = Systems(model.to(dtype), many=4)
    prompts = systems.draw(batch_size, tokens)
    size, peaks = prompts["input_ids"].numel() * HIDDEN, {}
    budget = 2 * 2 * 4 * size  # of two layers in fp32
    monkeypatch.setattr(module, "state_budget", lambda device: budget)
    monkeypatch.setattr(mean_attention, "_SCORES", size // 4)

    def peak(serve):
        return peak_memory(serve, torch.device("cpu"))

    for name in systems.heads:
        systems.serve(name, prompts)
        peaks[name] = peak(lambda name=name: systems.serve(name, prompts))
    above = {name: memory - peaks["base"] for name, memory in peaks.items()}
    summaries = (DEEP + 1) * batch_size * HIDDEN * 4  # one vector a layer, what is kept of the tokens
    for kind in probe_types():
        assert above[kind] <= budget + summaries, kind
    assert above["4 x mha"] <= budget + 4 * summaries
    states = (DEEP + 1) * size * dtype.itemsize
    whole = peak(lambda: systems.plain(**prompts, output_hidden_states=True))
    assert whole > states > max(above[kind] for kind in probe_types()), "where all states are kept, they are seen"
