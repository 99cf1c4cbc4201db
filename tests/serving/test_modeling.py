"""The probed classes: forward, classify, saving the backbone, and what they are made from."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from conftest import LAYERS, expected_logits, make_lm, make_probe, padded, probed
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_families import tiny
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
)

from llama_probe import (
    AutoModelForProbedGeneration,
    LlamaForProbedGeneration,
    ProbeCache,
    ProbeConfig,
    ProbeError,
    ProbeModel,
)
from llama_probe.serving import modeling


@pytest.fixture
def model():
    heads = {"a": make_probe(id2label={0: "no", 1: "yes"}), "b": make_probe(seed=1, probe_type="gate", num_labels=3)}
    return probed(heads)


class TestForward:
    def test_equals_the_plain_output_and_adds_logits(self, model, prompts):
        mask = padded(prompts)
        plain = make_lm()(prompts, attention_mask=mask, labels=prompts)
        out = model(prompts, attention_mask=mask, labels=prompts)
        assert torch.equal(out.logits, plain.logits) and torch.equal(out.loss, plain.loss)
        for name in ("a", "b"):
            torch.testing.assert_close(out.probe_logits[name], expected_logits(model.probes[name], prompts, mask))
        assert out.probe_labels["a"] == model.classify(prompts, mask)["a"].labels

    def test_positional_arguments_and_tuples(self, model, prompts):
        out = model(prompts, torch.ones_like(prompts), return_dict=False)
        assert torch.equal(out[0], make_lm()(prompts).logits)
        torch.testing.assert_close(out[-1]["a"], expected_logits(model.probes["a"], prompts))
        assert isinstance(model(prompts, probe_state=True, return_dict=False)[-1], ProbeCache)

    @torch.no_grad()
    def test_what_goes_on_from_a_cache_that_no_head_has_read_says_so(self, model, prompts, monkeypatch):
        """As under PEFT's prefix tuning; a decoding step does not."""
        said = []
        monkeypatch.setattr(modeling.logger, "warning_once", said.append)
        first = model(prompts, use_cache=True)
        step = model(prompts[:, :1], cache=copy.deepcopy(first.cache))
        assert step.probe_logits is None and step.probe_labels is None
        model(prompts, cache=copy.deepcopy(first.cache), probe_state=first.probe_state)
        model(prompts, cache=copy.deepcopy(first.cache), probes=[])
        assert not said
        tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        assert tuned(input_ids=prompts, attention_mask=torch.ones_like(prompts)).probe_logits is None
        assert len(said) == 1 and "probe_logits is None" in said[0] and "get_base_model().classify" in said[0]
        found = tuned.get_base_model().classify(prompts)["a"].logits
        torch.testing.assert_close(found, expected_logits(model.probes["a"], prompts))


@pytest.mark.parametrize("read, last", [([1, 2], 2), ([0], 1), ([LAYERS], LAYERS)])
def test_classify_ends_with_the_last_layer_that_a_head_reads(prompts, read, last):
    model = probed({"a": make_probe(layers=read), "b": make_probe(layers=[0])})
    expected, ran = model(prompts).probe_logits, []
    for number, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append("LM head"))
    found = model.classify(prompts)
    assert ran == list(range(1, last + 1))
    torch.testing.assert_close({name: output.logits for name, output in found.items()}, expected)


