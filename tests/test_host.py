"""Heads on a model: attached, switched, saved and removed by name."""

import threading

import pytest
import torch
from conftest import make_lm, make_probe

from llama_probe import LlamaForProbedGeneration, ProbeConfig, ProbeError
from llama_probe.files import save_head


@pytest.fixture
def model():
    return LlamaForProbedGeneration.from_causal_lm(make_lm())


@pytest.fixture
def folder(tmp_path):
    return save_head(make_probe(base_model_name_or_path="org/other"), tmp_path / "toxic")


def test_several_heads_with_their_own_labels(model, prompts):
    model.add_probe("a", make_probe(id2label={0: "no", 1: "yes"}))
    model.add_probe("b", make_probe(seed=1, num_labels=5))
    assert model.active_probes == ["a", "b"]
    out = model(prompts)
    assert out.probe_logits["a"].shape == (3, 2) and out.probe_logits["b"].shape == (3, 5)
    assert set(out.probe_labels["a"]) <= {"no", "yes"}


def test_switching_and_deleting(model, prompts):
    model.add_probe("a", make_probe())
    model.add_probe("b", make_probe(seed=1))
    model.set_active_probes("b")
    assert list(model(prompts).probe_logits) == ["b"]
    model.set_active_probes(["b", "a", "b"])
    assert model.active_probes == ["b", "a"]
    model.delete_probe("b")
    assert model.active_probes == ["a"] and list(model.probes) == ["a"]


def test_a_fresh_head_takes_the_backbones_sizes(model):
    head = model.add_probe("new", ProbeConfig(probe_type="gate", num_labels=4))
    assert head.config.hidden_size == 32 and head.config.num_hidden_layers == 4
    assert head.config.base_model_type == "llama" and not head.training


def test_load_and_save(model, folder, tmp_path):
    assert model.load_probe(folder) == "toxic"
    assert model.load_probe(folder, name="again") == "again"
    saved = model.save_probe(tmp_path / "saved", "again")
    assert (saved / "probe_model.safetensors").read_bytes() == (folder / "probe_model.safetensors").read_bytes()


def test_another_base_model_warns_or_raises(model, folder, caplog):
    model.config._name_or_path = "org/this"
    with pytest.raises(ProbeError, match="was trained on org/other, this backbone is org/this"):
        model.load_probe(folder, strict=True)
    assert not model.probes
    model.load_probe(folder)
    model.config._name_or_path = "/somewhere/else/Other"
    model.load_probe(folder, name="copy", strict=True)


@pytest.mark.parametrize("name", ["a.b", "", "a b", "../a", "ä", None, 3])
def test_names(model, name):
    with pytest.raises(ProbeError, match="cannot name a head"):
        model.add_probe(name, make_probe())


def test_refusals_leave_the_model_as_it_was(model, folder, tmp_path):
    model.add_probe("a", make_probe())
    before = model.probes["a"]
    attempts = [
        (lambda: model.add_probe("a", make_probe(seed=1)), "attached already"),
        (lambda: model.load_probe(folder, name="a"), "attached already"),
        (lambda: model.add_probe("b", make_probe(hidden_size=64)), "hidden_size=64"),
        (lambda: model.add_probe("b", make_probe(num_hidden_layers=3)), "num_hidden_layers=3"),
        (lambda: model.load_probe(tmp_path / "nowhere"), "neither a folder nor a bundled head"),
        (lambda: model.load_probe(tmp_path), "cannot name a head|not a head folder"),
        (lambda: model.set_active_probes(["a", "zzz"]), "no head 'zzz' is attached; attached: a"),
        (lambda: model.delete_probe("zzz"), "no head 'zzz'"),
        (lambda: model.save_probe(tmp_path / "x", "zzz"), "no head 'zzz'"),
    ]
    for attempt, words in attempts:
        with pytest.raises(ProbeError, match=words):
            attempt()
        assert model.active_probes == ["a"] and model.probes["a"] is before and len(model.probes) == 1


def test_which_head_to_save(model, tmp_path):
    with pytest.raises(ProbeError, match="none is attached"):
        model.save_probe(tmp_path)
    model.add_probe("a", make_probe())
    model.save_probe(tmp_path)
    model.add_probe("b", make_probe())
    with pytest.raises(ProbeError, match="name the head to save: a, b"):
        model.save_probe(tmp_path)


def test_heads_may_come_and_go_while_another_thread_generates(model, prompts):
    model.add_probe("fixed", make_probe())
    expected = model.generate(prompts, max_new_tokens=2).probe_logits["fixed"]
    stop, errors = threading.Event(), []

    def swap():
        while not stop.is_set():
            model.add_probe("other", make_probe(seed=1, probe_type="gate"))
            model.delete_probe("other")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(20):
            found = model.generate(prompts, max_new_tokens=2).probe_logits["fixed"]
            if not torch.allclose(found, expected, atol=1e-5):
                errors.append(found)
    finally:
        stop.set()
        thread.join()
    assert not errors
