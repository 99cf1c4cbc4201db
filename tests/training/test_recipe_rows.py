"""The rows of a recipe: which train, which are held back, and which are left out."""

import re

import pytest
from training_runs import write

from llama_probe import ProbeError
from llama_probe.training.recipe import FEW_ROWS, Recipe
from llama_probe.training.recipe_rows import read_rows


WORDS = ("bad", "good", "so so")


def read(*train, data_dir=None, **sections):
    sections = {"labels": {"flagged": None}, "validation": {"folds": 0}, **sections}
    return read_rows(Recipe.load({"train": list(train), **sections}), data_dir)


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "a.jsonl", 40)


class TestHoldingBack:
    @pytest.mark.parametrize("count, folded", [(FEW_ROWS - 1, True), (FEW_ROWS, False)])
    def test_few_rows_are_folded(self, tmp_path, count, folded):
        rows = read(write(tmp_path / "a.jsonl", count), validation={})
        assert (rows.validation is None) == bool(rows.folds) == folded
        assert len(rows.train) == (count if folded else 340)

    def test_few_rows_with_an_ablation_are_not_folded(self, tmp_path, train):
        other = write(tmp_path / "b.jsonl", 20, ("sad", "glad"))
        assert len(read(train, other, hold_out={"x": ["b"]}, validation={}).validation) == 9

    def test_test_rows_before_anything_else(self, train, caplog):
        rows = read(train, test={"share": 0.25})
        assert [len(part) for part in (rows.train, rows.validation, rows.test)] == [25, 5, 10]
        assert len({text for part in rows.parts().values() for text in part.texts}) == 40
        fewer = read(train, test={"share": 0.25}, max_rows=9, validation={"folds": 3})
        assert fewer.test.texts == rows.test.texts and len(fewer.train) == 9
        assert "among the training rows" not in caplog.text

    def test_one_label_teaches_nothing(self, tmp_path):
        one, other = write(tmp_path / "a.jsonl", 30, ("bad",)), write(tmp_path / "b.jsonl", 30)
        names = {"labels": {"names": ["no", "yes"]}}
        with pytest.raises(ProbeError, match="'no'"):
            read(one, **names)
        assert read(one, {"rows": other, "extra": True}, validation={"folds": 3}, **names).num_extra
        several = write(tmp_path / "c.jsonl", [{"text": f"{i}", "label": [0]} for i in range(30)])
        with pytest.raises(ProbeError, match="'LABEL_0'"):
            read(several)

    def test_replies_to_one_prompt_stay_together(self, tmp_path):
        lines = [{"ask": f"number {i // 4}", "text": f"reply {i}", "label": i % 2} for i in range(48)]
        rows = read({"rows": write(tmp_path / "a.jsonl", lines), "prompt_column": "ask"}, test={"share": 0.3})
        asked = {name: {text[0]["content"] for text in part.texts} for name, part in rows.parts().items()}
        assert sum(map(len, asked.values())) == 12 == len(set.union(*asked.values()))


