"""The recipes of the package, on stand-ins for their rows: files with the columns and label values of the Hub, or of local copies."""

import json
import re
from collections import defaultdict
from dataclasses import replace

import datasets
import pytest
import torch
import yaml
from conftest import read_head

from llama_probe import ProbeTrainer
from llama_probe.data.known import find_benchmark
from llama_probe.data.tables import TablePlace
from llama_probe.training.recipe import Recipe, recipe_names
from llama_probe.training.recipe_rows import read_rows


ROWS = 12  # of each source
CATEGORIES = ("violence", "hate", "sexual", "self-harm", "crime", "privacy")
# Columns of data sets on the Hub, by id, as cards and public code show them; a list has the values of a label column.
HUB = {
    "nvidia/Aegis-AI-Content-Safety-Dataset-2.0": {
        "id": "id", "reconstruction_id_if_redacted": [None, 7.0], "prompt": "text", "prompt_label": ["safe", "unsafe"],
        "response": None, "response_label": None, "violated_categories": "", "prompt_label_source": "human",
    },
    "nvidia/Nemotron-Safety-Guard-Dataset-v3": {
        "id": "id", "reconstruction_id_if_redacted": [None, 7.0], "prompt": "text", "prompt_label": ["safe", "unsafe"],
        "response": None, "response_label": None, "violated_categories": "", "tag": "generic",
        "language": ["en", "ar", "de", "es", "fr", "hi", "ja", "th", "zh"],
    },
    "TrustAIRLab/in-the-wild-jailbreak-prompts": {
        "platform": "reddit", "source": "r/x", "prompt": "text", "jailbreak": [True, False], "created_at": None,
        "date": "2023-05-07", "community_id": None, "community_name": None,
    },
    "bench-llm/or-bench": {"prompt": "text", "category": ["violence", "harmful", "illegal", "unethical", "hate"]},
    "allenai/coconot": {
        "id": "id", "category": ["Requests with safety concerns"], "prompt": "text", "response": "",
        "subcategory": ["dangerous or sensitive topics", "triggers for offensive language", "privacy violations"],
    },
    "OpenAssistant/oasst1": {
        "message_id": "id", "parent_id": [None, "m"], "text": "text", "role": ["prompter", "assistant"],
        "lang": ["en", "es", "ru", "zh", "de", "fr", "th", "ja"],
    },
    "databricks/databricks-dolly-15k": {"instruction": "text", "context": "", "response": "", "category": ["closed_qa"]},
    "fka/awesome-chatgpt-prompts": {"act": "a", "prompt": "text"},
    "walledai/TDC23-RedTeaming": {"prompt": "text"},
    "LibrAI/do-not-answer": {
        "id": 1, "risk_area": "a", "types_of_harm": ["Assisting illegal activities", "Toxic language (hate speech)"],
        "specific_harms": "b", "question": "text",
    },
}  # fmt: skip
# The same of data sets known by name.
KNOWN = {
    "toxicchat": {"conv_id": "id", "user_input": "text", "human_annotation": [True, False], "toxicity": [0, 1], "jailbreaking": 0},
    "wildguardmix": {"prompt": "text", "prompt_harm_label": ["harmful", "unharmful"], "adversarial": False},
    "imdb": {"text": "text", "label": [0, 1]},
    "sst2": {"sentence": "text", "label": [0, 1]},
    "emotion": {"text": "text", "label": [0, 1, 2, 3, 4, 5]},
    "xstest": {"id": 1, "prompt": "text", "label": ["safe", "unsafe"], "type": "a"},
    "openai_moderation": {"prompt": "text", "S": [0, 1], "H": 0},
    "aegis": {"text": "text", "text_type": "user_message", "labels_0": ["Safe", "Violence"], "labels_1": ["Safe", "Violence"]},
    "advbench": {"prompt": "text", "target": "Sure"},
    "beavertails": {"prompt": "asked", "response": "text", "is_safe": [True, False], "category": {"privacy_violation": False}},
}  # fmt: skip
# The same of local copies, by folder; one that is not here has `text` and `label`, and the label values of KNOWN.
LOCAL = {
    "safety_prompts": {"id": "id", "text": "text", "label": [0, 1], "source": ["other"], "category": [None], "licence": "MIT"},
    "benign_prompts": {"id": "id", "text": "text", "label": 0, "source": "alpaca", "category": None, "licence": ["MIT", "CC BY-NC 4.0"]},
    "system_prompts": {"id": "id", "text": "text", "source": "a", "licence": ["MIT", "CC0"]},
    "toxicchat": {"id": "id", "text": "text", "label": [0, 1], "human_annotation": [True, False], "jailbreaking": 0},
    "xstest": {"id": "id", "text": "text", "label": [0, 1], "type": "a"},
    "emotion": {"id": "id", "text": "text", "label": [0, 1, 2, 3, 4, 5]},
    "replies": {"id": "id", "text": "text", "prompt": "asked", "response": "text", "label": [0, 1], "source": ["other"], "licence": "MIT"},
    "injections": {"id": "id", "text": "text", "messages": "text", "label": [0, 1], "kind": "indirect", "source": ["other"], "licence": "MIT"},
    "hallucination": {"id": "id", "text": "text", "reference": "text", "label": [0, 1], "source": ["other"], "licence": "MIT"},
    "beavertails": {"prompt": "asked", "response": "text", "text": "text", "label": [0, 1], "categories": [[]]},
    "openai_moderation": {"id": "id", "text": "text", "label": [0, 1], "categories": [None]},
}  # fmt: skip
PLAIN = {"id": "id", "text": "text", "label": [0, 1]}


