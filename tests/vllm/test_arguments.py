"""What is refused before an engine is started, and by an engine that was started some other way."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import forget_own_type, make_lm, make_probe
from tiny_engine import HEADS, HIDDEN, REPLY_HEADS
from tiny_families import TINY
from tiny_families import tiny as make_tiny
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.api_server import entry
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.v1.kv_cache_interface import KVCacheConfig

from llama_probe import AutoModelForProbedGeneration, ProbeConfig, ProbeError, ProbeModel
from llama_probe.compatibility import VLLM
from llama_probe.heads.match import describe
from llama_probe.vllm import __main__ as server
from llama_probe.vllm import compatibility, engine_kwargs
from llama_probe.vllm.__main__ import server_arguments
from llama_probe.vllm.backbone_check import check_heads
from llama_probe.vllm.compatibility import check_config
from llama_probe.vllm.connector import ProbeConnector
from llama_probe.vllm.patches import report_death
from llama_probe.vllm.settings import ProbeSettings


BAD = {"label": "bad"}


def make_config(*args, **kwargs):
    return EngineArgs(**engine_kwargs(*args, **kwargs)).create_engine_config()


def take_warnings(caplog) -> list[str]:
    """What llama_probe has warned of since the last call."""
    found = [record.getMessage() for record in caplog.records if record.name.startswith("llama_probe")]
    caplog.clear()
    return found


class TestEngine:
    def test_gets_the_heads_and_the_layers_that_they_read(self, tiny):
        heads, rules = {name: tiny.heads[name] for name in ("tone", "size")}, {"tone": {"label": "LABEL_1"}}
        config = make_config(tiny.backbone, heads, halt_on=rules, max_model_len=64, additional_config={"a": 1})
        assert (config.model_config.max_model_len, config.additional_config["a"]) == (64, 1)
        assert config.model_config.architecture == "ProbedLlamaForCausalLM"
        assert config.model_config.tokenizer_mode == "hf", "which has the chat template"
        settings = ProbeSettings.of(config)
        assert (settings.heads, settings.halt_on, settings.layers) == (heads, rules, [1, 3, 4])
        check_config(config)

    def test_that_differs_in_layers_alone_is_compiled_anew(self, tiny, tmp_path):
        hashes = set()
        for layers in ([1, 3], [0, 3]):
            make_probe(hidden_size=HIDDEN, **{**HEADS["tone"], "layers": layers}).save_pretrained(tmp_path / "head")
            hashes.add(make_config(tiny.backbone, tmp_path / "head").compute_hash())
        assert len(hashes) == 2

    def test_uses_the_model_runner_that_was_tested(self, tiny, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        engine_kwargs(tiny.backbone, tiny.heads)
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1", "what the user says"
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
        assert make_config(tiny.backbone, tiny.heads).use_v2_model_runner is False

    @pytest.mark.parametrize(
        "arguments",
        [
            {"speculative_config": {"method": "eagle3", "model": "a"}},
            {"kv_transfer_config": {"kv_connector": "ExampleConnector"}},
            {"enable_sleep_mode": True},
            {"monitor": {"tone": {"label": "no such label"}}},
            {"halt_on": lambda outputs: [True]},
            {"halt_on": "nobody"},
            {"halt_on": {"guard": {"unsure": (0.4, 0.6), "ask": print}}},
            {"monitor": "nobody"},
            {"monitor": "guard", "halt_on": "guard"},
            {"hf_overrides": lambda config: config},
            {"hold_back": -1},
            {"hold_back": 1, "halt_on": "guard"},
            {"probe": {"odd": make_probe(hidden_size=HIDDEN)}},
        ],
        ids=lambda arguments: next(iter(arguments)),  # the same in each process
    )
    def test_refuses_arguments(self, tiny, arguments):
        with pytest.raises(ProbeError, match=f"(?i){next(iter(arguments))}"):
            engine_kwargs(tiny.backbone, **{"probe": tiny.heads, **arguments})

    @pytest.mark.parametrize(
        ("config", "arguments", "named"),
        [
            ({"hidden_size": 32}, {}, "hidden_size=32"),
            ({"token_scope": "all"}, {}, "follows replies .*'mha'"),
            (REPLY_HEADS["watch"], {"speculative_config": {"method": "ngram"}}, "speculative_config"),
            (REPLY_HEADS["watch"], {"for_server": {"unsure": {"odd": (0, 1)}}, "halt_on": {"odd": BAD}}, "unsure"),
        ],
        ids=["size", "head type", "speculation", "judge of replies"],
    )
    def test_refuses_heads(self, tiny, tmp_path, config, arguments, named):
        make_probe(**{"hidden_size": HIDDEN, **config}).save_pretrained(tmp_path)
        with pytest.raises(ProbeError, match=named):
            engine_kwargs(tiny.backbone, {"odd": tmp_path}, **arguments)

    def test_refuses_models(self, tiny, tmp_path):
        config = AutoConfig.from_pretrained(tiny.backbone)
        config.architectures = ["Gemma3ForCausalLM"]
        config.save_pretrained(tmp_path)
        with pytest.raises(ProbeError, match="Gemma3"):
            engine_kwargs(tmp_path, tiny.heads)
        (tmp_path / "config.json").unlink()
        with pytest.raises(ProbeError, match="cannot be read"):
            engine_kwargs(tmp_path, tiny.heads)

    def test_tries_versions_that_are_newer_than_the_tested_ones(self, tiny, monkeypatch):
        major, minor = map(int, VLLM.newest.split("."))
        newer = f"{major}.{minor + 1}.0"
        monkeypatch.setattr("vllm.version.__version__", newer)
        monkeypatch.setattr(compatibility, "missing_here", lambda version: ())
        with pytest.warns(UserWarning, match=f"vllm {newer}"):
            assert engine_kwargs(tiny.backbone, tiny.heads)
        with pytest.raises(ProbeError, match=f"vllm {newer}"):
            engine_kwargs(tiny.backbone, tiny.heads, strict_versions=True)

    def test_refuses_versions_that_are_too_old_or_lack_a_name(self, tiny, monkeypatch):
        monkeypatch.setattr(
            compatibility, "missing_here", lambda version: ("vllm.a.B is missing", "vllm.c is missing")
        )
        with pytest.raises(ProbeError, match=r"vllm\.a\.B is missing \(and 1 more\)"):
            engine_kwargs(tiny.backbone, tiny.heads)
        monkeypatch.setattr("vllm.version.__version__", "0.31.2")
        with pytest.raises(ProbeError, match=r"0\.31\.2 is older"):
            engine_kwargs(tiny.backbone, tiny.heads)

    def test_imports_head_types_in_each_process(self, own_type, tmp_path):
        make_lm().save_pretrained(tmp_path / "lm")
        with pytest.raises(ProbeError, match="probe_type='top' is not known"):
            engine_kwargs(tmp_path / "lm", own_type)
        imports = [own_type.parent / "top.py"]
        config = make_config(tmp_path / "lm", own_type, import_files=imports, skip_tokenizer_init=True)
        forget_own_type()
        arguments = server_arguments([str(tmp_path / "lm"), "--probe", str(own_type), "--import", str(imports[0])])
        assert arguments.additional_config["llama_probe"]["import_files"] == [str(imports[0])]
        forget_own_type()  # as in another process
        settings = ProbeSettings.of(config)
        assert list(settings.configs) == ["head"] and settings.configs["head"].probe_type == "top"

    @pytest.mark.parametrize(
        ("part", "name", "value"),
        [
            ("model_config", "enable_sleep_mode", True),
            ("scheduler_config", "scheduler_cls", None),
            ("kv_transfer_config", "kv_connector", "OffloadingConnector"),
        ],
    )
    def test_refuses_a_complete_config(self, tiny, part, name, value):
        config = make_config(tiny.backbone, tiny.heads)
        setattr(getattr(config, part), name, value)
        with pytest.raises(ProbeError, match=str(value)):
            check_config(config)
        config.additional_config = {}
        with pytest.raises(ProbeError, match="engine_kwargs"):
            ProbeSettings.of(config)

    def test_refuses_another_model_class(self, tiny):
        config = EngineArgs(**engine_kwargs(tiny.backbone, tiny.heads) | {"hf_overrides": {}}).create_engine_config()
        with pytest.raises(ProbeError, match="LlamaForCausalLM"):
            ProbeConnector(config, KVConnectorRole.WORKER, KVCacheConfig(1, [], []))


@pytest.fixture
def elsewhere(tiny, tmp_path):
    """A folder with the tiny backbone, trained a little since its head was: `(folder, head)`."""
    shutil.copytree(tiny.backbone, tmp_path / "lm")
    lm = AutoModelForCausalLM.from_pretrained(tiny.backbone)
    ProbeModel(describe(lm, ProbeConfig(probe_type="gate", num_labels=2))).save_pretrained(tmp_path / "head")
    for layer in lm.model.layers:
        layer.mlp.down_proj.weight.data.mul_(1.5)
    lm.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm", str(tmp_path / "head")


class TestBackbone:
    def test_of_another_head_is_warned_of_or_refused(self, tiny, elsewhere, caplog):
        backbone, head = elsewhere
        engine_kwargs(tiny.backbone, head)
        assert take_warnings(caplog) == []
        AutoModelForProbedGeneration.from_pretrained(backbone, probe=head)
        expected = take_warnings(caplog)
        engine_kwargs(backbone, {"head": head, **tiny.heads})
        assert take_warnings(caplog) == expected and "fingerprint" in expected[0]
        engine_kwargs(backbone, head, compare_fingerprints=False)
        assert take_warnings(caplog) == []
        guard = {"halt_on": {"head": {"label": "LABEL_1"}}}
        for options in ({"probe_strict": True}, guard):
            with pytest.raises(ProbeError, match="fingerprint"):
                engine_kwargs(backbone, head, **options)
        assert engine_kwargs(backbone, head, probe_strict=False, **guard)

    def test_is_compared_with_the_heads_that_are_asked_for_alone(self, tiny, elsewhere, tmp_path, caplog):
        """And not with those that `save_pretrained` has left beside it."""
        head, folder = elsewhere[1], tmp_path / "guarded"
        AutoModelForProbedGeneration.from_pretrained(tiny.backbone, probe=head).save_pretrained(folder)
        take_warnings(caplog)
        engine_kwargs(folder, head, probe_strict=True)
        assert take_warnings(caplog) == []

    def test_of_the_hub_is_fetched_once(self, elsewhere, hub, tmp_path, monkeypatch):
        backbone, head = elsewhere
        hub.plant("alice/lm", {path.name: path.read_bytes() for path in backbone.iterdir()})
        kept = {"download_dir": str(tmp_path / "kept")}
        with pytest.raises(ProbeError, match="fingerprint"):
            engine_kwargs("alice/lm", head, probe_strict=True, **kept)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        weights = download_weights_from_hf("alice/lm", kept["download_dir"], ["*.safetensors"])
        assert sorted(path.name for path in Path(weights).glob("*.safetensors")) == ["model.safetensors"]

    def test_of_a_hub_that_does_not_answer_is_one_line(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        with pytest.raises(ProbeError, match="Hub"):
            engine_kwargs("alice/lm", tiny.heads)

    @pytest.mark.parametrize("architecture", compatibility.ARCHITECTURES)
    def test_of_each_family_is_known_again(self, architecture, tmp_path):
        lm = make_tiny(next(name for name, (_, made, _) in TINY.items() if made == architecture))
        configs = {"head": describe(lm, ProbeConfig(probe_type="gate", num_labels=2))}
        lm.save_pretrained(tmp_path)
        check_heads(configs, str(tmp_path), None, True, None, {"head": None})
        lm.model.layers[1].self_attn.o_proj.weight.data.mul_(1.5)
        lm.save_pretrained(tmp_path)
        with pytest.raises(ProbeError, match="fingerprint"):
            check_heads(configs, str(tmp_path), None, True, None, {"head": None})

    @pytest.mark.parametrize("how", ["missing", "damaged", "quantised"])
    def test_whose_weights_cannot_be_compared(self, elsewhere, caplog, how):
        backbone, head = elsewhere
        if how == "missing":
            (backbone / "model.safetensors").unlink()
        elif how == "damaged":
            (backbone / "model.safetensors").write_bytes(b"no tensors")
        else:
            config = json.loads((backbone / "config.json").read_text())
            config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
            (backbone / "config.json").write_text(json.dumps(config))
        with pytest.raises(ProbeError, match="--skip-fingerprints"):
            engine_kwargs(backbone, head, probe_strict=True)
        assert engine_kwargs(backbone, head, probe_strict=True, compare_fingerprints=False)
        assert take_warnings(caplog) == []
        assert engine_kwargs(backbone, head)["model"] == str(backbone)
        assert len(take_warnings(caplog)) == 1


JUDGE = "http://h/v1/moderations"
BAND = ["--halt-on", "guard", "--unsure", "guard=0.2:0.6"]


def command_line(tiny, *options: str):
    return server_arguments([str(tiny.backbone), "--probe", f"guard={tiny.heads['guard']}", *options])


class TestCommandLine:
    def test_has_our_options_and_those_of_vllm(self, tiny):
        ours = ["--halt-on", 'guard={"threshold": 0.6}', "--halt-reply", "No.", "--hide-scores"]
        ours += ["--judge", JUDGE, "--unsure", "guard=0.2:0.6", "--judge-fails", "open"]
        theirs = ["--revision", "main", "--hf_overrides.a", "1", "--max_model_len", "64", "--enable-lora"]
        theirs += ["--middleware", "mine"]
        theirs += ["--additional-config", '{"b": 2}', "--speculative-config.method", "ngram"]
        arguments = command_line(tiny, "--probe", f"tone={tiny.heads['tone']}", *ours, *theirs)
        assert arguments.served_model_name == [str(tiny.backbone)]
        assert arguments.model == str(tiny.backbone) and arguments.scheduler_cls == compatibility.SCHEDULER
        assert arguments.hf_overrides == {"a": 1, "architectures": ["ProbedLlamaForCausalLM"]}
        assert (arguments.revision, arguments.max_model_len, arguments.enable_lora) == ("main", 64, True)
        assert arguments.middleware == [server.MIDDLEWARE, "mine"] and arguments.additional_config["b"] == 2
        assert arguments.kv_transfer_config.kv_connector == "ProbeConnector"
        settings = arguments.additional_config["llama_probe"]
        assert settings["judge"] == {"url": JUDGE, "fails": "open"} and settings["unsure"] == {"guard": (0.2, 0.6)}
        assert list(settings["heads"]) == ["guard", "tone"] and settings["halt_on"] == {"guard": {"threshold": 0.6}}
        assert settings["halt_reply"] == "No." and settings["hide_scores"]

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--probe", "c"], "--probe"),
            (["--halt-reply", "No."], "--halt-reply"),
            (["--judge", JUDGE], "--unsure"),
            (["--judge-fails", "open"], "--judge"),
            (["--judge", JUDGE, "--unsure", "guard=0.2:0.6"], "--halt-on"),
            (["--judge", JUDGE, *BAND[:-1], "guard=0.6:0.2"], "--unsure"),
            (["--judge", JUDGE, *BAND[:-1], "guard=0.2"], "--unsure"),
            (["--judge", JUDGE, *BAND, "--unsure", "guard=0.2:0.3"], "--unsure"),
            (["--judge", JUDGE, *BAND, "--judge-timeout", "0"], "--judge-timeout"),
            (["--judge", "http://h/v1/other", *BAND], "--judge"),
            (["--judge", "ftp://h/v1/moderations", *BAND], "--judge"),
            (["--judge", "http://h/v1/chat/completions", *BAND], "--judge-model"),
            (["--judge", "http://me:secret@h/v1/moderations", *BAND], "LLAMA_PROBE_JUDGE_KEY"),
            (["--judge", "http://h/v1/moderations?key=secret", *BAND], "LLAMA_PROBE_JUDGE_KEY"),
            (["--monitor", "guard={"], "--monitor 'guard="),
            (["--speculative-config", '{"model": "eagle"}'], "speculative_config"),
            (["--headless"], "--headless"),
            (["--api-server-count", "2"], "--api-server-count"),
        ],
        ids=str,
    )
    def test_refuses_options(self, tiny, words, named):
        with pytest.raises(ProbeError, match=named) as error:
            command_line(tiny, *words)
        assert "secret" not in str(error.value)

    def test_takes_heads_of_a_search(self, tiny, tmp_path):
        shutil.copytree(tiny.heads["tone"], tmp_path / "lr=0.1" / "tone")
        arguments = server_arguments([str(tiny.backbone), "--probe", str(tmp_path / "lr=0.1" / "tone")])
        assert list(arguments.additional_config["llama_probe"]["heads"]) == ["tone"]

    @pytest.mark.parametrize("line", ["--help", "--halt-on guard={"])
    def test_imports_next_to_nothing_for_help_and_refusals(self, line):
        command = [sys.executable, "-X", "importtime", "-m", "llama_probe.vllm", "lm", "--probe", "head"]
        done = subprocess.run([*command, *line.split()], capture_output=True, text=True)
        assert done.stdout.startswith("usage: ") or "error: " in done.stderr
        assert "llama_probe.errors" in done.stderr and "torch" not in done.stderr.split("error: ")[0]


def test_server_whose_engine_does_not_start_exits_with_one_line(tiny, monkeypatch):
    async def fail(arguments):
        raise RuntimeError("Engine core failed.\nSee root cause above.")

    monkeypatch.setattr(server, "server_arguments", lambda: command_line(tiny))
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(entry, "build_and_serve", entry.build_and_serve)  # which `main` replaces
    monkeypatch.setattr(entry, "run_server", fail)
    with pytest.raises(SystemExit, match=r"^error: Engine core failed\. See root cause above[^\n]*$"):
        server.main()


@pytest.mark.parametrize("name", ["shutdown", "drain"])  # vLLM's own, and one that it might have tomorrow
@pytest.mark.parametrize(
    ("is_told", "is_dead", "error"),
    [(True, True, None), (True, False, None), (False, True, "engine died"), (False, False, "server stopped")],
    ids=["told to stop", "told, engine lives", "dead engine", "by itself"],
)
def test_server_that_nobody_stopped_is_an_error(name, is_told, is_dead, error):
    """vLLM shuts an engine down that is told to stop: it is dead then, too."""
    done = []
    engine = SimpleNamespace(errored=is_dead, shutdown=lambda timeout: done.append(timeout))

    async def build_and_serve(engine, port):
        if is_told:
            engine.shutdown(timeout=port)

        async def rest():
            done.append("rest")

        rest.__name__ = name
        return rest()

    async def serve():
        await (await report_death(build_and_serve)(engine, port=7))

    if error is None:
        asyncio.run(serve())
        assert done == [7, "rest"]
        return
    with pytest.raises(ProbeError, match=error):
        asyncio.run(serve())
    assert done == ["rest"]
