"""The benchmark of serving, by a clock whose every reading is one second after the last."""

import itertools

import pytest
import torch
from conftest import make_lm, make_probe, save_head

from llama_probe import ProbeError
from llama_probe.experiments import meters
from llama_probe.experiments.benchmark_options import BenchmarkOptions
from llama_probe.experiments.systems import BASE, Systems, load_systems, measure_costs, row
from llama_probe.serving.auto import AutoModelForProbedGeneration


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(meters, "perf_counter", lambda: float(next(ticks)))


def options(backbone, **changes):
    values = {"tokens": [6], "kind": ["gate"], "many": 0, "pairs": 2, "device": "cpu"}
    return BenchmarkOptions(str(backbone), **{**values, **changes})


def test_every_system_under_every_load(backbone_folder):
    report = measure_costs(options(backbone_folder, tokens=[6, 9], batch_size=[1, 2], many=2, random_weights=True))
    names = ["base", "gate", "2 x mha"]
    loads = [(costs["batch_size"], costs["tokens"], costs["system"]) for costs in report["rows"]]
    assert loads == [(*load, name) for load in ((1, 6), (1, 9), (2, 6), (2, 9)) for name in names]
    for costs in report["rows"]:
        # Two readings a call, one second apart, for plain model and system alike.
        assert costs["ms"]["median"] == 1000 and costs["ratio"]["median"] == 1 and costs["step_ms"] is None
    memory = [costs["above_base_mb"] for costs in report["rows"][:3]]
    assert memory[0] == 0 < memory[1] < memory[2]
    parameters = sum(p.numel() for p in make_lm(vocab_size=260).parameters())
    assert report["backbone"] == {"name": "tiny-chat", "num_parameters": parameters, "dtype": "float32"}
    assert report["settings"]["tokens"] == [6, 9] and report["environment"]["device"] == "cpu"


def test_the_time_of_further_tokens(backbone_folder):
    for costs in measure_costs(options(backbone_folder, new_tokens=3))["rows"]:
        # Readings: start, three tokens, end.
        assert costs["ms"]["median"] == 4000 and costs["step_ms"]["median"] == 1000
        assert costs["step_ratio"]["median"] == 1


def test_ones_own_heads(backbone_folder, tmp_path):
    save_head(make_probe(probe_type="mha"), tmp_path / "mha")
    own = options(backbone_folder, probe=[str(tmp_path / "mha")], kind=None)
    assert own.kind == [] and list(load_systems(own).heads)[1:] == ["mha"]
    with pytest.raises(ProbeError, match="'mha'"):
        load_systems(options(backbone_folder, probe=own.probe, kind=["mha"]))


def test_ratios_are_medians_of_pairs():
    pairs = [(1.0, 3.0), (4.0, 4.0), (5.0, 10.0)]
    ratios = row([((a, a / 2), (b, 2 * b)) for a, b in pairs], 750_000)
    assert ratios["ratio"] == {"median": 2.0, "quartiles": [1.5, 2.5], "runs": 3}
    assert ratios["step_ratio"]["median"] == 8.0
    assert ratios["ms"]["median"] == 4000 and ratios["step_ms"]["median"] == 8000 and ratios["above_base_mb"] == 0.75
    plain = row([((2.0, None), (2.0, None))], 0)
    assert plain["ratio"]["median"] == 1 and plain["step_ratio"] is plain["step_ms"] is None


WRONG = {"lstm": {"kind": ["lstm"]}, "pairs": {"pairs": 0}, "device": {"device": "abacus"}, "dtype": {"dtype": "int8"}}
GONE = {"backbone": "./no/such"}


@pytest.mark.parametrize("named, changes", [*WRONG.items(), ("such", GONE), ("such", GONE | {"random_weights": True})])
def test_values_that_are_not_allowed(backbone_folder, named, changes):
    with pytest.raises(ProbeError, match=named):
        load_systems(options(**{"backbone": backbone_folder, **changes}))


def test_a_reply_has_exactly_as_many_tokens_as_asked():
    """An end-of-sequence token does not end it, and every token is reported."""
    systems = Systems(AutoModelForProbedGeneration.from_causal_lm(make_lm()))
    prompts, heard = systems.draw(1, 5), []
    assert torch.equal(prompts["input_ids"], systems.draw(1, 5)["input_ids"]), "the same in every run"
    systems.plain.generation_config.eos_token_id = int(systems.serve(BASE, prompts)[0, -1])
    assert systems.serve(BASE, prompts, 6, lambda: heard.append(1)).shape == (1, 11)
    assert len(heard) == 6
