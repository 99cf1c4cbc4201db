"""The benchmark of serving, by a clock whose every reading is one second after the last."""

import itertools

import pytest
import torch
from conftest import make_lm, make_probe, save_head

from llama_probe import ProbeError
from llama_probe.experiments import meters, systems
from llama_probe.experiments.benchmark_options import SHAPE, BenchmarkOptions
from llama_probe.experiments.systems import BASE, Systems, fresh_config, load_systems, measure_costs, row
from llama_probe.serving.auto import AutoModelForProbedGeneration


@pytest.fixture
def folder(backbone_folder):
    return str(backbone_folder)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(meters, "perf_counter", lambda: float(next(ticks)))


def options(folder, **changes):
    values = {"tokens": [6], "kind": ["gate"], "many": 0, "pairs": 2, "device": "cpu"}
    return BenchmarkOptions(folder, **{**values, **changes})


def test_every_system_under_every_load(folder):
    report = measure_costs(
        options(folder, tokens=[6, 9], batch_size=[1, 2], kind=["gate", "mha"], many=2, random_weights=True)
    )
    names = ["base", "base again", "gate", "mha", "2 x mha"]
    found = [(found["batch_size"], found["tokens"], found["system"]) for found in report["rows"]]
    assert found == [(*load, name) for load in ((1, 6), (1, 9), (2, 6), (2, 9)) for name in names]
    for found in report["rows"]:
        # Two readings a call, one second apart, for plain model and system alike.
        assert found["ms"]["median"] == 1000
        assert (found["ratio"] or {"median": 1.0})["median"] == 1.0 and found["step_ms"] is None
        assert (found["ratio"] is None) == (found["system"] == BASE)
    memory = [found["above_base_mb"] for found in report["rows"][:5]]
    assert memory[0] == memory[1] == 0 < memory[2] < memory[3] < memory[4]
    parameters = sum(p.numel() for p in make_lm(vocab_size=260).parameters())
    assert report["backbone"] == {"name": "tiny-chat", "num_parameters": parameters, "dtype": "float32"}
    assert report["settings"]["tokens"] == [6, 9] and report["environment"]["device"] == "cpu"


def test_the_time_of_further_tokens(folder):
    report = measure_costs(options(folder, new_tokens=3))
    for found in report["rows"]:
        # Readings: start, three tokens, end.
        assert found["ms"]["median"] == 4000 and found["step_ms"]["median"] == 1000
    assert report["rows"][0]["step_ratio"] is None and report["rows"][1]["step_ratio"]["median"] == 1


def test_ones_own_heads(folder, tmp_path):
    save_head(make_probe(probe_type="mha"), tmp_path / "mine")
    assert options(folder, probe=[str(tmp_path / "mine")], kind=None).kind == []
    report = measure_costs(options(folder, probe=[str(tmp_path / "mine")], kind=["mha"]))
    assert [found["system"] for found in report["rows"][2:]] == ["mine", "mha"]
    (tmp_path / "mine").rename(tmp_path / "mha")
    with pytest.raises(ProbeError, match="'mha'"):
        measure_costs(options(folder, probe=[str(tmp_path / "mha")], kind=["mha"]))


def test_a_shape_has_its_public_size(monkeypatch):
    monkeypatch.setattr(systems, "choose_device", lambda _: torch.device("meta"))
    lm = load_systems(options(SHAPE, kind=[], dtype="bfloat16", random_weights=True)).plain
    assert lm.num_parameters() == pytest.approx(3.213e9, rel=1e-3) and lm.dtype == torch.bfloat16


def test_ratios_are_medians_of_pairs():
    """The median of the paired ratios is not the ratio of the medians."""
    pairs = [(1.0, 3.0), (4.0, 4.0), (5.0, 10.0)]
    found = row([((a, a / 2), (b, 2 * b)) for a, b in pairs], 750_000)
    assert found["ratio"] == {"median": 2.0, "quartiles": [1.5, 2.5], "runs": 3}
    assert found["step_ratio"]["median"] == 8.0
    assert found["ms"]["median"] == 4000 and found["step_ms"]["median"] == 8000 and found["above_base_mb"] == 0.75
    plain = row([((2.0, None), (2.0, None))], 0, compared=False)
    assert plain["ratio"] is plain["step_ratio"] is plain["step_ms"] is None


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"kind": ["lstm"]}, "lstm"),
        ({"pairs": 0}, "pairs"),
        ({"device": "abacus"}, "device"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_values_that_are_not_allowed(folder, changes, field):
    with pytest.raises(ProbeError, match=field):
        options(folder, **changes)


def test_backbones_that_are_not_there(folder):
    for random_weights in (True, False):
        with pytest.raises(ProbeError, match="no/such"):
            load_systems(options("./no/such", random_weights=random_weights))


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_tokens_and_logits_are_the_same(new_tokens):
    model = AutoModelForProbedGeneration.from_causal_lm(make_lm())
    for kind in ("gate", "mha"):
        model.add_probe(kind, make_probe(probe_type=kind))
    systems = Systems(model, many=2)
    prompts = systems.draw(2, 11)
    assert torch.equal(prompts["input_ids"], systems.draw(2, 11)["input_ids"])
    expected, scores = systems.serve(BASE, prompts, new_tokens), model.classify(**prompts)
    assert expected.shape == (2, 11 + new_tokens)
    assert list(systems.heads) == ["base", "base again", "gate", "mha", "2 x mha"]
    for name, heads in systems.heads.items():
        out = systems.serve(name, prompts, new_tokens)
        assert torch.equal(out.sequences if heads else out, expected)
        if heads:
            assert list(out.probe_logits) == heads
            for head, logits in out.probe_logits.items():
                torch.testing.assert_close(logits, scores[head].logits, atol=1e-5, rtol=1e-5)


def test_a_reply_has_exactly_as_many_tokens_as_asked():
    """An end-of-sequence token does not end it, and every token is reported."""
    systems = Systems(AutoModelForProbedGeneration.from_causal_lm(make_lm()))
    prompts, heard = systems.draw(1, 5), []
    systems.plain.generation_config.eos_token_id = int(systems.serve(BASE, prompts)[0, -1])
    assert systems.serve(BASE, prompts, 6, lambda: heard.append(1)).shape == (1, 11)
    assert len(heard) == 6


@pytest.mark.parametrize(
    "kind, hidden_size, downcast, heads",
    [("mha", 3072, 32, 2), ("mha", 48, 16, 3), ("mha", 37, 1, 1), ("gate", 37, 32, 2)],
)
def test_fresh_heads_fit(kind, hidden_size, downcast, heads):
    config = fresh_config(kind, hidden_size, 3)
    assert (config.downcast, config.num_attention_heads, config.hidden_size) == (downcast, heads, hidden_size)