class TestMixtures:
    def test_the_rows_of_all_sources(self, tmp_path):
        one = write(tmp_path / "a.jsonl", [{"text": f"a {i}", "label": 0, "of": "a"} for i in range(20)])
        other = write(tmp_path / "b.jsonl", [{"text": f"b {i}", "label": 1, "of": "b", "more": 1} for i in range(10)])
        rows = read(one, other, labels={"names": ["no", "yes"]}, validation={"share": 0.2})
        assert [len(rows.train), len(rows.validation)] == [24, 6]
        assert [text[0] == "b" for text in rows.train.texts] == rows.train.labels.tolist()
        assert set(rows.train.columns) == {"of", "source"} and set(rows.validation.columns["of"]) == {"a", "b"}
        limited = read({"rows": one, "max_rows": 5}, other, labels={"names": ["no", "yes"]}, validation={"folds": 3})
        assert limited.train.columns["source"] == ["a"] * 5 + ["b"] * 10

    def test_repeats_and_weights(self, tmp_path, train):
        extra = {"rows": write(tmp_path / "b.jsonl", 60), "extra": True, "weights": [0.0, 0.3]}
        sections = {"augmentations": {"names": ["lead_in"], "share": 0.2}, "labels": {"flagged": ["LABEL_1"]}}
        rows = read({"rows": train, "repeat": 3}, extra, **sections)
        plain, more = rows.num_plain, rows.num_extra
        assert rows.repeats == [3] * plain + [1] * (len(rows.train) - plain), "augmentations are learned once"
        assert rows.weights == [None] * plain + [[0.0, 0.3]] * more + [None] * (len(rows.train) - plain - more)

    def test_the_first_source_says_what_the_labels_are(self, tmp_path):
        own = write(tmp_path / "own.jsonl", [{"text": f"a {i}", "label": "ab"[i % 2]} for i in range(20)])
        assert read(own).train.flagged is None and read(own, labels={"flagged": ["a"]}).train.flagged == ["a"]
        with pytest.raises(ProbeError, match=r"flagged=.*c.* a, b"):
            read(own, labels={"flagged": ["c"]})
        other = write(tmp_path / "other.jsonl", [{"text": "x", "label": "d"}])
        with pytest.raises(ProbeError, match="d"):
            read(own, other)


def test_only_training_rows_are_wrapped(tmp_path, train):
    augmentations = {"names": ["system_prompt"], "share": 1.0}
    augmentations["system_prompts"] = write(tmp_path / "system.jsonl", [{"text": "You sell shoes."}])
    split = {"test": {"share": 0.25}, "validation": {"share": 0.2}}
    plain, rows = read(train, **split), read(train, **split, augmentations=augmentations)
    texts = plain.train.texts
    assert rows.validation.texts == plain.validation.texts and rows.test.texts == plain.test.texts
    wrapped = [[turn["content"] for turn in text] for text in rows.train.texts[len(texts) :]]
    assert rows.train.texts[: len(texts)] == texts and wrapped == [["You sell shoes.", text] for text in texts]
    assert rows.train.labels.tolist() == plain.train.labels.tolist() * 2


