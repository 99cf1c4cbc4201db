"""The benchmark of serving, by a clock whose every reading is one second after the last."""

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from conftest import make_lm, make_probe, save_head
from tiny_guards import BERT
from torch._dynamo.testing import CompileCounter

from llama_probe import ProbeError
from llama_probe.experiments.benchmark import measure
from llama_probe.experiments.benchmark.measure import Timing, time_pairs
from llama_probe.experiments.benchmark.models import ModelPlan
from llama_probe.experiments.benchmark.options import BenchmarkOptions
from llama_probe.experiments.benchmark.serving_benchmark import ServingBenchmark, row
from llama_probe.experiments.benchmark.serving_systems import BASE, Load, System


CPU = torch.device("cpu")


@pytest.fixture
def folder(backbone_folder):
    return str(backbone_folder)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(measure, "perf_counter", lambda: float(next(ticks)))


def create(folder, **changes):
    values = {"tokens": [6], "kinds": ["gate"], "many": 0, "naive": False, "pairs": 2, "warmup": 0, "device": "cpu"}
    return ServingBenchmark(BenchmarkOptions(folder, **{**values, **changes}))


@pytest.fixture
def guard(tmp_path):
    BERT.save_pretrained(tmp_path / "guard")
    return str(tmp_path / "guard")


def test_every_system_under_every_load(folder, guard):
    bench = create(
        folder, tokens=[6, 9], batch_sizes=[1, 2], kinds=["gate", "mha"], many=2, naive=True, guards=[guard],
        random_weights=True,
    )  # fmt: skip
    report = bench.execute()
    names = ["base", "base again", "gate", "mha", "2 x mha", "naive gate", "naive mha", "guard guard"]
    loads = [(1, 6), (1, 9), (2, 6), (2, 9)]
    found = [(found["batch_size"], found["tokens"], found["system"]) for found in report["rows"]]
    assert found == [(*load, name) for load in loads for name in names]
    for found in report["rows"]:
        # Two readings a call, one second apart, for plain model and system alike.
        assert found["ms"]["median"] == 1000
        assert (found["ratio"] or {"median": 1.0})["median"] == 1.0 and found["step_ms"] is None
        assert (found["ratio"] is None) == (found["system"] == "base")
    rows = {found["system"]: found for found in report["rows"][:8]}
    assert rows["base"]["above_base_mb"] == rows["base again"]["above_base_mb"] == 0
    assert 0 < rows["gate"]["above_base_mb"] < rows["mha"]["above_base_mb"] < rows["2 x mha"]["above_base_mb"]
    assert rows["guard guard"]["above_base_mb"] > 0
    assert report["backbone"] == {
        "name": "tiny-chat", "num_parameters": sum(p.numel() for p in make_lm(vocab_size=260).parameters()),
        "num_hidden_layers": 4, "hidden_size": 32, "dtype": "float32",
    }  # fmt: skip
    assert report["settings"]["tokens"] == [6, 9] and report["environment"]["device"] == "cpu"


def test_the_time_of_further_tokens(folder):
    report = create(folder, new_tokens=3).execute()
    for found in report["rows"]:
        # Readings: start, three tokens, end.
        assert found["ms"]["median"] == 4000 and found["step_ms"]["median"] == 1000
    assert report["rows"][0]["step_ratio"] is None and report["rows"][1]["step_ratio"]["median"] == 1


def test_the_backbone_compiled(tmp_path, monkeypatch):
    """Each load and system compiles once."""
    make_lm(num_hidden_layers=1).save_pretrained(tmp_path)  # compiles in a moment
    folder, counter = str(tmp_path), CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    report = create(folder, tokens=[6, 7], pairs=1, compile=True).execute()
    # A load compiles the plain model, twice, and the one with heads.
    assert counter.frame_count == 2 * (1 + 2)
    assert report["settings"]["compile"] and all(found["above_base_mb"] is None for found in report["rows"])