def sources_of(recipe):
    """Return all sources of a recipe."""
    held = [recipe.validation, recipe.test, recipe.calibration, recipe.measure]
    prompts = recipe.copies.system_prompts
    return [*recipe.train, *(source for part in held for source in part.sources), *([prompts] if prompts else [])]


def cell(wanted):
    """Return the value of a cell that `where` names by its text."""
    text = str(wanted)
    return json.loads(text.replace("'", '"')) if text[:1] in "[{" else wanted


def stand_ins(columns, source):
    """Return rows with these columns: most as `where` wants them, and one as it does not."""
    assert source.text_column in columns or find_benchmark(source.rows), f"{source.name}: {source.text_column}"
    where = source.where or {}
    assert set(where) <= set(columns), source.name
    for name, values in where.items():  # a value that the data set does not have would find no row
        listed = [value for value in columns[name] if value is not None] if isinstance(columns[name], list) else []
        if listed and isinstance(listed[0], (str, bool)) and listed != ["other"]:
            unknown = set(map(str, values)) - set(map(str, columns[name]))
            # The values of a known data set are those of the Hub and those of local copies.
            assert not unknown or (find_benchmark(source.rows) and len(unknown) < len(values)), (
                f"{source.name}: {unknown}"
            )
    count = 5 * ROWS if source.part else ROWS
    for row in range(count + bool(where)):
        values = {
            name: value[row % len(value)] if isinstance(value, list) else value for name, value in columns.items()
        }
        mark = f"{source.name} {source.rows} {row}"
        texts = {name: f"{value} {mark}" for name, value in values.items() if value in ("text", "asked")}
        values |= texts | {name: cell(wanted[row % len(wanted)]) for name, wanted in where.items()}
        if row == count:
            values |= dict.fromkeys(where, "no such value")
        yield values


def write_rows(recipe, folder, as_hub):
    """Write stand-ins for all rows of a recipe, with the columns of the Hub or those of local copies."""
    files = defaultdict(list)
    for source in sources_of(recipe):
        if known := find_benchmark(source.rows):
            name, splits = known[0].name, [known[1]] if known[1] else ["train", "validation", "test"]
            columns = KNOWN[name] if as_hub else LOCAL.get(name, PLAIN)
        else:
            place = TablePlace.parse(source.rows if source.local is None else source.local.get("rows", source.rows))
            name, splits = place.id.split("/")[-1], [place.split]
            columns = LOCAL[name] if name in LOCAL else HUB[TablePlace.parse(source.rows).id]
            if source.local is not None and not as_hub:
                source = replace(source, **source.local, local=None)
        for split in splits:
            files[name, split] += stand_ins(columns, source)
    for (name, split), rows in files.items():
        path = folder / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_hub_rows(recipe):
    """Return a recipe whose sources have files of their own, with the columns of the Hub."""
    values = Recipe.load(recipe).values
    for source in [*values["train"], *values.get("measure", {}).get("sources", [])]:
        if isinstance(source, dict) and "local" in source:
            source["local"] = {"rows": f"{source['name']}::{TablePlace.parse(source['rows']).split}"}
    return Recipe.load(values)


