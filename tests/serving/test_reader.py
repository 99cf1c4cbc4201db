"""The reader: groups of layers by a budget, tokens that nobody reads, and memory. test_any_call.py draws budgets for the scores."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe, make_prompts, probed
from memory import peak_memory

from llama_probe import ProbeConfig
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


def test_memory_above_the_plain_models(monkeypatch):
    """Beside its parameters, which are there before the call, a head takes at most the reader's budget."""
    model, systems = probed(num_hidden_layers=DEEP), {"base": [], "4 x mha": ["a", "b", "c", "d"]}
    for head_type in probe_types():
        # As many directions as suit so narrow a model: the usual 64 are twice its hidden size.
        options = {"num_maxima": 2, "num_members": 2} if head_type == "multimax" else {}
        model.add_probe(head_type, ProbeConfig(probe_type=head_type, downcast=16, options=options))
        systems[head_type] = [head_type]
    for name in systems["4 x mha"]:
        model.add_probe(name, ProbeConfig(probe_type="mha", downcast=16))
    batch_size, dtype, peaks = 2, torch.bfloat16, {}
    model, prompts = model.to(dtype), make_prompts(batch_size, 60)
    size = prompts.numel() * HIDDEN
    budget = 2 * 2 * 4 * size  # of two layers in fp32
    monkeypatch.setattr(module, "state_budget", lambda device: budget)
    monkeypatch.setattr(mean_attention, "_SCORES", size // 4)

    def serve(names):
        return lambda: model.generate(prompts, max_new_tokens=1, do_sample=False, probes=names)

    for name, heads in systems.items():
        serve(heads)()
        peaks[name] = peak_memory(serve(heads), torch.device("cpu"))
    above = {name: memory - peaks["base"] for name, memory in peaks.items()}
    summaries = (DEEP + 1) * batch_size * HIDDEN * 4  # one vector a layer, what is kept of the tokens
    for head_type in probe_types():
        assert above[head_type] <= budget + summaries, head_type
    assert above["4 x mha"] <= budget + 4 * summaries
    states = (DEEP + 1) * size * dtype.itemsize
    model.set_active_probes([])
    whole = peak_memory(lambda: model(prompts, output_hidden_states=True), torch.device("cpu"))
    assert whole > states > max(above[head_type] for head_type in probe_types()), (
        "where all states are kept, they are seen"
    )


def test_the_meter_of_memory():
    def call():
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.ones(500)  # 6,000
        del first  # 2,000
        second.view(10, 50)[2:].add_(1)  # a view or a change in place makes no tensor
        third = torch.zeros(300, dtype=torch.float64)  # 4,400
        return second, third

    assert peak_memory(call, torch.device("cpu")) == 6000
