"""The command that a card repeats, and what becomes of errors."""

import dataclasses
import inspect
import shlex
import sys

import pytest
from command_line import call, write_rows

from llama_probe import ProbeConfig, ProbeError, cli
from llama_probe.backbone.loading import DTYPES
from llama_probe.cli import options
from llama_probe.cli.options import command_line
from llama_probe.data.sources import FEW_ROWS, FOLDS, VALIDATION_SHARE, DataSources
from llama_probe.evaluation.calibration import BEST_F1, EXPECTED_F1
from llama_probe.evaluation.scoring_job import ScoringJob
from llama_probe.experiments.benchmark.random_weights import SHAPES
from llama_probe.experiments.benchmark.serving_benchmark import KINDS, MANY_KIND, ServingBenchmark
from llama_probe.experiments.reproduction.methods import method_names
from llama_probe.experiments.reproduction.reproduction import DATA, PARTS, Reproduction
from llama_probe.experiments.reproduction.workbench import Workbench
from llama_probe.heads import get_probe_type, probe_types
from llama_probe.heads.configuration import NORMALIZATIONS, POOLS, PROBLEM_TYPES, PROMPT_FORMATS, TOKEN_SCOPES
from llama_probe.hub.resolve import bundled_heads
from llama_probe.training.recipe import Recipe
from llama_probe.training.run import TrainingRun
from llama_probe.training.sweep import SearchSpace, Sweep


@pytest.mark.parametrize(
    "words, line",
    [
        (["--train", "imdb:train", "--layers", "0,3", "--limit", "Short texts."], "--train imdb:train --layers 0,3 --limit 'Short texts.'"),
        (["--system-prompt", "don't; $HOME * costs"], """--system-prompt 'don'"'"'t; $HOME * costs'"""),
        (["--label-names", "it's,b", "--limit", ""], """--label-names 'it'"'"'s,b' --limit ''"""),
        (["--output", "a b", "--resume", "--cache-dir=c", "--json"], "--json"),
    ],
)  # fmt: skip
def test_it_is_a_line_for_a_shell(monkeypatch, words, line):
    monkeypatch.setattr(sys, "argv", ["llama-probe", "train", *words])
    assert command_line() == f"llama-probe train {line}"


def test_the_lines_of_the_cards_are_quoted_so():
    for folder in bundled_heads().values():
        card = (folder / "README.md").read_text(encoding="utf-8")
        line = next(line for line in card.splitlines() if line.startswith("llama-probe train"))
        assert shlex.join(shlex.split(line)) == line