@pytest.mark.parametrize("name", recipe_names())
class TestPackagedRecipe:
    def test_is_complete(self, name):
        recipe = Recipe.load(name)
        assert recipe.name == name and recipe.about.endswith(".") and recipe.labels.names and recipe.card.limits
        if len(recipe.labels.names) == 2:
            assert recipe.labels.flagged and set(recipe.labels.flagged) < set(recipe.labels.names)
        names = {source.name for source in recipe.train}
        assert all(set(held) < names for held in recipe.hold_out.values()), "a twin has other sources"
        for source in sources_of(recipe):
            assert source.licence or source.licence_column, source.name
            revision = TablePlace.parse(source.rows).revision
            assert revision is None or re.fullmatch("[0-9a-f]{40}", revision), source.name
        assert Recipe.load(yaml.safe_load(recipe.write())) == recipe

    @pytest.mark.parametrize("as_hub", [True, False], ids=["hub", "local"])
    def test_reads_its_rows(self, name, as_hub, tmp_path):
        recipe = as_hub_rows(name) if as_hub else Recipe.load(name)
        write_rows(recipe, tmp_path, as_hub)
        rows = read_rows(recipe, tmp_path)
        parts = [rows.train, *(part for part in (rows.validation, rows.test) if part is not None)]
        read = {name for part in parts for names in part.columns["source"] for name in names.split("+")}
        assert read == {source.name for part in (recipe.train, recipe.test.sources) for source in part} | (
            {source.name for source in recipe.validation.sources} or read
        )
        labels = rows.train.labels
        assert rows.train.label_names == recipe.labels.names
        assert len(set(labels.nonzero()[1] if labels.ndim == 2 else labels)) == len(recipe.labels.names)
        assert rows.train.flagged == recipe.labels.flagged
        assert set(rows.measured) == {source.name for source in recipe.measure.sources} and all(rows.measured.values())
        assert set(rows.held_rows) == set(recipe.hold_out)
        if recipe.calibration.sources:
            assert len(rows.calibration)
            assert not set(map(str, rows.calibration.texts)) & set(map(str, rows.train.texts)), (
                "part divides the texts"
            )
        for twin, places in rows.held_out.items():
            left = {
                name
                for row, names in enumerate(rows.train.columns["source"])
                if row not in set(places)
                for name in names.split("+")
            }
            assert not left & set(recipe.hold_out[twin])


def test_all_rows_of_the_guard_may_be_used_commercially(tmp_path):
    write_rows(as_hub_rows("guard"), tmp_path, as_hub=True)
    rows = read_rows(Recipe.load(as_hub_rows("guard"), ["licence=commercial"]), tmp_path)
    assert "not_commercial" not in rows.described["train"]


def test_safety_leaves_out_the_rows_that_may_not_be_used_commercially(tmp_path):
    recipe = Recipe.load("safety", ["licence=commercial"])
    write_rows(recipe, tmp_path, as_hub=False)
    left_out = read_rows(recipe, tmp_path).described["train"]["not_commercial"]
    assert {"toxicchat", "stl_malicious", "do_not_answer", "benign_prompts", "reviews"} <= set(left_out)
    assert left_out["toxicchat"] == ROWS and left_out["benign_prompts"] < 5 * ROWS
    assert not {"advbench", "xstest", "atlas", "orbench", "tdc2023", "coconot_contrast"} & set(left_out)


@pytest.mark.slow
def test_a_recipe_makes_the_same_head_from_the_hub_and_from_local_copies(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    names = Recipe.load("emotion").labels.names
    files = {"README.md": "---\nconfigs:\n- config_name: split\n  data_files:\n"}
    for number, split in enumerate(("train", "validation", "test")):
        rows = [{"text": f"I feel {names[row % 6]}, {number} {row}", "label": row % 6} for row in range(60)]
        files[f"{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
        files["README.md"] += f"  - {{split: {split}, path: {split}.jsonl}}\n"
        copy = tmp_path / "copies" / "emotion" / f"{split}.jsonl"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(files[f"{split}.jsonl"])
    files["README.md"] += "---\n"
    hub.plant("datasets/dair-ai/emotion", {name: text.encode() for name, text in files.items()})
    heads = {}
    for place, data_dir in {"hub": None, "copies": tmp_path / "copies"}.items():
        settings = ["seeds=1", "head.layers=[0.5, 1.0]", "training.num_train_epochs=6"]
        trainer = ProbeTrainer.from_recipe(
            "emotion", backbone="demo", output_dir=tmp_path / place, data_dir=data_dir, settings=settings
        )
        trainer.train()
        trainer.save_model()
        heads[place] = read_head(tmp_path / place)
    hub_head, copied = (head.state_dict() for head in heads.values())
    assert all(torch.equal(hub_head[name], copied[name]) for name in copied)
    own, other = (head.results for head in heads.values())
    assert own["runs"] == other["runs"] and own["runs"][0]["test"]["accuracy"] > 0.6, "words name the label"
    assert Recipe.load(tmp_path / "hub").values == Recipe.load(tmp_path / "copies").values
