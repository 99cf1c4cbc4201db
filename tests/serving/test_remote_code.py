"""The runtime in `modeling/`: what an exported repository runs without the package, compared with the package."""

import ast
import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerator import DEVICE, Accelerator
from cases import HEAD_TYPES, MULTI, REGRESSION
from conftest import make_lm, make_probe, make_prompts, make_tokenizer, padded, probed
from heads_runtime import heads_file
from repository import ROOT
from tiny_families import tiny
from transformers import DynamicCache, GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError
from llama_probe.heads.rules import TURN_SCOPES
from llama_probe.serving.export import FAMILIES, auto_map, export_repository, push_repository, runtime_files


USER, REPLY = 3, 4
TURNS = {"turn_markers": {"user": {"ids": [USER], "skip": 1}, "assistant": {"ids": [REPLY], "skip": 0}}}
TOPICS = {"probe_type": "gate", "id2label": {0: "a", 1: "b", 2: "c"}, **MULTI}
FORMS = {
    **HEAD_TYPES,
    "max": {"probe_type": "mha", "pool": "max"},
    "layers": {"probe_type": "gate", "layers": [0, 2], "normalize": "rms"},
    "content": {"probe_type": "multimax", "token_scope": "content", "prefix_ids": [make_prompts()[1, 0].item()]},
    "topics": {**TOPICS, "token_scope": "user", **TURNS},
    "length": {"probe_type": "gate", "id2label": {0: "n"}, **REGRESSION},
    "old": {"id2label": {0: "no", 1: "yes"}, "threshold": 0.999},
    "pair": {"id2label": {0: "no", 1: "yes"}},
    "guard": {"id2label": {0: "bad", 1: "fine"}, "flagged": ["bad"], "threshold": 0.4, "thresholds": {"all": 0.0}},
    **{scope: {"probe_type": "gate", "token_scope": scope, **TURNS} for scope in TURN_SCOPES},
    "windows": {"probe_type": "multimax", "window": 4},
    "turn-windows": {"probe_type": "mha", "window": 2, "token_scope": "user", **TURNS},
    "label-windows": {"probe_type": "gate", "window": 4, **TOPICS},
}  # fmt: skip


def test_the_heads_file_is_made_of_the_modules_of_the_package():
    assert runtime_files()["heads_llama_probe.py"] == heads_file(), "run: make runtime"


def test_it_is_small_and_imports_what_every_user_of_transformers_has():
    texts = runtime_files()
    assert sum(len(text.splitlines()) for text in texts.values()) <= 1950 and len(texts) <= 4
    for file, text in texts.items():
        assert "SPDX-License-Identifier: Apache-2.0" in text
        known = {"numpy", "safetensors", "torch", "transformers", *sys.stdlib_module_names}
        assert set(get_imports(ROOT / "modeling" / file)) <= known
        names = [node.name for node in ast.parse(text).body if hasattr(node, "name")]
        assert len(names) == len(set(names)), "a name has one meaning in a file"


def export(folder, lm, heads):
    """Export a model, and return it with the repository's code, and with the package."""
    lm.save_pretrained(folder / "lm")
    make_tokenizer().save_pretrained(folder / "lm")
    repository = export_repository(str(folder / "lm"), folder / "exported", heads)
    name = json.loads((repository / "config.json").read_text())["auto_map"]["AutoModel"]
    runtime = get_class_from_dynamic_module(name, str(repository))
    package = AutoModelForProbedGeneration.from_causal_lm(lm, heads)
    return runtime.from_pretrained(str(repository), probe=list(heads)), package


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(folder):
    heads = {name: make_probe(seed, vocab_size=260, **form) for seed, (name, form) in enumerate(FORMS.items())}
    return export(folder, make_lm(vocab_size=260), heads)


def prompts():
    ids = make_prompts()
    ids[:, 2], ids[0, 5], ids[1, 4], ids[1:, 6] = USER, REPLY, REPLY, USER
    return ids


CALLS = {
    "left": {"attention_mask": padded(make_prompts())},
    "chunks": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "two heads": {"probes": ["gate", "mha"]},
    "halted by label": {"halt_on": {"topics": {"label": "b", "threshold": 0.5}}},
    "halted by value": {"halt_on": {"length": {"threshold": 0.0}}},
    "all halted": {"halt_on": {"guard": {"threshold": "all"}}},
    "as the head decides": {"halt_on": "guard"},
    "by the other label": {"halt_on": {"old": {"label": "no"}}},
    "without names": {"halt_on": "gate"},
    "of two the second": {"halt_on": "old"},
}


@pytest.mark.parametrize("call", CALLS)
def test_generate(models, call):
    asked = {"max_new_tokens": 4, "do_sample": False, **CALLS[call]}
    outputs = []
    for model in models:
        torch.manual_seed(0)
        outputs.append(model.generate(prompts(), **asked))
    out, expected = outputs
    assert torch.equal(out.sequences, expected.sequences) and out.probe_labels == expected.probe_labels
    torch.testing.assert_close(out.probe_logits, expected.probe_logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.probe_probabilities, expected.probe_probabilities, rtol=1e-6, atol=1e-6)
    halts = [each.get("probe_halts") or () for each in outputs]
    halts = [[halt and (halt.head, halt.label, halt.threshold) for halt in each] for each in halts]
    assert halts[0] == halts[1]


