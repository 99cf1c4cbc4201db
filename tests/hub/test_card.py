"""Cards: written from a folder's config and results alone, and equal to what lies in hub_cards."""

import json

import pytest
from conftest import make_probe
from repository import ROOT

from llama_probe import ProbeError
from llama_probe.evaluation.metrics import summarize
from llama_probe.files import read_config, read_head, save_head
from llama_probe.hub.card import (
    create_card,
    has_own_words,
    results_table,
    save_with_card,
    write_card,
    written_with,
)
from llama_probe.hub.resolve import bundled_heads


@pytest.fixture
def folder(tmp_path):
    """A head folder with the results of two seeds."""
    folder = save_head(
        make_probe(id2label={0: "no", 1: "yes"}, threshold=0.4, base_model_name_or_path="me/lm"), tmp_path / "weather"
    )
    scores = {"rows": 10, "accuracy": 0.8, "f1": 0.5, "precision": 0.6, "recall": 0.4, "auprc": 0.7, "auroc": 0.9}
    runs = [
        {"seed": seed, "validation": dict(scores), "test": {**scores, "f1": 0.5 + seed / 10, "slices": {"who": {"a": {**scores, "auprc": None}}}}}
        for seed in (0, 1)
    ]  # fmt: skip
    results = {
        "num_parameters": 1234,
        "data": {"train": {"source": "a/b.csv", "rows": 90}, "test": {"source": "c.csv", "rows": 10}},
        "recipe": {
            "learning_rate": 0.01, "weight_decay": 0.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
            "num_train_epochs": 3, "label_smoothing": 0.0, "metric": "auprc",
        },
        "runs": runs,
        "chosen_seed": 1,
        "summary": {name: summarize([run[name] for run in runs]) for name in ("validation", "test")},
        "card": {"license": "cc0-1.0", "dataset": "me/weather", "limits": ["hail"], "command": "llama-probe train"},
        "environment": {"python": "3.11"},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_chosen_seed_and_the_spread(folder):
    text = write_card(folder).read_text()
    assert "0.600 (0.550 ± 0.071)" in text and "seed 1, the best of 2 by auprc" in text
    assert "test, who = a" in text and "| - |" in text
    assert "batch 16" in text and "- hail." in text and "me/weather" in text
    data = create_card(folder).data
    assert data.license == "cc0-1.0" and data.base_model_relation == "adapter"
    assert {result.metric_type: result.metric_value for result in data.eval_results}["f1"] == 0.6


def test_a_head_without_results_says_so(tmp_path):
    folder = save_head(make_probe(prompt_format="raw"), tmp_path / "fresh")
    card = create_card(folder, source="me/fresh", license="mit", tags=["mine"])
    assert "Nothing was measured of this head." in card.content and 'probe="me/fresh"' in card.content
    assert card.data.license == "mit" and "mine" in card.data.tags and not card.data.eval_results
    with pytest.raises(ProbeError, match=r"no results.json"):
        results_table([folder])


def test_a_head_is_saved_with_its_card_unless_somebody_wrote_another(folder, tmp_path):
    probe = read_head(folder)
    saved = save_with_card(probe, tmp_path / "again")
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert card == str(create_card(saved)) and "## Results" in card
    save_with_card(make_probe(id2label={0: "dry", 1: "wet"}), saved)
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "`dry`" in card and "## Results" not in card, "generated, and so written anew"
    (saved / "README.md").write_text(card + "My own words.\n")
    save_with_card(probe, saved)
    assert (saved / "README.md").read_text(encoding="utf-8") == card + "My own words.\n"
    (tmp_path / "README.md").write_text("# A project\n")
    save_with_card(probe, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# A project\n"
    probe.results = {"of": "another version"}
    assert not (save_with_card(probe, tmp_path / "new") / "README.md").exists()


def test_a_card_that_was_written_for_another_place_is_still_a_generated_one(folder):
    """As of a head that was pushed, with a licence and tags, and pulled."""
    given = {"source": "me/heads@v1:weather", "license": "mit", "tags": ["mine"]}
    write_card(folder, **given)
    assert written_with(folder) == given and not has_own_words(folder)
    assert written_with(write_card(folder).parent) == {"source": "weather", "license": None, "tags": []}
    write_card(folder, **given)
    probe = read_head(folder)
    probe.classifier.weight.data += 1
    save_with_card(probe, folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "0.600" not in card and "Nothing was measured" in card, "the results were those of other weights"
    assert "license: mit" in card and "- mine" in card and 'probe="weather"' in card
    for own in (card.replace("mine", "mine: yours: ["), card + "\n", "\ufeff" + card, "", "---\n- a\n---\n"):
        (folder / "README.md").write_text(own, encoding="utf-8")
        assert has_own_words(folder) and written_with(folder) is None
    (folder / "README.md").write_bytes(b"caf\xe9")
    assert has_own_words(folder)


def test_thresholds_plots_and_backbone(folder):
    results = json.loads((folder / "results.json").read_text())
    row = {"threshold": 0.4, "precision": None, "recall": 0.0, "flagged": 0.25, "saved": True}
    results["inspection"] = {
        "split": "test",
        "thresholds": {"yes": [{**row, "threshold": 0.1, "precision": 0.5, "saved": False}, row]},
        "calibration": {"error": 0.0123, "error_uncalibrated": 0.4},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "calibration.png").write_bytes(b"")
    text = create_card(folder).content
    assert "| 0.100 | 0.500 | 0.000 | 25.0% |" in text and "| **0.400** | - | 0.000 | 25.0% |" in text
    assert "error on the test rows: 0.012 (0.400 without" in text
    assert "](calibration.png)" in text and "layer_weights.png" not in text
    config = read_config(folder).replace(
        base_model_class="LlamaForCausalLM", base_model_dtype="bfloat16", fingerprint=[1.0]
    )
    (folder / "probe_config.json").write_text(config.to_json_string())
    text = create_card(folder).content
    assert "class: LlamaForCausalLM" in text and "weights at training: bfloat16" in text and "fingerprint" in text


@pytest.mark.parametrize("kind", ["chat", "system", "raw", "response"])
def test_the_usage_block_works_when_pasted(kind, tmp_path, backbone_folder, monkeypatch, capsys):
    system = 'You\'re "kind".' if kind == "system" else None
    probe = make_probe(
        prompt_format="raw" if kind == "raw" else "chat",
        system_prompt=system,
        base_model_name_or_path=str(backbone_folder),
        token_scope="response" if kind == "response" else "content",
    )
    folder = save_head(probe, tmp_path / "weather")
    block = create_card(folder).content.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert ("Halt(" if kind == "response" else "LABEL_") in capsys.readouterr().out


@pytest.mark.parametrize("alias", bundled_heads())
def test_bundled_cards_are_what_their_folders_give(alias):
    folder = bundled_heads()[alias]
    assert (folder / "README.md").read_text(encoding="utf-8") == str(create_card(folder))
    results = json.loads((folder / "results.json").read_text())
    assert len(results["runs"]) >= 3 and results["card"]["license"] and results["card"]["command"]
    best = max(results["runs"], key=lambda run: run["validation"][results["recipe"]["metric"]])
    assert best["seed"] == results["chosen_seed"], "chosen by validation"


def test_the_readme_shows_the_bundled_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.split("<!-- results -->\n")[1].split("\n<!-- /results -->")[0] == results_table(
        bundled_heads().values()
    )


def test_values_that_would_break_a_table(folder):
    results = json.loads((folder / "results.json").read_text())
    for part in (*(run["test"] for run in results["runs"]), results["summary"]["test"]):
        part["slices"] = {"who": {"a|b\nc": part["slices"]["who"]["a"]}}
    (folder / "results.json").write_text(json.dumps(results))
    (line,) = [line for line in create_card(folder).content.splitlines() if "who =" in line]
    assert line.startswith(r"| test, who = a\|b c | 10 |")
    config = read_config(folder).replace(id2label={0: "n|o", 1: "yes"})
    (folder / "probe_config.json").write_text(config.to_json_string())
    assert r"| n\|o, yes |" in results_table([folder])


def test_names_that_would_begin_something_of_their_own_in_a_card(folder):
    """A card is shown as HTML on the Hub, and a head may come from anybody."""
    plain = create_card(folder).content
    config = read_config(folder).replace(
        id2label={0: "a`b<script>", 1: "x ## Title ```"},
        base_model_name_or_path="lm <b># Evil",
        base_model_class="<i>",
    )
    (folder / "probe_config.json").write_text(config.to_json_string())
    results = json.loads((folder / "results.json").read_text())
    results["card"] |= {
        "dataset_name": "rain\n\n# Evil",
        "data_note": "CC0.\n\n<h1>Evil</h1>",
        "limits": ["English\n```"],
        "command": "train\n```\n# Evil",
    }
    results["environment"] = {"torch": "2.13.0+cpu", "<b>": "1"}
    results["data"]["train"]["source"] = "50% of <script>"
    (folder / "results.json").write_text(json.dumps(results))
    text = create_card(folder).content
    assert ", trained on rain # Evil." in text and "CC0. <h1>Evil</h1> Rows: train" in text
    assert "````\ntrain\n```\n# Evil\n````" in text and "- English ```." in text
    assert "torch 2.13.0+cpu, `<b> 1`" in text and "(`50% of <script>`" in text
    text = text.replace("````\ntrain\n```\n# Evil\n````", "```\n```")
    assert "gives one of ``a`b<script>``, ```` x ## Title ``` ````" in text
    assert text.count("`lm <b># Evil`") == 3 and "class: `<i>`;" in text
    marks = ("#", "```", "<")
    assert [line for line in text.splitlines() if line.startswith(marks)] == [
        line for line in plain.splitlines() if line.startswith(marks)
    ]


@pytest.mark.parametrize(
    "base_model, shown", [("me/lm", "me/lm"), ("/home/me/lm", None), ("./me/lm", None), ("../lm", None), ("lm", None)]
)
def test_a_folder_is_no_base_model_that_the_hub_knows(tmp_path, base_model, shown):
    folder = save_head(make_probe(base_model_name_or_path=base_model), tmp_path / "weather")
    data = create_card(folder).data.to_dict()
    assert data.get("base_model") == shown and ("base_model_relation" in data) == (shown is not None)
    assert ("](https://huggingface.co/" in create_card(folder).content) == (shown is not None)


def test_the_usage_block_of_a_folder_with_an_odd_name(tmp_path):
    folder = save_head(make_probe(), tmp_path / 'my "good" head')
    block = create_card(folder).content.split("```python\n")[1].split("```")[0]
    compile(block, "card", "exec")
    assert r'probe="my \"good\" head")' in block and 'out.probe_labels["my-good-head"]' in block
