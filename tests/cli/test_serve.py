"""Prompts of `llama-probe generate` and `classify`, and their table."""

import io
import re

import pyarrow.parquet as pq
import pytest
import torch
from command_line import call, refuse, succeed
from conftest import make_probe, with_novelty
from training_runs import write
from transformers import AutoTokenizer

from llama_probe import ProbeConfig, ProbeError
from llama_probe.cli import serve
from llama_probe.data.prompts import PromptFormat
from llama_probe.heads.decision import describe_predictions
from llama_probe.vllm.halting_words import read_halting


TWO = {"id2label": {0: "None", 1: "[some]"}}


@pytest.mark.parametrize(
    "config, label, found, shown",
    [
        (TWO | {"threshold": 0.9}, "None", [0.36, 0.64], "None (0.36)"),
        (TWO, "[some]", [0.25, 0.75], "[some] (0.75)"),
        (TWO, None, [], "-"),
        (TWO, None, [0.25, 0.75], "no label: unlike the training data"),
        (TWO | {"problem_type": "multi_label_classification"}, [], [0.1, 0.2], "no label"),
        ({"id2label": {0: "size"}, "problem_type": "regression"}, [3.25], [3.25], "size 3.25"),
    ],
)
def test_a_label_has_its_own_probability(capsys, config, label, found, shown):
    config = ProbeConfig(**config)
    prediction = describe_predictions([label], torch.tensor([found]), config)[0] if found else None
    serve.print_rows([{"prompt": "[b]hi", "probes": {"mood": prediction}}])
    printed = capsys.readouterr().out
    assert [cell.strip() for cell in printed.splitlines()[3].strip("│ ").split("│")] == ["[b]hi", shown]


def test_standard_input_that_is_not_in_its_encoding():
    stdin = io.TextIOWrapper(io.BytesIO("café".encode("cp1252")), encoding="utf-8")
    assert "utf-8" in refuse("classify", "--probe", "toxicchat-gate", stdin=stdin)


@pytest.mark.parametrize("names", [("tool", "user"), ("user", "tool")])
def test_a_prompt_is_the_users_beside_a_head_of_tool_results(backbone_folder, tmp_path, names):
    fields = PromptFormat(AutoTokenizer.from_pretrained(backbone_folder)).config_fields()
    for name in names:
        with_novelty(make_probe(token_scope=name, flagged=["LABEL_1"], **fields)).save_pretrained(tmp_path / name)
    probes = [word for name in names for word in ("--probe", tmp_path / name)]
    args = ("Look at it.", "--backbone", backbone_folder, "--max-new-tokens", 1, "--json")
    (row,) = succeed("generate", *probes, *args)
    (alone,) = succeed("generate", "--probe", tmp_path / "user", *args)
    assert row["probes"]["user"] == alone["probes"]["user"]
    tool = row["probes"]["tool"]
    assert tool["scores"] == {"LABEL_0": 1.0, "LABEL_1": 0.0} and tool["novelty"] is None, "it has nothing to read"
    chats = write(tmp_path / "chats.jsonl", [{"text": [{"role": "user", "content": "Look at it."}]}])
    succeed("classify", *probes, *args[1:3], "--input", chats, "--output", tmp_path / "labels")
    (cells,) = pq.read_table(tmp_path / "labels").to_pylist()
    assert cells["tool_label"] == "LABEL_0" and cells["tool_novelty"] is None and cells["user_novelty"] is not None