class TestDocuments:
    @pytest.fixture
    def sections(self, tmp_path, train):
        long = [{"text": " ".join([f"Line {i} of text {n}." for i in range(90)]), "label": "x"} for n in range(8)]
        documents = {"rows": write(tmp_path / "long.jsonl", long), "name": "long"}
        augmentations = {"names": ["document"], "share": 1.0, "documents": [documents], "document_words": [40, 200]}
        return {"labels": {"flagged": ["LABEL_1"]}, "augmentations": augmentations}

    def test_the_texts_are_of_the_sources_that_the_recipe_names(self, train, sections):
        rows = read(train, **sections)
        new = rows.train.select(range(rows.num_plain, len(rows.train)))
        assert len(new) == rows.num_plain == 34 and all("Line" in text for text in new.texts)
        alone = [row for row, place in enumerate(new.places) if place is None]
        assert {new.columns["source"][row] for row in alone} == {"long"} and not new.labels[alone].any()
        assert {new.columns["source"][row] for row in set(range(34)) - set(alone)} == {"a+long"}
        assert rows.train.places[: rows.num_plain] == [None] * rows.num_plain
        assert rows.described["documents"]["rows"] == 8
        assert read(train, **sections).digest() == rows.digest() != read(train, seed=1, **sections).digest()

    def test_validation_rows_stand_in_documents_that_are_not_learned(self, train, sections):
        """So that the best epoch is not chosen by short rows alone: as many documents a row as in training."""
        sections["validation"] = {"share": 0.5}
        rows = read(train, **sections)
        around = rows.validation.select(range(20, len(rows.validation)))
        assert len(around) == 20 == rows.described["validation"]["documents"]
        of_validation, of_training = (
            {number for text in part.texts for number in re.findall(r"of text (\d)", text)}
            for part in (around, rows.train)
        )
        assert len(of_validation) == 2 and len(of_training) == 6 and not of_validation & of_training
        assert {*around.columns["source"]} == {"long", "a+long"} and around.labels.any() and not around.labels.all()
        own = read(train, **sections | {"validation": {"sources": [train]}})
        assert len(own.validation) == 40, "rows of one's own stay as they are"
        del sections["augmentations"]["documents"]
        sections["augmentations"]["document_words"] = [10, 40]
        assert len(read(train, **sections).validation) == 40, "made of other validation rows"

    def test_an_ablation_without_a_kind_of_documents(self, tmp_path, train, sections):
        lines = [{"text": f"Cell {i}, cell {n}. " * 20, "label": "x"} for n in range(8) for i in range(2)]
        sections["augmentations"]["documents"].append(write(tmp_path / "tables.jsonl", lines))
        rows = read(train, **sections, validation={"share": 0.5}, hold_out={"no-tables": ["tables"]})
        ablation = rows.ablations["no-tables"]
        for part, left_out in ((rows.train, ablation.left_out), (rows.validation, ablation.excluded_from_validation)):
            assert left_out == [row for row, text in enumerate(part.texts) if "Cell" in text] != []
        measured = ablation.measured["tables"]
        assert len(measured) == 20 and all("Cell" in text for text in measured.texts)
        assert measured.labels.any() and not measured.labels.all()

    def test_their_weight(self, train, sections):
        sections["augmentations"] |= {"names": ["lead_in", "document"], "share": 0.5, "document_weight": 4}
        rows = read(train, **sections)
        assert rows.weights == [None] * (rows.num_plain + 17) + [[4.0]] * 17

    @pytest.mark.parametrize("scope, asks", [("user", True), ("tool", False)])
    def test_a_tool_asks_for_no_summary(self, train, sections, scope, asks):
        rows = read(train, **sections, head={"token_scope": scope})
        assert any("ummarise" in text for text in rows.train.texts) == asks

    def test_ablations_leave_out_the_documents_of_their_sources(self, tmp_path, train, sections):
        other = write(tmp_path / "b.jsonl", [{"text": f"{w} b {i}", "label": i % 2} for i, w in enumerate("xy" * 20)])
        del sections["augmentations"]["documents"]  # the harmless rows of both sources
        sections["augmentations"]["document_words"] = [10, 40]
        rows = read(train, other, hold_out={"x": ["b"]}, **sections)
        new = range(rows.num_plain, len(rows.train))
        left_out = {row for row in rows.ablations["x"].left_out if row in new}
        assert left_out >= {row for row in new if " b " in rows.train.texts[row]} and len(left_out) < len(new) - 9

    def test_calibration_rows_that_are_in_documents(self, train, sections, caplog):
        long = sections["augmentations"]["documents"][0]
        read(train, **sections, calibration={"sources": [{**long, "name": "rest"}], "rates": [0.5]})
        assert "8 of 8 calibration rows" in caplog.text


class TestExtraRows:
    def test_they_train_and_do_nothing_else(self, tmp_path, train):
        extra = {"rows": write(tmp_path / "b.jsonl", 60), "extra": True}
        rows = read(train, extra, test={"share": 0.25})
        assert [rows.num_plain, len(rows.validation), len(rows.test)] == [25, 5, 10], "as without them"
        judged = {*rows.validation.texts, *rows.test.texts}
        assert rows.num_extra == 60 - 15 and not judged & set(rows.train.texts)
        with_folds = read(train, extra, validation={"folds": 3})
        assert with_folds.train.texts[40:] == [f"{('bad', 'good')[i % 2]} no {i}" for i in range(40, 60)]

    def test_rows_that_are_all_validation_rows(self, tmp_path, train, caplog):
        extra, other = ({"rows": write(tmp_path / f"{n}.jsonl", n), "extra": True} for n in (20, 60))
        with pytest.raises(ProbeError, match="extra"):
            read(train, extra, validation={"folds": 3})
        assert read(train, extra, other, validation={"folds": 3}).num_extra == 20
        assert "60 of 80 extra rows are skipped" in caplog.text


