"""The commands on the tiny backbone, with one head that the first of them trains."""

import json
import shutil
from unittest.mock import Mock

import pytest
from command_line import call, refuse, succeed, train, write_rows
from conftest import make_lm, make_probe, make_tokenizer, save_head
from training_runs import write

from llama_probe import ProbeModel, __version__, cli
from llama_probe.cli.inputs import ScoredHead
from llama_probe.evaluation import transformations
from llama_probe.heads.configuration import read_config
from llama_probe.hub.folder import HEAD_FILES


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def trained(rows, backbone_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("heads") / "mood"
    sections = {
        "labels": {"names": ["fine", "awful"]},
        "slice_columns": ["half"],
        "seeds": 2,
        "head": {"max_length": 64},
        "card": {"license": "cc0-1.0", "dataset": "me/moods", "limits": ["other moods"]},
        "training": {"num_train_epochs": 3, "learning_rate": 0.03, "max_false_positive_rate": 0.1},
    }
    words = ("--test", rows / "test.jsonl", "--flagged", "awful", "--json")
    return output, train(backbone_folder, rows / "train.jsonl", output, *words, **sections)


@pytest.fixture(scope="module")
def served(trained, backbone_folder):
    """The options that name the head and its backbone."""
    return "--probe", trained[0], "--backbone", backbone_folder


def test_train_writes_a_head_folder(trained):
    output, results = trained
    assert {path.name for path in output.iterdir()} == {*HEAD_FILES}
    assert json.loads((output / "results.json").read_text()) == results
    config = read_config(output)
    assert config.id2label == {0: "fine", 1: "awful"} and config.token_scope == "last_user" and config.turn_markers
    assert config.max_length == 64 and config.threshold is not None and config.chat_template_hash
    assert [found["seed"] for found in results["runs"]] == [0, 1]
    assert set(results["summary"]["test"]["slices"]["half"]) == {"0", "1"}
    assert results["training"]["max_false_positive_rate"] == 0.1
    card = (output / "README.md").read_text()
    for part in ("license: cc0-1.0", "- me/moods", "`awful`", "other moods"):
        assert part in card
    assert str(output.parent) not in card, "no path of the machine that trained it"


def test_evaluate(trained, served, rows, monkeypatch):
    monkeypatch.setattr(transformations, "GROUPS", dict.fromkeys(transformations.GROUPS, (1, 1)))
    args = ("evaluate", *served, "--data", rows / "test.jsonl")
    found = succeed(*args, "--slice-column", "half", "--bootstrap", 50, "--json")
    results = trained[1]
    expected = next(run for run in results["runs"] if run["seed"] == results["chosen_seed"])["test"]
    for metric in ("rows", "accuracy", "f1", "auprc"):
        assert found[metric] == pytest.approx(expected[metric], abs=0.02)
    assert set(found["labels"]) == {"fine", "awful"}
    assert len(found["slices"]["half"]["1"]["intervals"]["accuracy"]) == 2
    shown = succeed(*args, "--bootstrap", 50, "--attacks")
    for part in ("awful", "auroc", "confusion", "calibration", "resamples", "rot13", "last in 7,500 tokens"):
        assert part in shown
    assert "resamples" not in succeed(*args, "--bootstrap", 0)
    assert "slice_columns" in refuse(*args, "--slice-column", "who")


def test_calibrate_and_record(trained, rows, backbone_folder, tmp_path):
    shutil.copytree(trained[0], head := tmp_path / "mood")
    served, weights = ("--probe", head, "--backbone", backbone_folder), (head / "probe_model.safetensors").read_bytes()
    texts = [{"text": f"good number {i}"} for i in range(43)]
    measured, then = {"rates": [], "bytes": 1, "parts": []}, read_config(head)
    (head / "results.json").write_text(json.dumps(trained[1] | {"measured": measured}))
    plain, more = write(tmp_path / "plain.jsonl", texts[:30]), write(tmp_path / "more.jsonl", texts[30:])
    assert "rows" in refuse("calibrate", *served)
    assert "34 rows" in refuse("calibrate", *served, "--benign", plain, "--rate", 0.03)
    args = ("calibrate", *served, "--benign", plain, "--benign", more, "--rate", 0.1, "--rate", 0.025)
    found = succeed(*args, "--json")
    config, results = read_config(head), json.loads((head / "results.json").read_text())
    assert config.thresholds == found["thresholds"]
    assert config.threshold == config.thresholds["fpr-10%"] <= config.thresholds["fpr-2.5%"]
    assert results["thresholds_from"]["rates"] == {"fpr-10%": 0.1, "fpr-2.5%": 0.025}
    assert results["thresholds_from"]["rows"] == 30 + 13 and results["runs"] == trained[1]["runs"]
    then = {"flagged": then.flagged[0], "thresholds": {"threshold": then.threshold}}
    assert results["measured"] == {"before_calibration": then, **measured}
    measure = ("evaluate", *served, "--data", plain, "--bootstrap", 9)
    report = succeed(*measure, "--benign", "--record", "plain", "--json")
    assert report["recall"] is None and report["auroc"] is None and report["confusion"][1] == [0, 0]
    kept = json.loads((head / "results.json").read_text())
    recorded = kept.pop("evaluations")["plain"]
    assert recorded["source"] == f"{tmp_path.name}/plain.jsonl" and recorded["flagged"] == report["flagged"]
    assert recorded["metrics"].items() <= report.items() and kept == results
    assert report["flagged"]["threshold"] == config.threshold and report["accuracy"] == 1 - report["flagged"]["share"]
    named = report["flagged"]["named"]
    assert {name: part["threshold"] for name, part in named.items()} == config.thresholds
    assert named["fpr-10%"]["share"] == report["flagged"]["share"] >= named["fpr-2.5%"]["share"]
    assert (head / "probe_model.safetensors").read_bytes() == weights and (head / "calibration.png").exists()
    assert "| plain (" in (head / "README.md").read_text() and "fpr-2.5%" in (head / "README.md").read_text()
    assert "'label'" in refuse(*measure), "without --benign"


@pytest.mark.parametrize("command", ["generate", "classify"])
def test_generate_and_classify(trained, served, backbone_folder, tmp_path, command):
    found = succeed(command, *served, "--json", stdin="good morning\n\nbad luck\n")
    assert [row["prompt"] for row in found] == ["good morning", "bad luck"]
    assert all(row["probes"]["mood"]["label"] in ("fine", "awful") for row in found)
    assert ("reply" in found[0]) == (command == "generate")
    shown = succeed(command, "good evening", *served[:2])  # on the backbone that the head records
    assert "good evening" in shown and "mood" in shown
    head = ProbeModel.from_pretrained(trained[0])
    config = head.config
    for name, changes in {"raw": {"prompt_format": "raw"}, "short": {"max_length": 63}}.items():
        head.config = config.replace(**changes)
        save_head(head, tmp_path / name)
        options = command, "bad luck", *served, "--probe", tmp_path / name
        if command == "generate" and name == "raw":
            assert "prompt_format" in refuse(*options), "a reply has one prompt"
        else:
            assert set(succeed(*options, "--json")[0]["probes"]) == {"mood", name}


@pytest.mark.usefixtures("no_plots")
def test_a_head_of_replies(backbone_folder, tmp_path):
    lines = [{"ask": f"number {i}?", "text": "bad, bad" if i % 2 else "good, good", "label": i % 2} for i in range(40)]
    rows, guard = write(tmp_path / "rows.jsonl", lines), tmp_path / "guard"
    data = ("--backbone", backbone_folder, "--prompt-column", "ask")
    training, labels = {"num_train_epochs": 2, "learning_rate": 0.03}, {"names": ["fine", "awful"]}
    train(backbone_folder, rows, guard, *data[2:], "--flagged", "awful", training=training, labels=labels)
    config = read_config(guard)
    assert config.token_scope == "response" and config.causal and config.prefix_ids
    benign = write(tmp_path / "benign.jsonl", lines[::2])
    found = succeed("calibrate", *data, "--probe", guard, "--benign", benign, "--rate", 0.1, "--json")
    assert found["rates"] == {"fpr-10%": 0.1}
    evaluate = ("evaluate", *data, "--probe", guard, "--data", rows, "--bootstrap", 20)
    report = succeed(*evaluate, "--json")
    measured = report["replies"]
    assert measured["thresholds"]["fpr-10%"]["false_halts"] <= 0.1
    assert report["auroc"] > 0.9 and "awful" in succeed(*evaluate)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(ScoredHead, "attach")  # refused before the backbone is loaded
        assert "chats" in refuse(*evaluate, "--attacks")
        for words in (("evaluate", "--data", rows), ("calibrate", "--benign", rows)):
            assert "--prompt-column" in refuse(*words, *data[:2], "--probe", guard)
    served = ("--probe", guard, "--backbone", backbone_folder)
    args = ("generate", "good one", *served, "--max-new-tokens", 4, "--json", "--halt-on")
    (row,) = succeed(*args, "guard:awful:0")
    assert row["halted"]["token"] == 0 and row["probes"]["guard"]["label"] in ("fine", "awful")
    (row,) = succeed(*args, 'guard={"label": "awful", "threshold": 0, "patience": 2}')
    assert row["halted"]["token"] == 1
    same = [word for name in "dcba" for word in ("--probe", shutil.copytree(guard, tmp_path / name))]
    (row,) = succeed("generate", "good one", *same, *served[2:], "--max-new-tokens", 2, "--json")
    assert list(row["probes"]) == list("dcba")
    assert "--prompt-column" in refuse("classify", "good one", *served)
    words = ("--train", rows, "--set", "head.token_scope=all", "--validation", rows, "--output", tmp_path / "no")
    assert "prompt_column" in refuse("train", "--backbone", backbone_folder, *words).replace("-", "_")
    assert not (tmp_path / "no").exists(), "before any work"


def test_inspect(trained, backbone_folder, tmp_path):
    output, _ = trained
    assert succeed("inspect", output, "--json")["probe_type"] == "gate"
    assert "num_parameters" in succeed("inspect", output) and "toxicchat-mha" in succeed("inspect")
    assert "belongs to this backbone" in succeed("inspect", output, "--backbone", backbone_folder)
    checks = succeed("inspect", output, "--backbone", backbone_folder, "--dtype", "bfloat16", "--json")
    verdicts = {check["field"]: check["verdict"] for check in checks}
    assert verdicts["fingerprint"] == "same" and verdicts["base_model_dtype"] == "explained"
    make_lm(vocab_size=260, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    assert "cannot run on this backbone" in succeed("inspect", output, "--backbone", tmp_path / "other")


def test_push_pull_and_use(trained, backbone_folder, hub, token, tmp_path, monkeypatch):
    output, _ = trained
    pushed = succeed("push", output, "alice/mood", "--private", "--subfolder", "v1", "--tag", "mine", "--json")
    assert pushed["commit"] == hub.head("alice/mood") and hub.repositories["alice/mood"].private
    assert set(hub.files("alice/mood")) >= {f"v1/{path.name}" for path in output.iterdir()}
    succeed("pull", "alice/mood:v1", "--output", tmp_path / "back")
    hub.requests.clear()
    succeed("pull", "alice/mood:v1", "--force-download", "--output", tmp_path / "again")
    assert hub.count("GET", "probe_model.safetensors")
    for name in ("probe_model.safetensors", "layer_weights.png"):
        assert (tmp_path / "back" / name).read_bytes() == (output / name).read_bytes()
    words = ("classify", "bad luck", "--backbone", backbone_folder, "--probe", "alice/mood:v1", "--json")
    assert succeed(*words)[0]["probes"]["v1"]["label"] in ("fine", "awful")
    monkeypatch.setenv("HF_TOKEN", hub.add_user("alice", "read"))
    assert "hf_" not in refuse("push", output, "alice/mood")


TRAIN = "train --train {rows} --output {out} "


@pytest.mark.parametrize(
    "line, named",
    [
        ("destroy", "destroy"),
        ("evaluate", "--data"),
        ("inspect nothing-here", "nothing-here"),
        ("inspect --backbone demo", "--backbone"),
        ("inspect --revision main", "--revision"),
        ("inspect toxicchat-mha --revision v2", "v2"),
        ("classify x --input y", "--output"),
        ("generate x --probe toxicchat-gate --halt-on toxic", "toxic"),
        ("evaluate --probe toxicchat-gate --data {rows} --record mine", "--record"),
        ("calibrate --probe toxicchat-gate --benign {rows}", "toxicchat-gate"),
        ("generate x --halt-reply No.", "--halt-on"),
        (TRAIN + "--layers 1", "--layers"),
        (TRAIN + "--num-train-epochs 0", "num_train_epochs=0"),
        ("train --train toxichat --output {out}", "'toxichat' is no file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(rows, backbone_folder, tmp_path, line, named):
    words = line.format(rows=rows / "train.jsonl", out=tmp_path / "out", backbone=backbone_folder).split()
    if words[0] == "train":
        words += ["--backbone", backbone_folder]
    assert named in refuse(*words)
    assert not (tmp_path / "out").exists()


def test_letters_that_the_terminal_lacks_and_names_that_control_it(tmp_path):
    folder = save_head(make_probe(id2label={0: "né", 1: "有害"}), tmp_path / "head")
    done = call("inspect", folder, encoding="ascii")
    assert done.returncode == 0 and r"n\xe9" in done.stdout and r"\u6709\u5bb3" in done.stdout, done.stderr
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0, "k\\u001b[31m": 1}\n')
    words = ("--probe", "toxicchat-gate", "--data", tmp_path / "rows.jsonl", "--text-column", "other")
    assert r"k\x1b[31m" in refuse("evaluate", *words)


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(13, "Permission denied", "/root/head"), "/root/head: Permission denied"),
        (ModuleNotFoundError(name="datasets.features"), "llama_probe[train]"),
        (ModuleNotFoundError(name="evaluate"), "llama_probe[train]"),
    ],
)
def test_what_the_system_refuses_and_packages_that_are_missing(monkeypatch, error, words):
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    assert words in refuse("train")


def test_a_fault_of_the_program_shows_where_it_lies(monkeypatch):
    monkeypatch.setattr(cli, "app", Mock(side_effect=ModuleNotFoundError(name="somebodys_package")))
    with pytest.raises(ModuleNotFoundError):
        call("train")


def test_the_version_and_the_list_of_commands():
    assert succeed("--version") == f"llama-probe {__version__}\n"
    shown = succeed()
    assert [name for name in cli.COMMANDS if name not in shown] == []