def test_ones_own_heads(folder, tmp_path, monkeypatch):
    save_head(make_probe(probe_type="mha"), tmp_path / "mine")
    assert create(folder, probes=[str(tmp_path / "mine")], kinds=None).options.kinds == ()
    report = create(folder, probes=[str(tmp_path / "mine")], kinds=["mha"]).execute()
    first, second = report["rows"][2:]
    assert (first["system"], second["system"]) == ("mine", "mha") and first["paper_ratio"] == second["paper_ratio"]
    (tmp_path / "mine").rename(tmp_path / "mha")
    monkeypatch.setattr(ModelPlan, "load", lambda *args: pytest.fail("refused too late"))
    for changes in ({"probes": [str(tmp_path / "mha")], "kinds": ["mha"]}, {"kinds": ["mha", "mha"]}):
        with pytest.raises(ProbeError, match="'mha'"):
            create(folder, **changes).execute()


def test_the_order_of_pairs_alternates():
    log = []
    first, second = (lambda _, name=name: log.append(name) for name in "ab")
    timed = time_pairs(first, second, 3, 1, CPU)
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"] and timed == [(Timing(1.0), Timing(1.0))] * 3


PLAIN = [(Timing(2.0, 0.5), Timing(2.0, 0.5))]


def make_row(pairs=PLAIN, memory=None, batch=1, tokens=8, new_tokens=1, paper=None, name="mine"):
    load = Load.create(batch, tokens, new_tokens, 50, CPU)
    return row(System(name, None, 500_000, paper), load, pairs, memory)


def test_ratios_are_medians_of_pairs():
    """The median of the paired ratios is not the ratio of the medians."""
    pairs = [(1.0, 3.0), (4.0, 4.0), (5.0, 10.0)]
    pairs = [(Timing(a, a / 2), Timing(b, 2 * b)) for a, b in pairs]
    found = make_row(pairs, 250_000, batch=2, new_tokens=2)
    assert found["ratio"] == {"median": 2.0, "quartiles": [1.5, 2.5], "runs": 3}
    assert found["step_ratio"]["median"] == 8.0
    assert found["ms"]["median"] == 4000 and found["step_ms"]["median"] == 8000 and found["above_base_mb"] == 0.75


def test_values_that_are_not_defined_or_not_known():
    found = make_row(name=BASE)
    assert found["ratio"] is None and found["step_ratio"] is None and found["above_base_mb"] is None


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"paper": "mha"}, 40.27 / 26.43),
        ({"paper": "t5-large", "tokens": 512}, 88.33 / 26.43),
        ({"paper": "mha", "tokens": 513}, None),
        ({"paper": "mha", "batch": 2}, None),
        ({"paper": "mha", "new_tokens": 2}, None),
        ({"paper": "attentive"}, None),
    ],
)
def test_the_papers_ratio_is_for_the_papers_load(changes, expected):
    assert make_row(**changes)["paper_ratio"] == (expected and pytest.approx(expected))


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"many": -1}, "many"),
        ({"tokens": [512]}, "512 positions"),
        ({"kinds": ["lstm"]}, "lstm"),
        ({"device": "abacus"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"guards": ["no/such"], "random_weights": True}, "no/such"),
        ({"guards": ["{guard}"], "tokens": [65], "random_weights": True}, "64 positions"),
        ({"probes": ["nothing"]}, "nothing"),
    ],
)
def test_refusals_come_before_any_weights_are_loaded(folder, guard, changes, field, monkeypatch):
    monkeypatch.setattr(ModelPlan, "load", lambda *_: pytest.fail("refused after work was done"))
    changes["guards"] = [name.format(guard=guard) for name in changes.get("guards", ())]
    with pytest.raises(ProbeError, match=field):
        create(folder, **changes).execute()


def test_one_guard_at_a_time(folder, guard, tmp_path, monkeypatch):
    """A guard is freed before the next one is loaded."""
    alive, original = [], ModelPlan.load

    def load(plan, device):
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        loaded = original(plan, device)
        if plan.name != folder:
            alive.append(weakref.ref(loaded))
        return loaded

    BERT.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(ModelPlan, "load", load)
    create(folder, pairs=1, kinds=[], guards=[guard, str(tmp_path / "other")], random_weights=True).execute()
    assert len(alive) == 2
