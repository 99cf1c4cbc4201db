"""What `llama-probe generate` and `classify` print of a row."""

import io

import pytest

from llama_probe import ProbeConfig, ProbeError
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
