"""Recipes: what a file may say, and defaults for what it leaves open."""

import os
import runpy
from pathlib import Path

import pytest
import yaml
from repository import ROOT
from training_runs import write
from transformers import HfArgumentParser

from llama_probe import ProbeConfig, ProbeError, ProbeTrainingArguments
from llama_probe.data.labelled_texts import Labels
from llama_probe.data.row_sources import Source
from llama_probe.heads import get_probe_type, probe_types
from llama_probe.training.defaults import complete_head
from llama_probe.training.recipe import Augmentations, Calibration, CardFacts, Held, Measure, Recipe
from llama_probe.training.search import Search, draw_candidates


MINIMAL = {"train": [{"rows": "toxicchat"}]}


def changed(**sections):
    return {**MINIMAL, **sections}


@pytest.mark.parametrize("rows, head_type", [(128, "pooling"), (129, "gate"), (512, "gate"), (513, "multimax")])
def test_a_head_type_for_so_many_rows(rows, head_type):
    head = complete_head({}, rows)
    config = ProbeConfig(hidden_size=576, num_hidden_layers=30, **head)
    assert config.probe_type == head_type
    assert config.dropout == get_probe_type(head_type).training_defaults["dropout"]
    args = ProbeTrainingArguments(use_cpu=True)
    args.fill(config, rows)
    assert None not in (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size)


def test_one_of_several_accelerators_trains_the_whole_batch():
    args = ProbeTrainingArguments(use_cpu=True, per_device_train_batch_size=8)
    args._n_gpu = 2  # those that the parent finds, without torchrun
    assert args.n_gpu == 1 and args.train_batch_size == 8


def test_arguments_from_the_command_line_of_a_script():
    parse = HfArgumentParser(ProbeTrainingArguments).parse_args_into_dataclasses
    (args,) = parse(["--output_dir", "never", "--cache_dir", "~/states"])
    assert args.cache_states == "auto" and args.learning_rate is None
    assert args.cache_dir == os.path.expanduser("~/states") != "~/states"
    (args,) = parse(["--output_dir", "never", "--cache_states", "False"])
    assert args.cache_states is False


OUT_OF_RANGE = {"learning_rate": float("nan"), "focal_gamma": float("inf"), "patience": 0, "num_train_epochs": -1}
OUT_OF_RANGE |= {"per_device_train_batch_size": 2**31, "cache_states": "always"}


@pytest.mark.parametrize("name, value", OUT_OF_RANGE.items())
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ProbeError, match=f"{name}="):
        ProbeTrainingArguments(use_cpu=True, **{name: value})


def test_the_page_lists_each_setting_once():
    """As `python docs/settings.py` writes it."""
    script = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert script["written"](page) == page
    sections = {"": Recipe, "labels.": Labels, "train.0.": Source, "validation.": Held, "card.": CardFacts}
    sections |= {"augmentations.": Augmentations, "search.": Search, "calibration.": Calibration, "measure.": Measure}
    sections |= {"head.": ProbeConfig, "training.": ProbeTrainingArguments}
    names = [f"{prefix}{item.name}" for prefix, owner in sections.items() for item in script["shown_fields"](owner)]
    assert {"seeds", "train.0.rows", "head.layers", "training.learning_rate"} < set(names)
    for name in names:
        assert page.count(f"\n| `{name}` | ") == 1, name