def test_rows_that_were_learned_are_not_measured(tmp_path, train, caplog):
    rows = read(train, measure={"sources": [write(tmp_path / "b.jsonl", 60)]})
    assert not set(rows.measured["b"].texts) & set(rows.train.texts) and len(rows.measured["b"]) == 26
    assert "34 of 60 rows of b are learned from" in caplog.text
    with pytest.raises(ProbeError, match="slice_columns"):
        read(train, measure={"sources": [str(tmp_path / "b.jsonl")], "slice_columns": ["tone"]})


def test_rows_to_calibrate_on_need_no_labels(tmp_path, train):
    calm = write(tmp_path / "b.jsonl", [{"text": f"calm {i}"} for i in range(60)])
    rows = read(train, labels={"flagged": ["LABEL_1"]}, calibration={"sources": [calm]})
    assert rows.calibration.labels.tolist() == [0] * 60
    with pytest.raises(ProbeError, match="calibration"):
        read(write(tmp_path / "c.jsonl", 60, WORDS), calibration={"sources": [calm]})


def test_what_a_licence_leaves_out_is_told(tmp_path, train):
    bound = {"rows": write(tmp_path / "b.jsonl", 30), "name": "bound", "licence": "cc-by-nc-4.0"}
    mixed = {"rows": train, "licence": "mit"}, bound
    assert read(*mixed, licence="commercial").described["train"]["not_commercial"] == {"bound": 30}
    more = {"measure": {"sources": [{**bound, "rows": write(tmp_path / "c.jsonl", 20)}]}}
    rows = read(*mixed, licence="commercial", **more)
    assert rows.described["train"]["not_commercial"] == {"bound": 50}, "and not those of the last source of this name"
    few = {**bound, "rows": "gone", "local": {"rows": bound["rows"], "max_rows": 20}}
    assert len(read({"rows": train, "licence": "mit"}, few, data_dir=tmp_path).train) == 0.85 * 60
    rows = read({"rows": train, "licence": "mit"}, {**bound, "max_rows": 10}, licence="commercial")
    assert rows.described["train"]["not_commercial"] == {"bound": 30}, "however few were to be drawn"
    assert set(rows.train.columns["source"]) == {"a"}
    with pytest.raises(ProbeError, match="licence"):
        read(bound, licence="commercial")


@pytest.mark.parametrize("name, count", [("validation", 40), ("test", 34), ("calibration", 34)])
def test_rows_that_are_learned_from_and_judged_by_are_warned_of(tmp_path, train, name, count, caplog):
    read(train, labels={"flagged": ["LABEL_1"]}, **{name: {"sources": [write(tmp_path / "b.jsonl", 50)]}})
    assert caplog.text.count("among the training rows") == 1 and f"{count} of 50 {name} rows" in caplog.text


@pytest.mark.parametrize(
    "sections, named",
    [
        # Folds would share the augmentations.
        ({"validation": {"folds": 3}, "augmentations": {"names": ["lead_in"]}}, "augmentations"),
        ({"validation": {"folds": 2}, "hold_out": {"x": ["b"]}}, "hold_out"),
        # The other source has the same texts.
        ({"hold_out": {"x": ["a"]}}, r"hold_out\.x"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"test": {"share": 0.2, "max_rows": -5}}, "max_rows=-5"),
    ],
)
def test_sections_that_cannot_be(tmp_path, sections, named):
    with pytest.raises(ProbeError, match=named):
        read(write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 40), **sections)


def test_other_folds_are_other_rows(train):
    """A run does not resume with them: its heads have learned from rows that are held out now."""
    first, again, other = (read(train, validation={"folds": 2}, seed=seed).digest() for seed in (0, 0, 1))
    assert first == again and first["learned"] != other["learned"]