def test_classify_and_forward(models):
    runtime, package = models
    ids, right = prompts(), padded(make_prompts()).flip(1)
    for mask in (right, padded(make_prompts()), None):
        found, expected = (model.classify(ids, mask) for model in models)
        for name, output in expected.items():
            torch.testing.assert_close(found[name].logits, output.logits, rtol=1e-6, atol=1e-6)
            assert found[name].labels == output.labels
    expected = package(ids, attention_mask=right).probe_logits
    torch.testing.assert_close(runtime(ids, attention_mask=right).probe_logits, expected, rtol=1e-5, atol=1e-6)
    out = runtime(ids, use_cache=True)
    assert "probe_logits" in out and "probe_logits" not in runtime(ids[:, -1:], cache=out["cache"])
    texts, tokenizer = ["Well done!", "I hate it."], make_tokenizer()
    names = [name for name in FORMS if name not in TURN_SCOPES]
    found, expected = (model.classify(texts, tokenizer=tokenizer, probes=names) for model in models)
    for name in names:
        torch.testing.assert_close(found[name].logits, expected[name].logits, rtol=1e-5, atol=1e-5)


def test_layers_on_two_devices(models, no_grad):
    runtime, expected = copy.deepcopy(models[0]), models[0](prompts())["probe_logits"]
    with Accelerator():
        for part in (*runtime.model.layers[2:], runtime.model.norm, runtime.lm_head):
            add_hook_to_module(part.to(DEVICE), AlignDevicesHook(execution_device=DEVICE))
        torch.testing.assert_close(runtime(prompts(), use_cache=False)["probe_logits"], expected, rtol=1e-5, atol=1e-6)


def test_a_config_without_token_ids_has_those_of_the_model(models):
    ids, config = prompts(), GenerationConfig(max_new_tokens=2, do_sample=False)
    ids[0, :2] = 0  # padding, of which no mask says anything
    found, expected = (model.generate(ids, generation_config=config).probe_logits for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_other_families(family, tmp_path):
    lm, sizes = tiny(family), {"num_hidden_layers": 3, "vocab_size": 96}
    runtime, package = export(
        tmp_path, lm, {head_type: make_probe(**form, **sizes) for head_type, form in HEAD_TYPES.items()}
    )
    ids = make_prompts() % 96
    call = {"attention_mask": padded(ids), "max_new_tokens": 3, "do_sample": False}
    found, expected = (model.generate(ids, **call) for model in (runtime, package))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.probe_logits, expected.probe_logits, rtol=1e-6, atol=1e-6)
    assert type(runtime).__name__ == auto_map(family)["AutoModel"].partition(".")[2]


def test_the_model_beside_its_heads_is_the_plain_one(models, tmp_path):
    runtime, _ = models
    assert runtime.state_dict().keys() == make_lm(vocab_size=260).state_dict().keys()
    runtime.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("gate*"))
    found, expected = runtime.generate(prompts(), max_new_tokens=3, probes=[]), make_lm(vocab_size=260)
    assert torch.equal(found.sequences, expected.generate(prompts(), max_new_tokens=3))


NO_TOKEN = torch.zeros(3, 9, dtype=torch.long)
OTHER_LABEL = {"guard": {"label": "fine", "threshold": "all"}}  # which is of the flagged one


@pytest.mark.parametrize(
    "words, call",
    [
        *(
            ("needs the package: pip install llama_probe", call)
            for call in (
                lambda model: model.load_probe("alice/x"),
                lambda model: model.generate(prompts(), probe_state=True),
                lambda model: model(prompts(), probe_mask=torch.ones(3, 9)),
                lambda model: model.generate(prompts(), halt_on=lambda outputs: []),
                lambda model: model.generate(prompts(), halt_on={"guard": {"unsure": (0, 1)}}),
                lambda model: model(inputs_embeds=torch.zeros(1, 2, 32)),
                lambda model: model.generate(prompts(), cache=DynamicCache()),
                lambda model: model.generate(prompts(), GenerationConfig(assistant_early_exit=2)),
                lambda model: model.generate_batch([[5, 6]]),
                lambda model: type(model).from_pretrained("x", probe="alice/heads"),
                lambda model: model.classify([[{"role": "user", "content": "Hi"}]], tokenizer=make_tokenizer()),
            )
        ),
        ("no head 'god'", lambda model: model.generate(prompts(), halt_on="god")),
        ("needs a label", lambda model: model.generate(prompts(), halt_on="pair")),
        ("needs a threshold", lambda model: model.generate(prompts(), halt_on={"length": {"label": "n"}})),
        ("no threshold 'low'", lambda model: model.generate(prompts(), halt_on={"guard": {"threshold": "low"}})),
        ("no threshold 'all'", lambda model: model.generate(prompts(), halt_on=OTHER_LABEL)),
        ("from 0 to 1", lambda model: model.generate(prompts(), halt_on={"gate": {"threshold": 50}})),
        ("halt_on=\\[\\] must be", lambda model: model.generate(prompts(), halt_on=[])),
        ("'gate' are 0.5; they must be a dict", lambda model: model.generate(prompts(), halt_on={"gate": 0.5})),
        ("tensors of one shape", lambda model: model.generate("Hi")),
        ("tensors of one shape", lambda model: model(prompts(), NO_TOKEN[:, 1:])),
        ("texts with tokenizer=", lambda model: model.classify("Hi")),
        ("no head 'x'", lambda model: model.classify("Hi", tokenizer=make_tokenizer(), probes="x")),
        ("no token that a head reads", lambda model: model.classify(prompts(), NO_TOKEN)),
    ],
)
def test_what_it_lacks_names_the_package_and_what_is_wrong_is_said(models, words, call):
    with pytest.raises(ImportError if "package" in words else ValueError, match=words):
        call(models[0])


