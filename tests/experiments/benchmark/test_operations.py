"""Counts of dispatched operations."""

import torch
from conftest import HIDDEN, LAYERS, make_lm

from llama_probe.experiments.benchmark.operations import OperationCounter, columns, count_operations
from llama_probe.experiments.benchmark.serving_systems import fresh_config
from llama_probe.serving.auto import AutoModelForProbedGeneration


def test_views_and_allocations_are_not_counted():
    a = torch.ones(4, 6)
    with OperationCounter() as counter:
        a.t().reshape(-1)[:3].view(3, 1).unsqueeze(0)  # the reshape copies
        torch.empty(3).detach()
        assert counter.operations == 1
        (a @ a.t() + 1).sum()
    assert counter.operations == 4


def test_counts_of_each_system():
    model = AutoModelForProbedGeneration.from_causal_lm(make_lm())
    model.add_probe("gate", fresh_config("gate", HIDDEN, LAYERS))
    model.add_probe("reply", fresh_config("gate", HIDDEN, LAYERS, token_scope="response"))
    rows = count_operations(model, (5, 9), 2, fresh_config("mha", HIDDEN, LAYERS))
    names = ["base", "gate", "reply", "2 x mha"]
    assert [(row["tokens"], row["system"]) for row in rows] == [(tokens, name) for tokens in (5, 9) for name in names]
    base, gate, reply, many = rows[:4]
    assert base["prefill_ratio"] == base["step_ratio"] == 1 and gate["step"] == base["step"] == many["step"]
    assert base["prefill"] < gate["prefill"] < many["prefill"]
    assert reply["step"] > base["step"] and reply["step_ratio"] == reply["step"] / base["step"]
    assert all(len(line) == len(columns(rows)[0]) for line in columns(rows)[1])