class TestFile:
    def test_what_is_written_is_read(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(Path("a", "b", "c.jsonl"), 2)
        values = changed(train=["a/b/c.jsonl"], head={"probe_type": "gate", "layers": [0.5]}, training={"patience": 2})
        recipe = Recipe.load(values)
        (tmp_path / "mine.yaml").write_text(recipe.write())
        assert Recipe.load(tmp_path / "mine.yaml") == recipe == Recipe.load(recipe)
        assert list(yaml.safe_load(recipe.write())) == list(values), "in the order in which it was written"

    def test_settings_change_fields(self, tmp_path):
        text = "train: [toxicchat, {rows: xstest, max_rows: 5}]\ntraining: {learning_rate: 1e-2}\n"
        (tmp_path / "a.yaml").write_text(text)
        given = ["training.learning_rate=1e-3", "train.1.max_rows=7", "train.0.max_rows=9", "labels.flagged=[toxic]"]
        recipe = Recipe.load(tmp_path / "a.yaml", given)
        assert recipe.training == {"learning_rate": 0.001} and [source.max_rows for source in recipe.train] == [9, 7]
        assert recipe.labels.flagged == ["toxic"], "of a section that was not there"
        assert "max_rows: 7" in recipe.write() and Recipe.load(tmp_path / "a.yaml").train[1].max_rows == 5

    def test_a_recipe_of_earlier_code_is_read(self):
        names = {"names": ["lead_in"]}
        assert Recipe.load(changed(copies=names)) == Recipe.load(changed(augmentations=names))
        earlier = Recipe.load(changed(augmentations={"names": ["quote", "document"]}))
        assert earlier.augmentations.names == ["document", "record"]
        assert "quote" in earlier.write(), "as it was written"

    @pytest.mark.parametrize(
        "values, named",
        [
            ({}, "train"),
            (changed(trian=[]), "'trian'"),
            (changed(head={"id2label": {}}), "'id2label'"),
            (changed(measure={"sources": ["xstest", "xstest"]}), "'xstest'"),
            (changed(measure={"sources": ["xstest"], "wrappings": "aegis"}), "wrappings='aegis'"),
            (changed(labels={"flagged": "toxic"}), "labels.*flagged"),
            (changed(measure={"quantised": ["int5"]}), "measure.quantised=.*int5"),
            (changed(train=[{"rows": "toxicchat", "column": "x"}]), r"train\[0\] has no field 'column'"),
            (changed(train=[{"rows": "toxicchat", "max_rows": 0}]), r"train\[0\]: max_rows=0"),
            (changed(train=[{"rows": "toxicchat", "part": [0.5, 0.5]}]), r"part="),
            (changed(train=[{"rows": "toxicchat", "weights": [-1.0]}]), r"weights="),
            (changed(train=["toxicchat", "toxicchat"]), "'toxicchat'"),
            (changed(train=["rows.csv"]), "rows.csv"),
            (changed(validation={"share": 7}), "validation: share=7"),
            (changed(validation={"folds": 1}), "folds=1"),
            (changed(test={"folds": 3}), "test.folds"),
            (changed(test={"share": 0.2, "sources": ["xstest"]}), "share and sources"),
            (changed(augmentations={"names": ["rot13"]}), "rot13"),
            (changed(augmentations={"names": ["lead_in"], "share": 1.5}), "1.5"),
            (changed(augmentations={"names": ["system_prompt"]}), "system_prompts"),
            (changed(augmentations={"names": ["lead_in"], "documents": ["imdb"]}), "documents"),
            (changed(augmentations={"names": ["document"], "document_words": [60, 50]}), "document_words"),
            (changed(augmentations={"names": ["document"], "document_weight": 0}), "document_weight"),
            (changed(augmentations={"names": ["later_turns"]}), "token_scope"),
            (changed(augmentations={"names": ["earlier_turns"]}, head={"token_scope": "tool"}), "earlier_turns"),
            (changed(search={"trials": 2}, hold_out={"ablation": ["toxicchat"]}), "hold_out"),
            (changed(hold_out={"lists": ["advbench"]}), "hold_out.lists names 'advbench'"),
            (changed(hold_out={"a.b": ["toxicchat"]}), "'a.b'"),
            (changed(seeds=0), "seeds=0"),
            (changed(seed=2**32), "seed=4294967296"),
            (changed(search={"probe_types": ["lstm"]}), "lstm"),
            (changed(search={"trials": -1}), "trials=-1"),
            (changed(search={"trials": 2, "probe_types": []}), r"probe_types=\[\]"),
        ],
    )
    def test_wrong_fields(self, values, named):
        with pytest.raises(ProbeError, match=named):
            Recipe.load(values)

    @pytest.mark.parametrize("text, named", [("a: [", "YAML"), ("- a", "have fields"), ("seed: 1\nseed: 2", "'seed'")])
    def test_files_that_are_no_recipe(self, tmp_path, text, named):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ProbeError, match=named):
            Recipe.load(tmp_path / "a.yaml")

    @pytest.mark.parametrize("setting", ["seed", "train.5.rows=1", "name.x=1", "seed=[", "train.x=1"])
    def test_settings_that_cannot_be(self, setting):
        with pytest.raises(ProbeError, match="--set"):
            Recipe.load(changed(name="a"), [setting])


def test_every_draw_can_be_built():
    base = ProbeConfig(probe_type="pooling", hidden_size=32, num_hidden_layers=2)
    search = Search(trials=30, probe_types=list(probe_types()))
    trials = draw_candidates(search, base, seed=0)
    assert draw_candidates(search, base, seed=0) == trials
    assert {trial.config.probe_type for trial in trials.values()} == set(probe_types()) and len(trials) == 30
    for trial in trials.values():
        assert 1e-5 <= trial.training["learning_rate"] <= 3e-2
    with pytest.raises(ProbeError, match="hidden_size"):
        draw_candidates(Search(trials=1, probe_types=["mha"]), base.replace(hidden_size=7), 0)