class TestSavingTheBackbone:
    def test_writes_what_the_plain_class_writes(self, model, tmp_path):
        make_lm().save_pretrained(tmp_path / "plain")
        for state_dict in (None, model.state_dict()):  # the Trainer gives one, with the tensors of heads
            model.save_pretrained(tmp_path / "probed", state_dict=state_dict, save_probes=False)
            for path in (tmp_path / "plain").iterdir():
                assert (tmp_path / "probed" / path.name).read_bytes() == path.read_bytes()
            assert len(list((tmp_path / "probed").iterdir())) == len(list((tmp_path / "plain").iterdir()))
        assert json.loads((tmp_path / "probed" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert type(model) is LlamaForProbedGeneration and set(model.probes) == {"a", "b"}

    @pytest.mark.parametrize("how", ["saved", "pushed", "saved and pushed"])
    def test_heads_are_kept_and_attached_again(self, model, prompts, tmp_path, token, how):
        place = tmp_path / "here" if how == "saved" else "alice/guarded"
        if how == "pushed":
            model.push_to_hub(place)
        else:
            hub = {} if how == "saved" else {"push_to_hub": True, "repo_id": place}
            model.save_pretrained(tmp_path / "here", **hub)
        expected = model(prompts).probe_logits
        for cls in (AutoModelForProbedGeneration, LlamaForProbedGeneration):
            loaded = cls.from_pretrained(place)
            torch.testing.assert_close(loaded(prompts).probe_logits, expected)
            assert loaded.loss_type == make_lm().loss_type
            assert cls.from_pretrained(place, probe=[]).active_probes == []
            if how == "saved":
                assert cls.from_pretrained(tmp_path, subfolder="here/").active_probes == ["a", "b"]
        assert type(AutoModelForCausalLM.from_pretrained(place)) is LlamaForCausalLM, "it takes heads by probe= alone"
        assert not hasattr(model.config, "probe_heads")
        loaded.save_pretrained(tmp_path / "again", save_probes=False)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) is LlamaForCausalLM

    def test_the_code_of_its_repository_is_taken_along(self, prompts, tmp_path):
        make_lm().save_pretrained(tmp_path / "lm")
        code = "from transformers import LlamaForCausalLM\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
        (tmp_path / "lm" / "modeling_own.py").write_text(code)
        config = json.loads((tmp_path / "lm" / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
        load = partial(AutoModelForProbedGeneration.from_pretrained, trust_remote_code=True)
        load(tmp_path / "lm", probe={"a": make_probe()}).save_pretrained(tmp_path / "saved")
        loaded = load(tmp_path / "saved")
        assert type(loaded).__name__ == "OwnForProbedGeneration" and loaded.active_probes == ["a"]
        assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {"modeling_own.py"}

    def test_an_adapter_brings_the_heads_of_its_backbone(self, model, prompts, tmp_path):
        model.save_pretrained(tmp_path / "guarded")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "guarded", probe=[])
        get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
        loaded = AutoModelForProbedGeneration.from_pretrained(tmp_path / "lora", probe_strict=True)
        torch.testing.assert_close(loaded(prompts).probe_logits, model(prompts).probe_logits)
        by_alias = AutoModelForCausalLM.from_pretrained(tmp_path / "lora", probe="a")
        assert by_alias.active_probes == ["a"]

    def test_heads_that_are_listed_and_missing(self, model, tmp_path, monkeypatch):
        """A plain class copies the list without the heads. A guard that is not there is not left out in silence."""
        model.save_pretrained(tmp_path)
        shutil.rmtree(tmp_path / "probes" / "a")
        monkeypatch.chdir(tmp_path)
        for place in (tmp_path, "."):
            with pytest.raises(ProbeError, match=r"probes/a' is neither a folder"):
                AutoModelForProbedGeneration.from_pretrained(place)
        assert AutoModelForCausalLM.from_pretrained(tmp_path, probe=[]).active_probes == []

    def test_a_save_that_fails(self, model, tmp_path, monkeypatch):
        """One that is refused writes nothing. Heads are there before the config that lists them."""
        with pytest.raises(ProbeError, match="create_pr"):
            model.save_pretrained(tmp_path / "new", push_to_hub=True, create_pr=True)
        assert not (tmp_path / "new").exists()
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save_pretrained(tmp_path / "new")
        assert {path.name for path in (tmp_path / "new" / "probes").iterdir()} == {"a", "b"}

    def test_heads_know_the_backbone_under_its_new_name(self, lm, hub, token):
        lm.config._name_or_path = "org/tiny"
        head = ProbeModel(ProbeConfig(probe_type="gate"), backbone=lm)
        LlamaForProbedGeneration.from_causal_lm(lm, head).push_to_hub("alice/guarded")
        LlamaForProbedGeneration.from_pretrained("alice/guarded", probe_strict=True)
        assert b"library_name: transformers" in hub.files("alice/guarded")["README.md"], "the page is the model's"


class TestConversion:
    def test_a_model_that_is_refused_is_left_alone(self, lm, prompts):
        """A forward in the instance stands before that of any class, and heads would not run."""
        lm.forward = torch.compile(lm.forward, backend="eager")
        misfit = {"good": make_probe(), "bad": make_probe(num_hidden_layers=7)}
        for each, heads, words in ((make_lm(), misfit, "num_hidden_layers=7"), (lm, None, r"model\.forward")):
            with pytest.raises(ProbeError, match=words):
                AutoModelForProbedGeneration.from_causal_lm(each, heads)
            assert type(each) is LlamaForCausalLM and not hasattr(each, "probes")
        del lm.forward
        LlamaForProbedGeneration.from_causal_lm(lm, {"a": make_probe()})
        torch.testing.assert_close(lm(prompts).probe_logits["a"], expected_logits(make_probe(), prompts))

    def test_a_head_is_read_before_the_backbone(self, tmp_path):
        make_lm().config.save_pretrained(tmp_path)  # and no weights
        with pytest.raises(ProbeError, match="no-such-head"):
            LlamaForProbedGeneration.from_pretrained(tmp_path, probe="no-such-head")
        with pytest.raises(ProbeError, match="AutoModelForProbedGeneration"):
            LlamaForProbedGeneration.from_causal_lm(tiny("mistral"))