def test_heads_that_follow_replies_need_the_package(tmp_path):
    with pytest.raises(ImportError, match="follows replies"):
        export(tmp_path, make_lm(vocab_size=260), {"a": make_probe(vocab_size=260, token_scope="all")})


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("probe_config.json", b'"temperature": 1.0', b'"temperature": 2.0'),
        ("probe_model.safetensors", b"classifier", b"Classifier"),
    ],
)
def test_heads_that_were_changed_are_refused(models, folder, tmp_path, name, old, new):
    copy = shutil.copytree(folder / "exported", tmp_path / "copy")
    (copy / "gate" / name).write_bytes((copy / "gate" / name).read_bytes().replace(old, new))
    for head, words in (("gate", "fetch"), ("x", "has no head 'x'")):
        with pytest.raises(ValueError, match=words):
            type(models[0]).from_pretrained(str(copy), probe=head)


def test_the_package_takes_over_a_model_without_heads(tmp_path):
    runtime, _ = export(tmp_path, make_lm(vocab_size=260), {"gate": make_probe(vocab_size=260, probe_type="gate")})
    with pytest.raises(ProbeError, match="heads of its repository's code"):
        AutoModelForProbedGeneration.from_causal_lm(runtime)
    plain = type(runtime).from_pretrained(str(tmp_path / "exported"))
    model = AutoModelForProbedGeneration.from_causal_lm(plain, str(tmp_path / "exported" / "gate"))
    assert type(model) is LlamaForProbedGeneration and model.active_probes == ["gate"]


SCRIPT = """
import importlib.util, json, re, sys
from pathlib import Path

for name in ("llama_probe", "accelerate", "matplotlib", "peft", "datasets", "scipy", "sklearn"):
    sys.modules[name] = None  # what Python knows of a module that is not there
    assert importlib.util.find_spec(name) is None, name

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

local, remote, expected = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
classes = (AutoModel, AutoModelForCausalLM)
plain = [type(c.from_pretrained(source)).__name__ for source in (local, remote) for c in classes]
assert plain == ["LlamaModel", "LlamaForCausalLM"] * 2, plain
assert not [name for name in sys.modules if name.startswith("transformers_modules")], "no code without leave"
inputs = AutoTokenizer.from_pretrained(local)("Hello there", return_tensors="pt")
for source in (local, remote):
    for auto_class in classes:
        model = auto_class.from_pretrained(source, probe=["toxic", "mood"], trust_remote_code=True)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert out.sequences.tolist() == expected["sequences"] and out.probe_labels == expected["labels"]
        for name, logits in expected["logits"].items():
            torch.testing.assert_close(out.probe_logits[name], torch.tensor(logits), atol=1e-6, rtol=1e-6)
block = re.findall("```python\\n(.*?)```", Path(local, "README.md").read_text(), flags=re.DOTALL)[0]
exec(block, {})
"""


@pytest.mark.slow
def test_a_repository_in_a_python_without_the_package(backbone_folder, token, tmp_path):
    toxic = make_probe(id2label={0: "fine", 1: "toxic"}, vocab_size=260)
    heads = {"toxic": toxic, "mood": make_probe(1, probe_type="gate")}
    repository = export_repository(str(backbone_folder), tmp_path / "tiny-chat", heads)
    push_repository(repository, "alice/tiny-chat")
    inputs = make_tokenizer()("Hello there", return_tensors="pt")
    out = probed(heads, vocab_size=260).generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = {"sequences": out.sequences.tolist(), "labels": out.probe_labels}
    expected["logits"] = {name: logits.tolist() for name, logits in out.probe_logits.items()}
    command = [sys.executable, "-c", SCRIPT, "tiny-chat", "alice/tiny-chat", json.dumps(expected)]
    options = {"cwd": tmp_path, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert "['" in done.stdout, "the code of its card prints labels"
