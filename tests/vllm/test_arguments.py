"""What is refused before an engine is started, and by an engine that was started some other way."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from conftest import make_probe
from tiny_engine import HEADS, HIDDEN
from tiny_families import TINY
from tiny_families import tiny as make_tiny
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.api_server import entry
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.v1.kv_cache_interface import KVCacheConfig

from llama_probe import AutoModelForProbedGeneration, ProbeConfig, ProbeError, ProbeModel
from llama_probe.heads.match import describe
from llama_probe.vllm import __main__ as server
from llama_probe.vllm import compatibility, engine_kwargs
from llama_probe.vllm.__main__ import server_arguments
from llama_probe.vllm.backbone_check import check_heads
from llama_probe.vllm.compatibility import check_config
from llama_probe.vllm.connector import ProbeConnector
from llama_probe.vllm.settings import ProbeSettings


def take_warnings(caplog) -> list[str]:
    """What llama_probe has warned of since the last call."""
    found = [record.getMessage() for record in caplog.records if record.name.startswith("llama_probe")]
    caplog.clear()
    return found


def test_what_an_engine_gets(tiny):
    kwargs = engine_kwargs(tiny.backbone, tiny.heads, halt_on="guard", max_model_len=64, additional_config={"a": 1})
    assert (kwargs["model"], kwargs["max_model_len"], kwargs["additional_config"]["a"]) == (str(tiny.backbone), 64, 1)
    config = EngineArgs(**kwargs).create_engine_config()
    assert config.model_config.architecture == "ProbedLlamaForCausalLM"
    settings = ProbeSettings.of(config)
    assert settings.heads == tiny.heads and settings.halt_on == {"guard": {}}
    assert settings.layers == [0, 1, 2, 3, 4]
    check_config(config)


def test_layers_that_no_head_reads_are_not_kept(tiny, tmp_path):
    kwargs = engine_kwargs(tiny.backbone, {"tone": tiny.heads["tone"], "size": tiny.heads["size"]})
    config = EngineArgs(**kwargs).create_engine_config()
    assert ProbeSettings.of(config).layers == [1, 3, 4]
    # Of two engines that differ in the layers alone neither may take the model that was compiled for the other.
    hashes = set()
    for layers in ([1, 3], [0, 3]):
        make_probe(hidden_size=HIDDEN, **{**HEADS["tone"], "layers": layers}).save_pretrained(tmp_path / "head")
        hashes.add(EngineArgs(**engine_kwargs(tiny.backbone, tmp_path / "head")).create_engine_config().compute_hash())
    assert len(hashes) == 2


def test_the_model_runner_that_was_tested_is_used(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    engine_kwargs(tiny.backbone, tiny.heads)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    kwargs = engine_kwargs(tiny.backbone, tiny.heads)
    assert EngineArgs(**kwargs).create_engine_config().use_v2_model_runner is False


@pytest.mark.parametrize(
    "arguments",
    [
        {"speculative_config": {"method": "eagle3", "model": "a"}},
        {"kv_offloading_size": 1.0},
        {"scheduler_cls": "mine.Scheduler"},
        {"kv_transfer_config": {"kv_connector": "NixlConnector"}},
        {"hf_overrides": {"architectures": ["Other"]}},
        {"halt_on": lambda outputs: [True]},
        {"halt_on": "nobody"},
        {"halt_on": {"guard": {"unsure": (0.4, 0.6), "ask": print}}},
        {"monitor": "nobody"},
        {"monitor": "guard", "halt_on": "guard"},
        {"hold_back": -1},
        {"hold_back": 1, "halt_on": "guard"},
        {"probe": []},
        {"probe": {"odd": make_probe(hidden_size=HIDDEN)}},
    ],
    ids=lambda arguments: next(iter(arguments)),  # the same in each process
)
def test_arguments_that_do_not_go_with_heads(tiny, arguments):
    with pytest.raises(ProbeError, match=f"(?i){next(iter(arguments))}"):
        engine_kwargs(tiny.backbone, **{"probe": tiny.heads, **arguments})


@pytest.fixture
def elsewhere(tiny, tmp_path):
    """A folder with the tiny backbone, trained a little since its head was: `(folder, head)`."""
    shutil.copytree(tiny.backbone, tmp_path / "lm")
    lm = AutoModelForCausalLM.from_pretrained(tiny.backbone)
    head = ProbeModel(describe(lm, ProbeConfig(probe_type="gate", num_labels=2)))
    head.save_pretrained(tmp_path / "head")
    for layer in lm.model.layers:
        layer.mlp.down_proj.weight.data.mul_(1.5)
    lm.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm", str(tmp_path / "head")


def test_heads_of_another_backbone(tiny, elsewhere, caplog):
    backbone, head = elsewhere
    engine_kwargs(tiny.backbone, head)
    assert take_warnings(caplog) == []
    AutoModelForProbedGeneration.from_pretrained(backbone, probe=head)
    (expected,) = take_warnings(caplog)
    assert expected.startswith("head 'head' has a fingerprint ") and "may mean nothing here" in expected
    engine_kwargs(backbone, {"head": head, **tiny.heads})
    assert take_warnings(caplog) == [expected]
    engine_kwargs(backbone, head, compare_fingerprints=False)
    assert take_warnings(caplog) == []
    words = [str(backbone), "--probe", head, "--probe-strict"]
    guard = {"halt_on": {"head": {"label": "LABEL_1"}}}
    for options in ({"probe_strict": True}, guard):
        with pytest.raises(ProbeError, match="has a fingerprint"):
            engine_kwargs(backbone, head, **options)
    assert engine_kwargs(backbone, head, probe_strict=False, **guard)
    with pytest.raises(ProbeError, match="has a fingerprint"):
        server_arguments(words)
    assert server_arguments([*words, "--skip-fingerprints"])


def test_backbones_of_the_hub_are_fetched_once(elsewhere, hub, caplog, tmp_path, monkeypatch):
    backbone, head = elsewhere
    hub.plant("alice/lm", {path.name: path.read_bytes() for path in backbone.iterdir()})
    kept = {"download_dir": str(tmp_path / "kept")}
    with pytest.raises(ProbeError, match="has a fingerprint"):
        engine_kwargs("alice/lm", head, probe_strict=True, **kept)
    assert take_warnings(caplog) == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    weights = download_weights_from_hf("alice/lm", kept["download_dir"], ["*.safetensors"])
    assert sorted(path.name for path in Path(weights).glob("*.safetensors")) == ["model.safetensors"]


def test_a_hub_that_does_not_answer(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ProbeError, match="the Hub does not answer"):
        engine_kwargs("alice/lm", tiny.heads)
    assert not caplog.records


@pytest.mark.parametrize("architecture", compatibility.ARCHITECTURES)
def test_backbones_of_each_family_are_known_again(architecture, tmp_path, caplog):
    family = next(name for name, (_, made, _) in TINY.items() if made == architecture)
    lm = make_tiny(family)
    configs = {"head": describe(lm, ProbeConfig(probe_type="gate", num_labels=2))}
    lm.save_pretrained(tmp_path)
    check_heads(configs, str(tmp_path), strict=True)
    lm.model.layers[1].self_attn.o_proj.weight.data.mul_(1.5)
    lm.save_pretrained(tmp_path)
    with pytest.raises(ProbeError, match="has a fingerprint"):
        check_heads(configs, str(tmp_path), strict=True)
    assert take_warnings(caplog) == []


@pytest.mark.parametrize("how", ["missing", "damaged", "quantised"])
def test_weights_that_are_not_at_hand(elsewhere, caplog, how):
    backbone, head = elsewhere
    if how == "missing":
        (backbone / "model.safetensors").unlink()
    elif how == "damaged":
        (backbone / "model.safetensors").write_bytes(b"no tensors")
    else:
        config = json.loads((backbone / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (backbone / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProbeError, match="--skip-fingerprints or --no-probe-strict"):
        engine_kwargs(backbone, head, probe_strict=True)
    assert engine_kwargs(backbone, head, probe_strict=True, compare_fingerprints=False)
    assert take_warnings(caplog) == []
    assert engine_kwargs(backbone, head)["model"] == str(backbone)
    (said,) = take_warnings(caplog)
    assert "cannot be compared" in said and "llama-probe inspect" in said


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("parallel_config", "decode_context_parallel_size", 2),
        ("scheduler_config", "scheduler_cls", None),
        ("kv_transfer_config", "kv_connector", "OffloadingConnector"),
    ],
)
def test_a_complete_config_is_checked_as_well(tiny, part, name, value):
    config = EngineArgs(**engine_kwargs(tiny.backbone, tiny.heads)).create_engine_config()
    setattr(getattr(config, part), name, value)
    with pytest.raises(ProbeError, match=str(value)):
        check_config(config)
    config.additional_config = {}
    with pytest.raises(ProbeError, match="engine_kwargs"):
        ProbeSettings.of(config)


def test_an_engine_of_another_model_class(tiny):
    kwargs = engine_kwargs(tiny.backbone, tiny.heads) | {"hf_overrides": {}}
    config = EngineArgs(**kwargs).create_engine_config()
    with pytest.raises(ProbeError, match="its model class is LlamaForCausalLM"):
        ProbeConnector(config, KVConnectorRole.WORKER, KVCacheConfig(1, [], []))


def test_a_stored_prompt_is_read_in_one_chunk(tiny):
    stored = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    kwargs = engine_kwargs(tiny.backbone, tiny.heads, kv_transfer_config=stored)
    for chunked in (False, True):
        config = EngineArgs(**kwargs, enable_chunked_prefill=chunked).create_engine_config()
        with pytest.raises(ProbeError, match="enable_chunked_prefill") if chunked else contextlib.nullcontext():
            check_config(config)
    beside = command_line(tiny, "--kv-transfer-config", json.dumps(stored)).kv_transfer_config
    names = [each["kv_connector"] for each in beside.kv_connector_extra_config["connectors"]]
    assert names == ["ProbeConnector", "ExampleConnector"]


def test_versions_that_were_not_tested(tiny, monkeypatch):
    monkeypatch.setattr("vllm.version.__version__", "0.33.1")
    with pytest.raises(ProbeError, match=r"vLLM 0.33.1 was not tested with heads \(0.32.x was\)"):
        engine_kwargs(tiny.backbone, tiny.heads)
    assert engine_kwargs(tiny.backbone, tiny.heads, allow_untested_vllm=True)


def test_models_without_a_place_for_heads(tiny, tmp_path, monkeypatch):
    config = AutoConfig.from_pretrained(tiny.backbone)
    config.architectures = ["Gemma3ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ProbeError, match="this model is Gemma3ForCausalLM"):
        engine_kwargs(tmp_path, tiny.heads)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ProbeError, match="pipeline_parallel_size=2"):
        server_arguments([str(tmp_path), "--probe", tiny.heads["guard"], "-pp", "2"])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ProbeError, match="cannot be read"):
        engine_kwargs(tmp_path, tiny.heads)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_size": 32}, "hidden_size=32"),
        ({"token_scope": "all"}, "follows replies .*'mha'"),
    ],
)
def test_heads_that_do_not_fit(tiny, tmp_path, config, reason):
    make_probe(**{"hidden_size": HIDDEN, **config}).save_pretrained(tmp_path)
    with pytest.raises(ProbeError, match=reason):
        engine_kwargs(tiny.backbone, {"odd": tmp_path})


JUDGE = "http://h/v1/moderations"
BAND = ["--halt-on", "guard", "--unsure", "guard=0.2:0.6"]


def command_line(tiny, *options: str):
    return server_arguments([str(tiny.backbone), "--probe", f"guard={tiny.heads['guard']}", *options])


def test_the_command_line(tiny):
    halting = ["--halt-on", 'guard={"threshold": 0.6}', "--halt-reply", "No.", "--hide-scores"]
    halting += ["--judge", JUDGE, "--unsure", "guard=0.2:0.6", "--judge-fails", "open"]
    theirs = [
        "--revision",
        "main",
        "--hf_overrides.a",
        "1",
        "--additional-config",
        '{"b": 2}',
        "--max_model_len",
        "64",
    ]
    theirs += ["--speculative-config.method", "ngram", "--enable-lora", "--middleware", "mine"]
    arguments = command_line(tiny, "--probe", f"tone={tiny.heads['tone']}", *halting, *theirs)
    assert arguments.model == str(tiny.backbone) and arguments.scheduler_cls == compatibility.SCHEDULER
    assert arguments.hf_overrides == {"a": 1, "architectures": ["ProbedLlamaForCausalLM"]}
    assert (arguments.revision, arguments.max_model_len, arguments.enable_lora) == ("main", 64, True)
    assert arguments.middleware == [server.MIDDLEWARE, "mine"] and arguments.additional_config["b"] == 2
    settings = arguments.additional_config["llama_probe"]
    assert settings["judge"] == {"url": JUDGE, "fails": "open"} and settings["unsure"] == {"guard": [0.2, 0.6]}
    assert list(settings["heads"]) == ["guard", "tone"] and settings["halt_on"] == {"guard": {"threshold": 0.6}}
    assert settings["halt_reply"] == "No." and settings["hide_scores"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--probe", "c"], "--probe"),
        (["--probe", "guard=c"], "--probe"),
        (["--halt-reply", "No."], "--halt-reply"),
        (["--monitor", "nobody"], "monitor"),
        (["--halt-on", "nobody"], "halt_on"),
        (["--hold-back", "2"], "hold_back"),
        (["--halt-reply", "", "--halt-on", "guard"], "--halt-reply"),
        (["--judge", JUDGE], "--unsure"),
        (["--judge-fails", "open"], "--judge"),
        (["--unsure", "guard=0.2:0.6"], "--judge"),
        (["--judge", JUDGE, "--unsure", "guard=0.2:0.6"], "--halt-on"),
        (["--judge", JUDGE, *BAND[:-1], "guard=0.6:0.2"], "--unsure"),
        (["--judge", JUDGE, *BAND[:-1], "guard=0.2"], "--unsure"),
        (["--judge", JUDGE, *BAND, "--unsure", "guard=0.2:0.3"], "--unsure"),
        (["--judge", JUDGE, *BAND, "--judge-timeout", "0"], "--judge-timeout"),
        (["--judge", "http://h/v1/other", *BAND], "--judge"),
        (["--judge", "http://[h/v1/moderations", *BAND], "--judge"),
        (["--judge", "ftp://h/v1/moderations", *BAND], "--judge"),
        (["--judge", "http://h/v1/chat/completions", *BAND], "--judge-model"),
        (["--model=other"], "--model"),
        (["--decode_context_parallel_size=2"], "decode_context_parallel_size"),
        (["-dcp", "2"], "decode_context_parallel_size"),
        (["--enable-dbo"], "enable_dbo"),
        (["--speculative-config", '{"model": "eagle"}'], "speculative_config"),
        (["--speculative_config.method", "eagle3"], "speculative_config"),
        (["--spec-method", "eagle3"], "speculative_config"),
        (["--runne=pooling"], "runner"),
        (["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'], "kv_transfer_config"),
        (["--hf-overrides", '{"architectures": ["A"]}'], "hf_overrides"),
    ],
    ids=str,
)
def test_options_that_are_refused(tiny, words, named):
    with pytest.raises(ProbeError, match=named):
        command_line(tiny, *words)


@pytest.mark.parametrize("secret", ["http://me:secret@h/v1/moderations", "http://h/v1/moderations?key=secret"])
def test_a_judges_key_is_not_in_its_url(tiny, secret):
    with pytest.raises(ProbeError, match="LLAMA_PROBE_JUDGE_KEY") as error:
        command_line(tiny, "--judge", secret, *BAND)
    assert "secret" not in str(error.value)


def test_a_judge_decides_on_prompts(tiny, tmp_path):
    make_probe(hidden_size=HIDDEN, probe_type="gate", token_scope="response", flagged=["LABEL_1"]).save_pretrained(
        tmp_path
    )
    words = ["--probe", f"watch={tmp_path}", "--halt-on", "watch", "--judge", JUDGE, "--unsure", "watch=0.2:0.6"]
    with pytest.raises(ProbeError, match="unsure"):
        command_line(tiny, *words)


def test_lines_of_a_config_file(tiny, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("seed: 3\nscheduler-cls: mine.Scheduler\n")
    with pytest.raises(ProbeError, match="scheduler_cls"):
        command_line(tiny, "--config", str(file))
    file.write_text("seed: 3\n")
    assert command_line(tiny, "--config", str(file)).seed == 3


@pytest.mark.parametrize("line", ["--help", "--halt-on guard={", "--halt-on head --unsure head=1:0"])
def test_help_and_refusals_of_our_options_import_next_to_nothing(line):
    command = [sys.executable, "-X", "importtime", "-m", "llama_probe.vllm", "lm", "--probe", "head", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") or "error: " in done.stderr
    assert "llama_probe.errors" in done.stderr and "torch" not in done.stderr.split("error: ")[0]


@pytest.fixture
def serve(tiny, monkeypatch):
    """A function that serves on an engine which does as it is told, and then what `main` does."""

    def start(run, rest=None):
        async def build_and_serve():
            return rest()

        monkeypatch.setattr(server, "server_arguments", lambda: command_line(tiny))
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        monkeypatch.setattr(entry, "build_and_serve", build_and_serve)
        monkeypatch.setattr(entry, "run_server", run)
        server.main()

    return start


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_server_that_nobody_stopped_exits_with_one_line(serve, is_stopped):
    async def shutdown():
        pass

    async def dummy_shutdown():
        pass

    async def run(arguments):
        await (await entry.build_and_serve())

    with contextlib.nullcontext() if is_stopped else pytest.raises(SystemExit, match="the engine died"):
        serve(run, shutdown if is_stopped else dummy_shutdown)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_engine_that_does_not_start_is_one_line(serve, kind):
    async def fail(arguments):
        raise kind("Engine core failed.\nSee root cause above.")

    with pytest.raises(SystemExit, match=r"^error: Engine core failed\. See root cause above[^\n]*$"):
        serve(fail)
