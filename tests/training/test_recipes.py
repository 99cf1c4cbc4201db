"""The recipes of the package, on stand-ins for their rows: files with the columns and label values of the Hub, or of local copies."""

import json
import re
import shlex
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml
from training_runs import write

from llama_probe.data.known import find_benchmark
from llama_probe.data.tables import TablePlace
from llama_probe.hub.resolve import bundled_heads
from llama_probe.training.recipe import Recipe, recipe_names
from llama_probe.training.recipe_rows import read_rows


ROWS = 12  # of each source
SAFE, LABELS, LICENCES = ["safe", "unsafe"], [0, 1], ["MIT", "CC BY-NC 4.0"]
# The columns that recipes read of data sets on the Hub, by id, as cards and public code show them. A list has the values
# of a label column, or of one that rows are chosen by.
HUB = {
    "nvidia/Aegis-AI-Content-Safety-Dataset-2.0": {
        "prompt": "text", "prompt_label": SAFE, "reconstruction_id_if_redacted": [None, 7.0],
    },
    "nvidia/Nemotron-Safety-Guard-Dataset-v3": {
        "prompt": "text", "prompt_label": SAFE, "reconstruction_id_if_redacted": [None, 7.0],
        "language": ["en", "ar", "de", "es", "fr", "hi", "ja", "th", "zh"],
    },
    "TrustAIRLab/in-the-wild-jailbreak-prompts": {"prompt": "text"},
    "bench-llm/or-bench": {"prompt": "text", "category": ["violence", "harmful", "illegal", "unethical", "hate"]},
    "allenai/coconot": {
        "prompt": "text", "category": ["Requests with safety concerns"],
        "subcategory": ["dangerous or sensitive topics", "triggers for offensive language", "privacy violations"],
    },
    "OpenAssistant/oasst1": {
        "text": "text", "parent_id": [None, "m"], "role": ["prompter", "assistant"],
        "lang": ["en", "es", "ru", "zh", "de", "fr", "th", "ja"],
    },
    "databricks/databricks-dolly-15k": {"instruction": "text"},
    "fka/awesome-chatgpt-prompts": {"prompt": "text"},
    "walledai/TDC23-RedTeaming": {"prompt": "text"},
    "LibrAI/do-not-answer": {"question": "text", "types_of_harm": ["Assisting illegal activities", "Toxic language"]},
}  # fmt: skip
# The same of data sets known by name.
KNOWN = {
    "toxicchat": {"user_input": "text", "human_annotation": [True, False], "toxicity": LABELS},
    "wildguardmix": {"prompt": "text", "prompt_harm_label": ["harmful", "unharmful"]},
    "imdb": {"text": "text", "label": LABELS},
    "sst2": {"sentence": "text", "label": LABELS},
    "emotion": {"text": "text", "label": [0, 1, 2, 3, 4, 5]},
    "xstest": {"prompt": "text", "label": SAFE},
    "openai_moderation": {"prompt": "text", "S": LABELS},
    "aegis": {"text": "text", "text_type": "user_message", "labels_0": ["Safe", "Violence"]},
    "advbench": {"prompt": "text"},
    "beavertails": {"prompt": "asked", "response": "text", "is_safe": [True, False]},
}
# The same of local copies, by folder; one that is not here has `text` and `label`, and the label values of KNOWN.
PLAIN = {"text": "text", "label": LABELS}
LOCAL = {
    "safety_prompts": {**PLAIN, "source": ["other"], "category": [None], "licence": "MIT"},
    "benign_prompts": {**PLAIN, "label": 0, "licence": LICENCES},
    "system_prompts": {"text": "text", "licence": LICENCES},
    "toxicchat": {**PLAIN, "human_annotation": [True, False]},
    "emotion": KNOWN["emotion"],
    "replies": {"prompt": "asked", "response": "text", "label": LABELS, "source": ["other"], "licence": "MIT"},
    "injections": {**PLAIN, "messages": "text", "kind": "indirect", "source": ["other"], "licence": "MIT"},
    "multilingual": {**PLAIN, "source": ["other"], "language": ["ar", "zh"], "licence": LICENCES},
    "hallucination": {"reference": "text", "source": ["other"]},
    "beavertails": {**PLAIN, "prompt": "asked", "response": "text", "categories": [[]]},
    "openai_moderation": {**PLAIN, "categories": [None]},
}


def sources_of(recipe):
    """Return all sources of a recipe."""
    held = [recipe.validation, recipe.test, recipe.calibration, recipe.measure]
    prompts = recipe.augmentations.system_prompts
    drawn = [*recipe.augmentations.documents, *([prompts] if prompts else [])]
    return [*recipe.train, *(source for part in held for source in part.sources), *drawn]


