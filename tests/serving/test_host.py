"""Heads on a model: attached, switched, saved and removed by name."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_probe, make_prompts, padded, probed, save_head
from observers import assert_no_hooks

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.heads import probe_types


@pytest.fixture
def model():
    return probed()


@pytest.fixture
def folder(tmp_path):
    return save_head(make_probe(base_model_name_or_path="org/other"), tmp_path / "toxic")


def test_switching_disabling_and_deleting(model, prompts):
    model.add_probe("a", make_probe())
    model.add_probe("b", make_probe(seed=1))
    model.set_active_probes("b")
    assert list(model(prompts).probe_logits) == ["b"]
    with pytest.raises(KeyError), model.disable_probes():
        assert model.active_probes == [] and not hasattr(model(prompts), "probe_logits")
        raise KeyError
    assert model.active_probes == ["b"]
    model.set_active_probes(["b", "a", "b"])
    assert model.active_probes == ["b", "a"]
    with model.disable_probes() as plain:
        plain.delete_probe("b")
    assert model.active_probes == ["a"] and list(model.probes) == ["a"]
    del model.probes["a"]  # an `nn.ModuleDict` cannot be kept from that
    assert model.active_probes == []


def test_heads_score_alike_while_the_lm_is_trained_and_have_gradients(model, prompts):
    """`model.train()`, as for a LoRA, reaches the heads, whose dropouts are for their own training."""
    for head_type in probe_types():
        model.add_probe(head_type, make_probe(probe_type=head_type, dropout=0.5, layer_dropout=0.5))
    model.add_probe("both", make_probe(dropout=0.5, token_scope="all"))
    call = {"attention_mask": padded(prompts)}

    def scores():
        out = model.generate(prompts, max_new_tokens=4, **call)
        return [out.probe_logits, out.probe_token_logits, model.classify(prompts, **call)["mha"].logits]

    before, logits = scores(), model(prompts, **call).probe_logits
    assert not any(each.requires_grad for each in logits.values()), "in eval mode a pass keeps nothing"
    model.train()
    for found, expected in zip(scores(), before, strict=True):
        torch.testing.assert_close(found, expected)
    trained = model(prompts, **call).probe_logits
    torch.testing.assert_close(trained, logits)
    for name, head in model.probes.items():
        model.zero_grad()
        trained[name].sum().backward(retain_graph=True)
        assert all(parameter.grad is not None for parameter in head.classifier.parameters())
        assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_heads_are_fp32_whatever_the_default_dtype_is(model, folder, prompts):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model.load_probe(folder)
        for head_type in probe_types():
            model.add_probe(head_type, ProbeConfig(probe_type=head_type, downcast=4))
        out = model.generate(prompts, max_new_tokens=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in (*model.probes.parameters(), *out.probe_logits.values())} == {torch.float32}
    assert not any(head.training for head in model.probes.values())
    torch.testing.assert_close(out.probe_logits["toxic"], model.classify(prompts)["toxic"].logits)


def test_load_and_save(model, folder, tmp_path):
    assert model.load_probe(folder) == "toxic"
    assert model.load_probe(folder, name="again") == "again"
    saved = model.save_probe(tmp_path / "saved", "again")
    assert {path.name for path in saved.iterdir()} == {"README.md", "probe_config.json", "probe_model.safetensors"}
    assert (saved / "probe_model.safetensors").read_bytes() == (folder / "probe_model.safetensors").read_bytes()
    model.config._name_or_path = "org/this"
    with pytest.raises(ProbeError, match=r"org/other.*org/this"):
        model.load_probe(folder, "third", strict=True)
    assert model.active_probes == ["toxic", "again"]
    model.config._name_or_path = "/somewhere/else/Other"
    model.load_probe(folder, "third", strict=True)


def test_refusals_leave_the_model_as_it_was(model, folder, tmp_path):
    model.add_probe("a", make_probe())
    before = model.probes["a"]
    attempts = [
        (lambda: model.add_probe("a", make_probe(hidden_size=64)), "'a'"),  # before the head is looked at
        (lambda: model.load_probe(folder, name="a"), "'a'"),
        (lambda: model.load_probe(None), "NoneType"),
        (lambda: model.add_probe("a.b", make_probe()), "cannot name"),
        (lambda: model.add_probe("b", str(folder)), "a ProbeConfig, not str; load_probe takes a folder"),
        (lambda: model.from_causal_lm(model, [ProbeConfig()]), "not as ProbeConfig"),
        (lambda: ProbeModel(ProbeConfig(), backbone="demo"), "a loaded model, not 'demo'"),
        (lambda: model.add_probe("train", make_probe()), "cannot name"),
        (lambda: model.add_probe("b", make_probe(hidden_size=64)), "hidden_size=64"),
        (lambda: model.add_probe("b", make_probe(num_hidden_layers=3)), "num_hidden_layers=3"),
        (lambda: model.load_probe(tmp_path / "nowhere"), "nowhere"),
        (lambda: model.load_probe(tmp_path), "head"),
        (lambda: model.set_active_probes(["a", "zzz"]), "'zzz'.* a$"),
        (lambda: model.delete_probe("zzz"), "'zzz'"),
        (lambda: model.save_probe(tmp_path / "x", "zzz"), "'zzz'"),
        (lambda: probed().save_probe(tmp_path), "none is attached"),
    ]
    for attempt, words in attempts:
        with pytest.raises(ProbeError, match=words):
            attempt()
        assert model.active_probes == ["a"] and model.probes["a"] is before and len(model.probes) == 1


def test_heads_of_one_call(model, prompts):
    model.add_probe("a", make_probe())
    model.add_probe("b", make_probe(seed=1, num_labels=3))
    both = model.classify(prompts)
    model.set_active_probes("a")
    for probes, names in ((None, ["a"]), ("b", ["b"]), (["b", "a"], ["b", "a"])):
        generated = model.generate(prompts, max_new_tokens=1, probes=probes).probe_logits
        passed, classified = model(prompts, probes=probes).probe_logits, model.classify(prompts, probes=probes)
        assert list(generated) == list(passed) == list(classified) == names
        for name in names:
            for logits in (generated[name], passed[name], classified[name].logits):
                torch.testing.assert_close(logits, both[name].logits)
    assert model.active_probes == ["a"]
    assert isinstance(model.generate(prompts, max_new_tokens=1, probes=[]), torch.Tensor)
    assert not hasattr(model(prompts, probes=[]), "probe_logits")
    model.set_active_probes([])
    assert list(model.generate(prompts, max_new_tokens=1, probes=["a"]).probe_logits) == ["a"]
    for call in (model.generate, model, model.classify):
        with pytest.raises(ProbeError, match=r"'c'.* a, b"):
            call(prompts, probes=["a", "c"])


def test_heads_may_be_loaded_swapped_and_deleted_while_others_generate(model, folder):
    model.add_probe("gate", make_probe(probe_type="gate"))
    model.add_probe("mha", make_probe(seed=1, probe_type="mha"))

    def use(names):
        """Use heads in every way; all that is active for None, among which are always these two."""
        kwargs = {"max_new_tokens": 3, "probes": names, "eos_token_id": None}
        first = model.generate(make_prompts(2), probe_state=names is not None, prefill_chunk_size=4, **kwargs)
        outputs = [first, model(make_prompts(2), probes=names)]
        if names is not None:
            ids = torch.cat([first.sequences, make_prompts(2, 3, seed=50)], 1)
            outputs.append(model.generate(ids, cache=first.cache, probe_state=first.probe_state, **kwargs))
        return [{name: output.probe_logits[name] for name in names or ("gate", "mha")} for output in outputs]

    def use_as_now(names):
        expected = use(names)
        return lambda: torch.testing.assert_close(use(names), expected, atol=1e-5, rtol=1e-5)

    def swap():
        model.load_probe(folder)
        model.set_active_probes(["toxic", "gate", "mha"])
        model.delete_probe("toxic")

    interval, jobs = sys.getswitchinterval(), [*map(use_as_now, (["gate"], ["mha"], None)), swap]
    sys.setswitchinterval(1e-5)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(lambda job: [job() for _ in range(5)], jobs))
    finally:
        sys.setswitchinterval(interval)
    assert list(model.probes) == ["gate", "mha"] and set(model.active_probes) == {"gate", "mha"}
    assert_no_hooks(model)
