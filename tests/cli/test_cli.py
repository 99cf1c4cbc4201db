"""The command line on the tiny backbone: each command once in a process of its own."""

import json
import shutil

import pytest
from command_line import call, run, write_rows
from conftest import make_lm, make_probe, make_tokenizer, read_head, save_head

from llama_probe import __version__
from llama_probe.heads.configuration import read_config
from llama_probe.hub.card import create_card


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def trained(rows, backbone_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("heads") / "mood"
    done = run(
        "train", "--backbone", backbone_folder, "--probe-type", "gate", "--train", rows / "train.jsonl", "--test", rows / "test.jsonl",
        "--label-names", "fine,awful", "--slice-column", "half", "--output", output, "--epochs", 6, "--learning-rate", 0.03,
        "--num-seeds", 2, "--max-length", 64, "--license", "cc0-1.0", "--dataset", "me/moods", "--limit", "other moods", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def test_train_writes_a_head_folder(trained):
    output, results = trained
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "calibration.png", "layer_weights.png", "probe_config.json", "probe_model.safetensors", "results.json",
    ]  # fmt: skip
    assert json.loads((output / "results.json").read_text()) == results
    config = read_config(output)
    assert config.id2label == {0: "fine", 1: "awful"} and config.token_scope == "content" and config.prefix_ids
    assert config.max_length == 64 and config.threshold is not None and config.chat_template_hash
    assert len(config.fingerprint) == 32 and config.base_model_dtype == "float32" and config.vocab_size == 260
    assert results["inspection"]["split"] == "test" and set(results["inspection"]["thresholds"]) == {"awful"}
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    best = max(results["runs"], key=lambda run: run["validation"]["auprc"])
    assert results["chosen_seed"] == best["seed"]
    mean = sum(run["test"]["f1"] for run in results["runs"]) / 2
    assert results["summary"]["test"]["f1"]["mean"] == pytest.approx(mean)
    assert set(results["summary"]["test"]["slices"]["half"]) == {"0", "1"}


def test_benchmark(trained, backbone_folder, tmp_path):
    args = (
        "benchmark", "--backbone", backbone_folder, "--probe", trained[0], "--kind", "mha", "--many", 2, "--tokens", 8,
        "--batch-size", 2, "--pairs", 2, "--warmup", 1, "--device", "cpu", "--guard", backbone_folder, "--random-weights",
    )  # fmt: skip
    done = run(*args, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = ["base", "base again", "mood", "mha", "2 x mha", "naive mood", "naive mha", "guard tiny-chat"]
    assert [row["system"] for row in report["rows"]] == names
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["benchmark.json", "benchmark.png"]
    shown = call(*args, "--no-naive")
    assert shown.returncode == 0, shown.stderr
    for part in ("batch 2, 8 tokens, 1 new", "2 x mha", "guard tiny-chat", "base again", "random weights"):
        assert part in shown.stdout
    assert "naive" not in shown.stdout and "written" not in shown.stdout
    lines = call(*args, "--no-naive", "--markdown").stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [
        names[0],
        *names[1:5],
        names[7],
    ]


def test_evaluate_repeats_what_training_reported(trained, rows, backbone_folder):
    output, results = trained
    done = run(
        "evaluate",
        "--probe",
        output,
        "--backbone",
        backbone_folder,
        "--data",
        rows / "test.jsonl",
        "--slice-column",
        "half",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found, expected = (
        json.loads(done.stdout),
        next(r for r in results["runs"] if r["seed"] == results["chosen_seed"])["test"],
    )
    assert found["rows"] == 20
    for metric in ("accuracy", "f1", "auprc"):
        assert found[metric] == pytest.approx(expected[metric], abs=0.02)


def test_evaluate_measures_a_head_whose_results_are_of_another_version(trained, rows, backbone_folder, tmp_path):
    shutil.copytree(trained[0], tmp_path / "head")
    (tmp_path / "head" / "results.json").write_text("{}")
    args = ("--probe", tmp_path / "head", "--backbone", backbone_folder, "--data", rows / "test.jsonl", "--json")
    done = call("evaluate", *args)
    assert done.returncode == 0 and json.loads(done.stdout)["rows"] == 20, done.stderr


def test_evaluate_says_how_far_to_trust_it(trained, rows, backbone_folder):
    args = ("evaluate", "--probe", trained[0], "--backbone", backbone_folder, "--data", rows / "test.jsonl")
    done = call(*args, "--slice-column", "half", "--bootstrap", 50, "--seed", 3, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bootstrap"] == {"resamples": 50, "seed": 3, "level": 0.95}
    low, high = found["intervals"]["auprc"]
    assert low - 1e-9 <= found["auprc"] <= high + 1e-9 and set(found["labels"]) == {"fine", "awful"}
    assert len(found["slices"]["half"]["1"]["intervals"]["accuracy"]) == 2
    assert sum(map(sum, found["confusion"])) == 20 and found["calibration"]["intervals"]["error_uncalibrated"]
    shown = call(*args, "--bootstrap", 50).stdout
    for part in ("all rows", "awful", "auroc", "what the head gives", "Expected calibration error", "50 resamples"):
        assert part in shown
    assert (
        f"[{low:.3f}, " not in call(*args, "--bootstrap", 0).stdout
        and "resamples" not in call(*args, "--bootstrap", 0).stdout
    )


def test_the_card_tells_what_was_measured(trained):
    output, results = trained
    text = (output / "README.md").read_text()
    assert text == str(create_card(output)), "the folder alone gives the card"
    chosen = next(run for run in results["runs"] if run["seed"] == results["chosen_seed"])["test"]
    for part in (
        "license: cc0-1.0",
        "- me/moods",
        "`awful`",
        "Other moods".lower(),
        f"{chosen['f1']:.3f}",
    ):
        assert part in text
    card = create_card(output)
    assert card.data.eval_results[0].metric_value is not None
    assert "base_model:" not in text, "a folder is no model of the Hub"
    assert str(output.parent) not in text, "no path of the machine that trained it"


@pytest.mark.parametrize("command", ["generate", "classify"])
def test_heads_of_other_prompts_do_not_share_a_pass(trained, backbone_folder, tmp_path, command):
    head = read_head(trained[0])
    head.config = head.config.replace(prompt_format="raw")
    save_head(head, tmp_path / "raw")
    heads = ("--probe", trained[0], "--probe", tmp_path / "raw")
    done = call(command, "bad luck", "--backbone", backbone_folder, *heads)
    assert done.returncode == 2 and "cannot share a pass: prompt_format is 'chat' and 'raw'" in done.stderr


@pytest.mark.parametrize("command", ["generate", "classify"])
def test_generate_and_classify(trained, backbone_folder, command):
    output, _ = trained
    done = call(command, "--backbone", backbone_folder, "--probe", output, "--json", stdin="good morning\nbad luck\n")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["prompt"] for row in found] == ["good morning", "bad luck"]
    assert all(row["labels"]["mood"] in ("fine", "awful") and len(row["probabilities"]["mood"]) == 2 for row in found)
    assert ("reply" in found[0]) == (command == "generate")
    table = call(command, "good evening", "--backbone", backbone_folder, "--probe", output)
    assert table.returncode == 0 and "good evening" in table.stdout and "mood" in table.stdout


def test_halting(trained, backbone_folder):
    args = (
        "generate",
        "--probe",
        trained[0],
        "--backbone",
        backbone_folder,
        "--max-new-tokens",
        3,
        "--json",
        "good one",
    )
    done = call(*args, "--halt-on", "mood:awful:0", "--halt-reply", "No.")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["reply"] == "No." and row["halted"]["head"] == "mood" and row["halted"]["label"] == "awful"
    (row,) = json.loads(call(*args, "--halt-on", "mood:awful:1").stdout)
    assert row["halted"] is None
    refused = call(*args, "--halt-on", "mood:sad")
    assert refused.returncode == 2 and "no label 'sad'; it has fine, awful" in refused.stderr
    assert "must be HEAD[:LABEL" in call(*args, "--halt-on", "mood:awful:high").stderr
    idle = call(*args, "--halt-reply", "No.")
    assert idle.returncode == 2 and "nothing halts here" in idle.stderr


def test_a_head_of_replies(backbone_folder, tmp_path):
    lines = [
        json.dumps({"ask": f"number {i}?", "text": "bad, bad" if i % 2 else "good, good", "label": i % 2})
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = ("--backbone", backbone_folder, "--prompt-column", "ask")
    done = call(
        "train", *data, "--train", tmp_path / "rows.jsonl", "--probe-type", "gate", "--token-scope", "response", "--output",
        tmp_path / "guard", "--label-names", "fine,awful", "--epochs", 2, "--folds", 0, "--learning-rate", 0.03,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "guard")
    assert config.token_scope == "response" and config.causal and config.prefix_ids
    done = call("evaluate", *data, "--probe", tmp_path / "guard", "--data", tmp_path / "rows.jsonl", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["auroc"] > 0.9, done.stderr
    shutil.copytree(tmp_path / "guard", tmp_path / "odd")
    (tmp_path / "odd" / "results.json").write_text('{"runs": [], "chosen_seed": 0}')
    done = call("evaluate", *data, "--probe", tmp_path / "odd", "--data", tmp_path / "rows.jsonl")
    assert done.returncode == 2 and "no run of a chosen seed. Remove the file" in done.stderr
    args = (
        "generate",
        "good one",
        "--probe",
        tmp_path / "guard",
        "--backbone",
        backbone_folder,
        "--max-new-tokens",
        4,
    )
    done = call(*args, "--halt-on", "guard:awful:0", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (
        row["halted"]["head"] == "guard"
        and row["halted"]["token"] == 0
        and row["labels"]["guard"] in ("fine", "awful")
    )
    patient = call(*args, "--halt-on", 'guard={"label": "awful", "threshold": 0, "patience": 2}', "--json")
    assert json.loads(patient.stdout)[0]["halted"]["token"] == 1, patient.stderr
    table = call(*args, "--halt-on", "guard:awful:0")
    assert table.returncode == 0 and "halted" in table.stdout
    alone = call("classify", *args[1:6])
    assert alone.returncode == 2 and "'guard' reads replies" in alone.stderr and "--prompt-column" in alone.stderr
    refused = call(
        "train", "--backbone", backbone_folder, "--train", tmp_path / "rows.jsonl", "--token-scope", "all", "--eval", tmp_path / "rows.jsonl",
        "--output", tmp_path / "no",
    )  # fmt: skip
    assert refused.returncode == 2 and "needs rows with a prompt and a reply" in refused.stderr
    assert not (tmp_path / "no").exists(), "before any work"


def test_inspect(trained):
    output, _ = trained
    assert json.loads(run("inspect", output, "--json").stdout)["probe_type"] == "gate"
    assert "num_parameters" in call("inspect", output).stdout
    assert call("inspect").returncode == 0


def test_inspect_beside_a_backbone(trained, backbone_folder, tmp_path):
    output, _ = trained
    same = call("inspect", output, "--backbone", backbone_folder)
    assert same.returncode == 0 and "belongs to this backbone" in same.stdout and "differs" not in same.stdout
    checks = json.loads(call("inspect", output, "--backbone", backbone_folder, "--dtype", "bfloat16", "--json").stdout)
    verdicts = {check["field"]: check["verdict"] for check in checks}
    assert verdicts["fingerprint"] == verdicts["chat_template_hash"] == "same"
    assert verdicts["base_model_dtype"] == "explained"
    make_lm(vocab_size=260, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    other = call("inspect", output, "--backbone", tmp_path / "other")
    assert other.returncode == 0 and "cannot run on this backbone" in other.stdout


def test_push_pull_and_use(trained, backbone_folder, hub, tmp_path, monkeypatch):
    output, _ = trained
    token = hub.add_user("alice")
    online = {**hub.env, "HF_TOKEN": token}
    pushed = run("push", output, "alice/mood", "--private", "--subfolder", "v1", "--tag", "mine", "--json", **online)
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["commit"] == hub.head("alice/mood") and hub.repositories["alice/mood"].private
    assert set(hub.files("alice/mood")) >= {f"v1/{path.name}" for path in output.iterdir()}
    assert 'probe="alice/mood:v1"' in hub.files("alice/mood")["v1/README.md"].decode()
    monkeypatch.setenv("HF_TOKEN", token)
    pulled = call("pull", "alice/mood:v1", "--output", tmp_path / "back")
    assert pulled.returncode == 0, pulled.stderr
    for name in ("probe_model.safetensors", "results.json", "layer_weights.png"):
        assert (tmp_path / "back" / name).read_bytes() == (output / name).read_bytes()
    done = call("classify", "bad luck", "--backbone", backbone_folder, "--probe", "alice/mood:v1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["labels"]["v1"] in ("fine", "awful")
    monkeypatch.setenv("HF_TOKEN", hub.add_token("alice", role="read"))
    refused = call("push", output, "alice/mood")
    assert refused.returncode == 2 and "may not write" in refused.stderr and "hf_" not in refused.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        (("destroy",), "No such command 'destroy'; see llama-probe --help"),
        (("inspect", "a", "b"), "unexpected extra argument"),
        (("evaluate",), "Missing option '--probe'; see llama-probe evaluate --help"),
        (
            ("evaluate", "--probe", "toxicchat-mha", "--data", "no.csv", "--bootstrap", "1000000000"),
            "Invalid value for '--bootstrap'",
        ),
        (
            ("evaluate", "--probe", "toxicchat-mha", "--data", "{rows}", "--split", "test"),
            "train.jsonl is a file, all of which is read; leave --split out",
        ),
        (("train", "--train", "{rows}", "--output", "x", "--epoch", "3"), "No such option: --epoch"),
        (("train", "--train", "{rows}", "--output", "x", "--epochs", "few"), "Invalid value for '--epochs'"),
        (("inspect", "nothing-here"), "neither a folder nor a bundled head"),
        (("inspect", "--backbone", "demo"), "name the head that --backbone or --revision is for"),
        (("inspect", "--revision", "main"), "name the head that --backbone or --revision is for"),
        (("inspect", ".", "--revision", "v2"), "--revision v2: . is a folder, and has no revisions"),
        (("inspect", "a/b@v1", "--revision", "v2"), "--revision v2: a/b@v1 names a revision already; leave one out"),
        (("pull", "a/b@v1:c", "--revision", "v2"), "--revision v2: a/b@v1:c names a revision already; leave one out"),
        (("inspect", "toxicchat-mha", "--markdown"), "--markdown is of all bundled heads: leave out toxicchat-mha"),
        (("inspect", "--markdown", "--json"), "--markdown is of all bundled heads: leave out --json"),
        (("classify", "x", "--probe", "nothing-here"), "neither a folder nor a bundled head"),
        (("classify", "x", "--backbone", "no/such"), "bundled heads"),
        (("benchmark", "--backbone", "no/such"), "with --random-weights also llama-3b, t5-large"),
        (("benchmark", "--backbone", "no/such", "--output", "{rows}"), "name a folder for benchmark.json"),
        (("train", "--train", "no.jsonl", "--output", "x"), "there is no file no.jsonl"),
        (
            ("train", "--train", "{rows}", "--output", "x", "--probe-type", "lstm"),
            "allowed: attentive, gate, last, mha, muli, multimax, pooling",
        ),
        (("train", "--train", "{rows}", "--output", "x", "--option", "rank=low"), "must be NAME=NUMBER"),
        *(
            (
                (*command, "--output", "x", "--no-cache", "--cache-dir", "kept"),
                "cache=False (--no-cache)",
            )
            for command in (("train", "--train", "{rows}"), ("sweep", "--train", "{rows}"), ("reproduce",))
        ),
        (("train", "--train", "{rows}", "--output", "x", "--text-column", "body"), "has no column 'body'"),
        (("train", "--train", "{rows}", "--output", "x", "--num-seeds", "9" * 20), "Invalid value for '--num-seeds'"),
        (("evaluate", "--probe", "toxicchat-gate", "--data", ""), "'' names no rows"),
        (("train", "--train", "{rows}", "--output", "x", "--metric", "beauty"), "metric='beauty' cannot choose"),
        (("train", "--train", "{rows}", "--output", "x", "--class-weights", "a,b"), "--class-weights="),
        (("train", "--train", "{rows}", "--output", "x", "--max-false-positive-rate", "1.5"), "below 1"),
        (
            (
                "train",
                "--train",
                "{rows}",
                "--output",
                "x",
                "--max-false-positive-rate",
                "0.1",
                "--problem-type",
                "regression",
            ),
            "--max-false-positive-rate=0.1 needs a head with two labels or a multi-label head",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(rows, backbone_folder, tmp_path, args, words):
    args = [str(arg).replace("{rows}", str(rows / "train.jsonl")) for arg in args]
    if args[0] in ("train", "sweep", "reproduce"):
        args += ["--backbone", str(backbone_folder)]
        args[args.index("x")] = str(tmp_path / "out")
    if args[:3] == ["classify", "x", "--backbone"]:
        args += ["--probe", "no-such-head"]
    done = call(*args)
    assert done.returncode == 2, done.stderr
    *before, last = done.stderr.strip().splitlines()
    assert not any("Usage" in line or "╭" in line for line in before)
    assert last.startswith("llama-probe: ") and words in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_labels_that_the_terminal_has_no_letters_for(tmp_path):
    folder = save_head(make_probe(id2label={0: "né", 1: "有害"}), tmp_path / "head")
    done = run("inspect", folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and r"n\xe9" in done.stdout and r"\u6709\u5bb3" in done.stdout, done.stderr


def test_the_version():
    done = call("--version")
    assert done.returncode == 0 and done.stdout == f"llama-probe {__version__}\n"
