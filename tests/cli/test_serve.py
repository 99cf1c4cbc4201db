"""What `llama-probe generate` and `classify` print of a row."""

import io

import pytest
from command_line import call

from llama_probe import ProbeConfig, ProbeError
from llama_probe.backbone import loading as backbones
from llama_probe.cli.serve import _batches, _print_rows


TWO = {0: "None", 1: "some"}


@pytest.mark.parametrize(
    "config, label, found, shown",
    [
        ({"id2label": TWO, "threshold": 0.9}, "None", [0.36, 0.64], "None (0.36)"),
        ({"id2label": {0: "[ok]", 1: "[/b]"}}, "[/b]", [0.25, 0.75], "[/b] (0.75)"),
        ({"id2label": {0: "[ok]", 1: "[/b]"}}, "[ok]", [0.75, 0.25], "[ok] (0.75)"),
        ({"id2label": TWO}, None, [], "-"),
        ({"id2label": TWO, "problem_type": "multi_label_classification"}, ["some"], [0.9, 0.6], "some (0.60)"),
        ({"id2label": TWO, "problem_type": "multi_label_classification"}, [], [0.1, 0.2], "no label"),
        ({"id2label": {0: "size"}, "problem_type": "regression"}, [3.25], [3.25], "size 3.25"),
    ],
)
def test_a_label_has_its_own_probability(capsys, config, label, found, shown):
    row = {"prompt": "[b]hi", "labels": {"mood": label}, "probabilities": {"mood": found}}
    _print_rows([row], {"mood": ProbeConfig(**config)}, as_json=False)
    printed = capsys.readouterr().out
    assert [cell.strip() for cell in printed.splitlines()[3].strip("│ ").split("│")] == ["[b]hi", shown]


def test_standard_input_that_is_not_in_its_encoding(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("café".encode("cp1252")), encoding="utf-8"))
    with pytest.raises(ProbeError, match=r"standard input is not in utf-8: .*0xe9"):
        next(_batches(None, ["mood"], "demo", "auto"))


@pytest.mark.parametrize(
    "words, told",
    [
        ("--halt-on toxic", "no head 'toxic' is active; active: toxicchat-gate"),
        ("--halt-on toxicchat-gate:rude", "'toxicchat-gate' has no label 'rude'; it has non-toxic, toxic"),
        ("--halt-on toxicchat-gate:toxic:2", "it must be a number from 0 to 1"),
        (
            "--halt-reply No.",
            "--halt-reply is what halted prompts get, and nothing halts here: give --halt-on as well",
        ),
    ],
)
def test_what_is_said_of_halting_is_checked_before_the_lm_is_loaded(monkeypatch, words, told):
    monkeypatch.setattr(backbones, "load_backbone", lambda *_: pytest.fail("the LM was loaded"))
    done = call("generate", "good one", "--probe", "toxicchat-gate", *words.split())
    assert done.returncode == 2 and told in done.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_somebody_at_a_terminal_is_asked_for_prompts(monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: terminal, raising=False)
    with pytest.raises(ProbeError, match="there is no prompt"):
        next(_batches([], ["mood"], "demo", "auto"))
    assert ("one a line" in capsys.readouterr().err) == terminal