def stand_ins(columns, source):
    """Return rows with these columns: most as `where` and `label_map` want them, and one as they do not."""
    is_known, where = find_benchmark(source.rows), dict(source.where or {})
    if "*" in (source.label_map or {}):
        where[source.label_column] = [value for value in source.label_map if value != "*"]
    assert source.text_column in columns or is_known, f"{source.name}: {source.text_column}"
    assert set(where) <= set(columns), source.name
    for name, wanted in where.items():  # a value that the data set does not have would find no row
        values = columns[name] if isinstance(columns[name], list) else []
        is_whole = any(isinstance(value, (str, bool)) for value in values) and values != ["other"]
        unknown = set(map(str, wanted)) - set(map(str, values)) if is_whole else ()
        # The values of a known data set are those of the Hub and those of local copies.
        assert not unknown or (is_known and len(unknown) < len(wanted)), f"{source.name}: {unknown}"
    count = max(5 * ROWS if source.part else ROWS, *map(len, where.values()), 0)
    for row in range(count + bool(where)):
        picked = {
            name: value[row % len(value)] if isinstance(value, list) else value for name, value in columns.items()
        }
        for name, wanted in where.items():
            value = wanted[row % len(wanted)] if row < count else "no such value"
            is_json = str(value)[:1] in ("[", "{")  # the text of a list or a dict
            picked[name] = json.loads(value.replace("'", '"')) if is_json else value
        for name, value in picked.items():
            if value in ("text", "asked"):
                picked[name] = f"{value} {source.name} {source.rows} {row}"
        yield picked


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
        write(folder / name / f"{split}.jsonl", rows)


def as_hub_rows(recipe):
    """Return a recipe whose sources have files of their own, with the columns of the Hub."""
    values = Recipe.load(recipe).values
    for source in [*values["train"], *values.get("measure", {}).get("sources", [])]:
        if isinstance(source, dict) and "local" in source:
            source["local"] = {"rows": f"{source['name']}::{TablePlace.parse(source['rows']).split}"}
    return Recipe.load(values)


def names_in(columns):
    """Return the sources that some rows have words of."""
    return {name for names in columns for name in names.split("+")}


@pytest.mark.parametrize("name", recipe_names())
class TestPackagedRecipe:
    def test_is_complete(self, name):
        recipe = Recipe.load(name)
        assert recipe.name == name and recipe.about.endswith(".") and recipe.labels.names and recipe.card.limits
        if len(recipe.labels.names) == 2:
            assert recipe.labels.flagged and set(recipe.labels.flagged) < set(recipe.labels.names)
        names = {source.name for source in recipe.train}
        assert all(set(held) < names for held in recipe.hold_out.values()), "an ablation has other sources"
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
        read = names_in(names for part in parts for names in part.columns["source"])
        assert read == {source.name for source in [*recipe.train, *recipe.validation.sources, *recipe.test.sources]}
        labels = rows.train.labels
        assert rows.train.label_names == recipe.labels.names and rows.train.flagged == recipe.labels.flagged
        assert len(set(labels.nonzero()[1] if labels.ndim == 2 else labels)) == len(recipe.labels.names)
        assert set(rows.measured) == {source.name for source in recipe.measure.sources} and all(rows.measured.values())
        assert set(rows.ablations) == set(recipe.hold_out)
        if recipe.calibration.sources:
            learned = set(map(str, rows.train.texts))
            assert len(rows.calibration) and not learned & set(map(str, rows.calibration.texts)), "part divides them"
        for name, ablation in rows.ablations.items():
            held, sources = set(ablation.left_out), rows.train.columns["source"]
            left = names_in(names for row, names in enumerate(sources) if row not in held)
            assert not left & set(recipe.hold_out[name])


def test_all_rows_of_the_guard_may_be_used_commercially(tmp_path):
    write_rows(recipe := as_hub_rows("guard"), tmp_path, as_hub=True)
    rows = read_rows(Recipe.load(recipe, ["licence=commercial"]), tmp_path)
    assert "not_commercial" not in rows.described["train"]


@pytest.mark.parametrize("head", [pytest.param(path, id=name) for name, path in bundled_heads().items()])
def test_a_bundled_head_is_of_the_recipe_that_its_card_names(head, monkeypatch):
    monkeypatch.chdir(head)  # one names the `recipe.yaml` of its folder
    command = shlex.split(json.loads((head / "results.json").read_text())["card"]["command"])
    assert command[:2] == ["llama-probe", "train"]
    settings = [setting for option, setting in pairwise(command) if option == "--set"]
    named, kept = Recipe.load(command[2], settings), Recipe.load(head)
    if "quote" in kept.values.get("augmentations", {}).get("names", ()):  # made before augmentations got other names
        assert named.values.pop("augmentations")["share"] == kept.values.pop("augmentations")["share"]
    assert named.write() == kept.write()