def test_texts_are_cut_only_where_the_head_or_the_user_says_so(backbone_folder, tmp_path):
    fields = PromptFormat(AutoTokenizer.from_pretrained(backbone_folder)).config_fields()
    fields |= {"max_length": 90, "token_scope": "content", "flagged": ["LABEL_1"]}
    make_probe(**fields).save_pretrained(tmp_path / "cut")
    make_probe(**fields, window=16).save_pretrained(tmp_path / "windows")
    text = "a text of which no head has seen the end, " * 4
    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": 0}, {"text": "Hi", "label": 1}])
    for command in (["classify", text, "Hi"], ["evaluate", "--data", rows, "--bootstrap", 0]):
        warned = {}
        for name, more in (("cut", []), ("windows", []), ("windows", ["--max-length", 70])):
            done = call(*command, "--probe", tmp_path / name, "--backbone", backbone_folder, "--json", *more)
            assert done.returncode == 0, done.stderr
            warned[name, *more[1:]] = re.findall(r"(\d) of 2 prompts were cut to max_length=(\d+)", done.stderr)
        assert warned == {("cut",): [("1", "90")], ("windows",): [], ("windows", 70): [("1", "70")]}


def test_passages(backbone_folder, tmp_path):
    fields = PromptFormat(AutoTokenizer.from_pretrained(backbone_folder)).config_fields()
    fields |= {"id2label": {0: "fine", 1: "[bad]"}, "flagged": ["[bad]"], "token_scope": "content", "threshold": 0.0}
    make_probe(**fields, window=16).save_pretrained(tmp_path / "windows")
    make_probe(**fields).save_pretrained(tmp_path / "plain")
    text = "one two three\nfour [b]five[/b] six " * 20
    args = ("--backbone", backbone_folder, "--spans")
    found = succeed("classify", text, "Hi", "--probe", tmp_path / "windows", "--json", *args)
    (passage,) = found[0]["probes"]["windows"]["passages"]
    assert passage.keys() == {"label", "start", "end", "text"} and passage["label"] == "[bad]"
    assert text[passage["start"] : passage["end"]] == passage["text"] and 0 < len(passage["text"]) <= 16
    shown = succeed("classify", text, "Hi", "--probe", tmp_path / "windows", *args)
    (line, *_) = (line for line in shown.splitlines() if line.startswith("prompt 1: windows: [bad], characters"))
    assert f"{passage['start']:,} to {passage['end']:,}" in line
    assert f"»{' '.join(passage['text'].split())}«" in shown.replace("\n", "") and len(shown) < 3 * len(text)
    rows = write(
        tmp_path / "rows.jsonl", [{"text": text}, {"text": [{"role": "user", "content": "Hi"}]}, {"text": ""}]
    )
    succeed("classify", "--probe", tmp_path / "windows", *args, "--input", rows, "--output", tmp_path / "labels")
    first, chat, empty = pq.read_table(tmp_path / "labels").to_pylist()
    assert first["windows_passages"] == [passage | {"message": None}] and empty["windows_passages"] is None
    assert [each["message"] for each in chat["windows_passages"]] == [0]
    for words in ([text], ["--input", rows, "--output", tmp_path / "other"]):
        assert "'plain' judges no windows" in refuse("classify", *words, "--probe", tmp_path / "plain", *args)


def test_a_user_at_a_terminal_is_asked_for_prompts():
    stdin = io.StringIO("\n")
    stdin.isatty = lambda: True
    assert "one a line" in call("classify", "--probe", "toxicchat-gate", stdin=stdin).stderr
    assert "one a line" not in call("classify", "--probe", "toxicchat-gate", stdin="\n").stderr


def test_halting_words_are_options_of_each_head():
    words = ["e", "guard:bad", "a-b_1:no way:0.25", 'c={"label": "a:b=c", "patience": 2}', "d:bad:fpr-2%", "v1.0"]
    rules = read_halting(words)
    assert rules == {
        "e": {}, "guard": {"label": "bad"}, "a-b_1": {"label": "no way", "threshold": 0.25},
        "c": {"label": "a:b=c", "patience": 2}, "d": {"label": "bad", "threshold": "fpr-2%"}, "v1-0": {},
    }  # fmt: skip
    for wrong in ([""], [":bad"], ["guard:bad:0.5:2"], ["guard=3"], ["a b"], ["guard:bad:0.9", "guard"]):
        with pytest.raises(ProbeError, match="--halt-on"):
            read_halting(wrong)
