"""Cards: made from a folder's config and results alone, and equal to those in hub_cards."""

import contextlib
import json
import time

import pytest
from conftest import make_probe, make_tokenizer, read_head, save_head

from llama_probe import ProbeError
from llama_probe.data.prompts import PromptFormat
from llama_probe.evaluation.metrics import summarize
from llama_probe.heads.configuration import read_config
from llama_probe.hub.card import MARKER, read_card, renew_card, write_card
from llama_probe.hub.folder import PLOT_NAMES, read_config_values, read_results
from llama_probe.hub.resolve import bundled_heads


@pytest.fixture
def folder(tmp_path):
    """A head folder with the results of two seeds."""
    probe = make_probe(id2label={0: "no", 1: "yes"}, threshold=0.4, base_model_name_or_path="me/lm")
    folder = save_head(probe, tmp_path / "weather")
    scores = {"rows": 10, "accuracy": 0.8, "f1": 0.5, "precision": 0.6, "recall": 0.4, "auprc": 0.7, "auroc": 0.9}
    slices = {"who": {"a": {**scores, "auprc": None}}}
    tests = [{**scores, "f1": 0.5 + seed / 10, "slices": slices} for seed in (0, 1)]
    runs = [{"seed": seed, "validation": dict(scores), "test": test} for seed, test in enumerate(tests)]
    results = {
        "num_parameters": 1234,
        "data": {"train": {"source": "a/b.csv", "rows": 90}, "test": {"source": "c.csv", "rows": 10, "documents": 4}},
        "training": {
            "learning_rate": 0.01, "weight_decay": 0.0, "per_device_train_batch_size": 8, "metric": "auprc",
            "gradient_accumulation_steps": 2, "num_train_epochs": 3, "label_smoothing_factor": 0.0,
        },
        "runs": runs,
        "chosen_seed": 1,
        "summary": {name: summarize([run[name] for run in runs]) for name in ("validation", "test")},
        "card": {"license": "cc0-1.0", "dataset": "me/weather", "limits": ["hail"], "command": "llama-probe train"},
        "environment": {"python": "3.11"},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def create_card(folder, source=None):
    """Return the card that a save of the head would write."""
    plots = [name for name in PLOT_NAMES if (folder / name).is_file()]
    return renew_card(folder, read_config_values(folder), read_results(folder), plots, source)


def change_config(folder, **changes):
    (folder / "probe_config.json").write_text(read_config(folder).replace(**changes).to_json_string())


def card_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_chosen_seed_and_the_spread(folder):
    text = write_card(folder).read_text()
    parts = (
        "0.600 (0.550 ± 0.071)",
        "seed 1, the best of 2 by auprc",
        "test, who = a",
        "| - |",
        "batch 16",
        "- hail.",
        "4 of them documents)",
    )
    for part in parts:
        assert part in text
    data = create_card(folder).data
    assert data.license == "cc0-1.0" and data.base_model_relation == "adapter"
    assert {result.metric_type: result.metric_value for result in data.eval_results}["f1"] == 0.6


@pytest.mark.parametrize("values", [{}, {"prompt_format": "raw", "num_labels": 3}])
def test_a_head_without_results(tmp_path, values):
    folder = save_head(make_probe(), tmp_path / "fresh")
    (folder / "probe_config.json").write_text(json.dumps({"hidden_size": 32, "num_hidden_layers": 4, **values}))
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [mine, probe-old]\n---\n")
    card = create_card(folder, source="me/fresh")
    assert "Nothing was measured" in card.content and 'probe="me/fresh"' in card.content
    assert ("`LABEL_2`" in card.content) == ("num_labels" in values)
    assert card.data.license == "mit" and not card.data.eval_results
    assert card.data.tags == ["llama_probe", "probe", "probe-mha", "mine"]


def test_a_saved_head_gets_a_card_that_a_person_may_edit(folder):
    (folder / "README.md").write_text(f"---\nlicense: mit\ntags: [mine]\n---\n{MARKER}")
    assert 'probe="me/heads@v1:weather"' in write_card(folder, source="me/heads@v1:weather").read_text()
    probe = read_head(folder)
    save_head(probe, folder)
    assert "## Results" in card_of(folder) and "license: cc0-1.0" in card_of(folder)
    probe.classifier.weight.data += 1
    save_head(probe, folder)
    generated = card_of(folder)
    assert "## Results" not in generated and "Nothing was measured" in generated, "the results were of other weights"
    assert "- mine" in generated and "license: cc0-1.0" in generated and 'probe="weather"' in generated
    for own in (generated.replace(MARKER, "My own words."), "", "---\n- a\n---\n"):
        (folder / "README.md").write_text(own, encoding="utf-8")
        save_head(probe, folder)
        write_card(folder)
        assert card_of(folder) == own
    (folder / "README.md").write_bytes(b"caf\xe9")
    save_head(probe, folder)
    assert (folder / "README.md").read_bytes() == b"caf\xe9"


@pytest.mark.parametrize("case", ["system", "raw", "response", "tool"])
def test_the_usage_block_works_when_pasted(case, tmp_path, backbone_folder, monkeypatch, capsys):
    probe = make_probe(
        prompt_format="raw" if case == "raw" else "chat",
        system_prompt='You\'re "kind".' if case == "system" else None,
        base_model_name_or_path=str(backbone_folder),
        token_scope=case if case in ("response", "tool") else "content",
        turn_markers=PromptFormat(make_tokenizer()).turn_markers,
    )
    monkeypatch.chdir(tmp_path)
    text = create_card(save_head(probe, tmp_path / 'my "good" head')).content
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert ("Halt(" if case == "response" else "LABEL_") in capsys.readouterr().out


@pytest.mark.parametrize("alias", bundled_heads())
def test_bundled_cards_are_what_their_folders_give(alias):
    folder = bundled_heads()[alias]
    assert card_of(folder) == str(create_card(folder))
    results = read_results(folder)
    assert results["card"]["license"] and results["card"]["command"]
    others = results.get("evaluations") or results.get("measured")
    assert len(results["runs"]) >= 3 or others, "three seeds, or intervals on rows of other sources"
    best = max(results["runs"], key=lambda run: run["validation"][results["training"]["metric"]])
    assert best["seed"] == results["chosen_seed"], "chosen by validation"


BOMB = [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(24)]


@pytest.mark.parametrize(
    "metadata",
    [["tags:", *["- tag"] * 200_000], ["a: &a [x, x]", *BOMB], ["tags: [5, {a: b}, [c]]"], ["x" * 5_000_000]],
    ids=["many tags", "aliases that multiply", "tags that are none", "larger than is read"],
)
def test_hostile_metadata_takes_no_time(folder, metadata):
    """A save replaces it, and others refuse it, in a second."""
    (folder / "README.md").write_text("\n".join(["---", *metadata, "---", MARKER]))
    start = time.process_time()
    for work in (write_card, read_card):
        with contextlib.suppress(ProbeError):
            work(folder)
    save_head(read_head(folder), folder)
    assert time.process_time() - start < 5


def test_hostile_texts_begin_nothing_of_their_own(folder):
    """A card is shown as HTML on the Hub, and a head may come from anybody."""
    marks = ("#", "```", "<", "---")
    before = [line for line in create_card(folder).content.splitlines() if line.startswith(marks)]
    names, evil = {0: "a`b<script>", 1: "x ## Title ``` | y"}, "{{ 7 * 7 }}\n```\n# Evil"
    change_config(folder, id2label=names, base_model_name_or_path="lm <b># Evil", system_prompt=evil)
    results = read_results(folder)
    results["card"] |= {"dataset_name": "rain\n\n# Evil: [", "data_note": "# CC0.\n\n<h1>Evil</h1>"}
    results["card"] |= {"limits": ["English\n```"], "command": "train\n```\n# Evil", "language": "en\nevil: true"}
    results["environment"] = {"torch": "2.13.0+cpu", "<b>": "1"}
    results["data"]["train"]["source"] = "50% of <script>"
    for part in (*(run["test"] for run in results["runs"]), results["summary"]["test"]):
        part["a | b\n# Evil <img src=x> [here](x)"] = part["f1"]
        part["slices"] = {"who": {"a|b\nc": part["slices"]["who"]["a"] | part}}
    (folder / "results.json").write_text(json.dumps(results))
    card = create_card(folder)
    text, data = card.content, card.data.to_dict()
    assert "evil" not in data and data["license"] == "cc0-1.0" and "49" not in text.split("## Results")[0]
    for part in (
        r", trained on rain # Evil: \[.", r"\# CC0. &lt;h1>Evil&lt;/h1> Rows: train", "````\ntrain\n```\n# Evil\n````",
        "gives one of ``a`b<script>``, ````x ## Title ``` | y````", "torch 2.13.0+cpu, `<b> 1`", "(`50% of <script>`",
        r"| test, who = a\|b c | 10 |", "- English ```.", r"| a \| b # Evil &lt;img src=x> \[here](x) |",
    ):  # fmt: skip
        assert part in text
    text = text.replace("````\ntrain\n```\n# Evil\n````", "```\n```")
    assert [line for line in text.splitlines() if line.startswith(marks)] == before


@pytest.mark.parametrize("base, shown", [("me/lm", "me/lm"), ("/home/me/lm", None), ("../lm", None), ("lm", None)])
def test_a_folder_is_not_a_base_model_on_the_hub(tmp_path, base, shown):
    card = create_card(save_head(make_probe(base_model_name_or_path=base), tmp_path / "weather"))
    data = card.data.to_dict()
    assert data.get("base_model") == shown and ("base_model_relation" in data) == (shown is not None)
    assert ("](https://huggingface.co/" in card.content) == (shown is not None)


EVALUATION = {
    "source": "sets/b.jsonl", "rows": 1200, "metrics": {"accuracy": 0.9, "auroc": 0.93, "auprc": None},
    "intervals": {"auroc": [0.91, 0.95]}, "flagged": {"share": 0.021, "interval": [0.014, 0.031], "threshold": 0.31},
    "wrappings": {"rows": 40, "kept": {"code fence": 0.975, "tools": 0.95}},  # as written by earlier code
    "attacks": {
        "rows": 30, "kept": {"base64": 0.25}, "harmless": 8, "alarms": {"base64": 0.125},
        "tfidf": {"kept": {"base64": 0.0}, "alarms": {"base64": 0.0}},
    },
    "long": {"rows": 4, "kept": {"in 7,500 tokens": None}, "harmless": 0, "alarms": {"in 7,500 tokens": None}},
}  # fmt: skip


@pytest.mark.parametrize("trained", [True, False])
def test_what_was_measured_and_fitted_after_training(folder, trained):
    before = create_card(folder).content
    change_config(folder, threshold=0.31, thresholds={"fpr-2%": 0.31, "fpr-0.5%": 0.64})
    bare = {"source": "a", "rows": 3, "metrics": {}, "intervals": {}}
    rates = {"sources": ["sets/a.jsonl"], "rows": 2000, "rates": {"fpr-2%": 0.02, "fpr-0.5%": 0.005}}
    rates["groups"] = {"short": {"rows": 1500, "flagged": {}}, "long": {"rows": 500, "flagged": {}}}
    later = {"evaluations": {"look|alikes": EVALUATION, "values": bare}, "thresholds_from": rates}
    (folder / "results.json").write_text(json.dumps(later | (read_results(folder) if trained else {})))
    text = create_card(folder).content
    for line in (
        "| fpr-0.5% | 0.640 | 0.5% |", "2,000 rows", "sets/a.jsonl", "groups: short (1,500 rows), long (500 rows).", "| values (a) | 3 | - | - | - | - |",
        r"| look\|alikes (sets/b.jsonl) | 1,200 | 0.310 | 2.1% (1.4% to 3.1%) | 0.930 (0.910 to 0.950) | - |",
        "| tools | 40 | 0.95 | - | - |\n| base64 | 30 | 0.25 (0.12) | 0.00 (0.00) | - |",
        "| in 7,500 tokens | 4 | too long | - | - |\n\nIn brackets",
    ):  # fmt: skip
        assert line in text
    assert ("## Results" in text) == trained and "## Thresholds" not in before and "\n\n\n" not in text


def test_measures_of_before_a_calibration_are_said_to_be(folder):
    flagged = {"label": "yes", "share": 0.5, "interval": [0.4, 0.6], "threshold": 0.4}
    harmful = {"rows": 9, "threshold": {"share": 0.5, "interval": [0.4, 0.6]}}
    measured = {
        "before_calibration": {"flagged": "yes", "thresholds": {"threshold": 0.4}}, "rates": ["threshold"], "bytes": 1,
        "parts": [{"name": "own", "ablation": None, "rows": 9, "labels": {"yes": harmful}}],
    }  # fmt: skip
    evaluation = {"source": "a", "rows": 3, "metrics": {}, "intervals": {}, "flagged": flagged}
    results = {"evaluations": {"more": evaluation}, "measured": measured}
    (folder / "results.json").write_text(json.dumps(results))
    assert "| more (a) | 3 | 0.400 |" in create_card(folder).content
    change_config(folder, flagged=["no"], threshold=0.9, thresholds={"fpr-2%": 0.9})
    text = create_card(folder).content
    assert "| more (a; for `yes`) | 3 | 0.400 |" in text and "calibration (`yes` from 0.400 on), beside" in text
    assert "(in brackets).\n\n|" in text
    measured["parts"][0]["ablation"] = "a"
    (folder / "results.json").write_text(json.dumps(results))
    assert "(in brackets). An ablation was trained" in create_card(folder).content


def test_results_of_earlier_code_make_the_same_card(folder):
    """They have the keys `twin`, `recipe` and `label_smoothing`."""
    results = read_results(folder)
    harmful = {"rows": 9, "threshold": {"share": 0.5, "interval": [0.4, 0.6]}}
    parts = [
        {"name": name, "ablation": without, "rows": 9, "labels": {"yes": harmful}}
        for name, without in (("a", None), ("b", "c"))
    ]
    results["measured"] = {"rates": ["threshold"], "bytes": 1, "parts": parts}
    text = json.dumps(results)
    old = (
        text.replace('"ablation"', '"twin"')
        .replace('"training": {', '"recipe": {')
        .replace('"label_smoothing_factor"', '"label_smoothing"')
    )
    cards = []
    for written in (text, old):
        (folder / "results.json").write_text(written)
        assert read_results(folder) == json.loads(text)
        cards.append(create_card(folder).content)
    assert cards[0] == cards[1] and "| b (ablation trained without c) |" in cards[0] and text != old


def test_values_are_measured_by_the_variance_they_explain(tmp_path):
    head = make_probe(problem_type="regression", id2label={0: "size"})
    part = {"name": "b", "ablation": None, "rows": 3, "r2": 0.5, "mae": 1, "mse": 2, "intervals": {"r2": [0.4, 0.6]}}
    metrics = {"source": "a", "rows": 30, "metrics": {"mse": 4.0, "mae": 1.5, "r2": None}, "intervals": {}}
    head.results = {"evaluations": {"more": metrics}, "measured": {"rates": [], "bytes": 1, "parts": [part]}}
    text = card_of(save_head(head, tmp_path / "size"))
    assert "| R² | MAE | MSE |\n|---|---:|---:|---:|---:|\n| more (a) | 30 | - | 1.500 | 4.000 |\n\n" in text
    assert "| b | all | 3 | 0.500 (0.400 to 0.600) | 1.000 | 2.000 |" in text and "flagged" not in text