def test_files_that_the_system_refuses_are_one_line_and_status_2(monkeypatch):
    def app(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/root/head")

    monkeypatch.setattr(cli, "app", app)
    done = call("inspect")
    assert done.returncode == 2 and done.stderr == "llama-probe: /root/head: Permission denied\n"


@pytest.mark.parametrize(
    "command, options",
    [
        ("train", ["--max-rows 0", "--epochs 0", "--batch-size 0", "--patience 0", "--folds 1", "--test-share 2", "--label-names a,a"]),
        ("train", ["--seed -1", "--extra-weight -1", "--cache-dir c --no-cache", "--focal-gamma -1", "--problem-type foo"]),
        ("train", ["--probe-type foo", "--pool sum", "--layers -1", "--token-scope foo", "--dropout 2", "--class-weights foo"]),
        ("train", ["--metric foo", "--threshold-rule foo", "--max-false-positive-rate 2", "--dtype foo", "--slice-column half"]),
        ("sweep", ["--trials 0", "--keep 0", "--epochs 0", "--probe-type muli", "--max-rows 0", "--seed -1"]),
        ("reproduce", ["--max-rows 0", "--only foo", "--data foo", "--trials 0", "--epochs 0", "--shots 0"]),
        ("benchmark", ["--many -1", "--tokens 0", "--kind foo", "--pairs 0", "--device foo", "--guard x --guard x"]),
        ("classify", ["--chunk-rows 0", "--probe foo"]),
    ],
)  # fmt: skip
def test_an_error_names_the_option_that_was_typed(backbone_folder, tmp_path, command, options):
    write_rows(tmp_path)
    given = {
        "train": ["--train", tmp_path / "train.jsonl", "--output", tmp_path / "out"],
        "reproduce": ["--output", tmp_path / "out"],
        "benchmark": ["--tokens", "8"],
        "classify": ["--input", tmp_path / "train.jsonl", "--output", tmp_path / "out"],
    }
    given["sweep"] = given["train"]
    for words in map(str.split, options):
        done = call(command, "--backbone", backbone_folder, *given[command], *words)
        assert done.returncode == 2 and f"llama-probe: {words[0]}=" in done.stderr, (words, done.stderr)
    with pytest.raises(ProbeError, match=r"^max_rows=0 must"):
        DataSources("rows.jsonl", max_rows=0)


@pytest.mark.parametrize(
    "words, told",
    [
        ("train --layers 10 --layers=20", "--layers is given twice: give it once, its values with commas; see llama-probe train --help"),
        ("train --label-names a --train x --label-names b", "--label-names is given twice: give it once, its values with commas"),
        ("reproduce --methods gate --methods mha", "--methods is given twice: give it once, its values with commas"),
        ("evaluate --data a --data b", "--data is given twice: give it once; see"),
        ("train --cache --no-cache", "--cache/--no-cache is given twice: give it once; see"),
    ],
)  # fmt: skip
def test_of_an_option_that_is_given_twice_no_value_is_lost(words, told):
    done = call(*words.split())
    assert done.returncode == 2 and f"llama-probe: {told}" in done.stderr


def test_options_that_may_be_given_again_and_help_go_through():
    done = call("train", "--limit", "a", "--limit", "b", "--help", "--help")
    assert done.returncode == 0 and "--limit" in done.stdout
    done = call("evaluate", "--where", "a=1", "--where", "a=2", "--probe", "toxicchat-gate", "--data", "no.csv")
    assert done.returncode == 2 and "there is no file no.csv" in done.stderr


def test_names_of_somebody_elses_write_nothing_to_the_terminal(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0, "k\\u001b[31m": 1}\n')
    done = call("evaluate", "--probe", "toxicchat-gate", "--data", tmp_path / "rows.jsonl", "--text-column", "other")
    assert done.returncode == 2 and "it has: text, label, k\\x1b[31m" in done.stderr and "\x1b" not in done.stderr


# Commands repeat what the library owns, so that `--help` need not import torch: here both are laid side by side.

# What a command chooses otherwise, on purpose.
_OWN = {("train", "probe_type"), ("train", "folds"), ("train", "token_scope"), ("sweep", "epochs"), ("sweep", "cache")}


@pytest.mark.parametrize(
    "command, owners",
    [
        (cli.train, (TrainingRun, Recipe, DataSources)),
        (cli.sweep, (Sweep, TrainingRun, Recipe, DataSources)),
        (cli.reproduce, (Reproduction, Workbench)),
        (cli.benchmark, (ServingBenchmark,)),
        (cli.classify, (ScoringJob,)),
    ],
)
def test_defaults_are_those_of_the_library(command, owners):
    given = {name: item.default for name, item in inspect.signature(command).parameters.items()}
    compared = 0
    for owner in owners:
        for field in dataclasses.fields(owner):
            name = options.RENAMED.get(field.name, field.name)
            plain = field.default is not dataclasses.MISSING and not isinstance(field.default, tuple)
            if name in given and plain and (command.__name__, name) not in _OWN:
                assert given[name] == field.default, (owner.__name__, name)
                compared += 1
    assert compared > 4


def _help(command, name: str) -> str:
    (option,) = inspect.signature(command, eval_str=True).parameters[name].annotation.__metadata__
    return option.help


@pytest.mark.parametrize(
    "command, name, words",
    [
        (cli.train, "probe_type", probe_types()),
        (cli.train, "problem_type", PROBLEM_TYPES),
        (cli.train, "prompt_format", PROMPT_FORMATS),
        (cli.train, "token_scope", TOKEN_SCOPES),
        (cli.train, "pool", POOLS),
        (cli.train, "normalize", [*NORMALIZATIONS, f"left out: {get_probe_type('mha').normalize}, for muli {get_probe_type('muli').normalize}"]),
        (cli.train, "threshold_rule", [EXPECTED_F1, BEST_F1]),
        (cli.train, "folds", [f"{FOLDS} for fewer than {FEW_ROWS} rows"]),
        (cli.train, "validation_share", [f"{VALIDATION_SHARE} where"]),
        (cli.train, "label_smoothing", [f"{get_probe_type('mha').recipe['label_smoothing']} if left out, {get_probe_type('muli').recipe['label_smoothing']:g} for muli"]),
        (cli.train, "dtype", DTYPES),
        (cli.sweep, "probe_type", SearchSpace().probe_types),
        (cli.sweep, "validation_share", [f"{VALIDATION_SHARE} where"]),
        (cli.reproduce, "methods", [name for name in method_names() if name not in probe_types()]),
        (cli.reproduce, "only", PARTS),
        (cli.benchmark, "kind", KINDS),
        (cli.benchmark, "many", [MANY_KIND]),
        (cli.benchmark, "tokens", [" and ".join(map(str, ServingBenchmark.tokens))]),
        (cli.benchmark, "guard", [name for name in SHAPES if name != "llama-3b"]),
    ],
)  # fmt: skip
def test_help_names_what_there_is(command, name, words):
    text = _help(command, name)
    assert [word for word in words if word not in text] == []


def test_further_defaults_are_those_of_the_library():
    given = inspect.signature(cli.train).parameters
    config = ProbeConfig()
    for name in ("pool", "num_attention_heads", "downcast", "layers"):
        assert given[name].default == getattr(config, name), name
    given = inspect.signature(cli.reproduce).parameters
    assert given["data"].default == ",".join(DATA)
    bench = Workbench("demo", None)
    assert list(range(given["seeds"].default)) == bench.seeds
    assert all(dtype in options.Dtype.__metadata__[0].help for dtype in DTYPES)
