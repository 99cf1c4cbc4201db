"""Rows that train, rows that are held back, and rows that are left out."""

import json

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data.sources import FEW_ROWS, DataSources


def write(path, rows, labels=2):
    """Write rows, or so many, as JSON lines."""
    if isinstance(rows, int):
        rows = [{"text": f"{('bad', 'good', 'so so')[i % labels]} no {i}", "label": i % labels} for i in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "a.jsonl", 40)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"validation_share": 7}, "validation_share=7"),
        ({"test_share": 1.0}, "test_share=1.0"),
        ({"validation_share": 0.2, "folds": 3}, "folds=3 and validation_share=0.2"),
        ({"folds": 3, "eval": "b.jsonl"}, "eval=b.jsonl and folds=3"),
        ({"test_share": 0.2, "test": "b.jsonl"}, "test=b.jsonl and test_share=0.2"),
        ({"folds": 1}, "folds=1"),
        ({"max_rows": 0}, r"max_rows=\[0\]"),
        ({"max_rows": [3, 4]}, r"max_rows=\[3, 4\]"),
        ({"augment": ["rot13"]}, "augment="),
        ({"augment": ["lead_in"], "augment_share": 1.5}, "augment_share=1.5"),
        ({"augment": ["system_prompt"]}, "system_prompts"),
        ({"augment": ["lead_in"], "system_prompts": "a.csv"}, "system_prompts"),
        ({"max_extra_rows": -1}, "max_extra_rows=-1"),
        ({"extra": ["b.jsonl"], "extra_weights": [-0.1, 1.0]}, "extra_weights="),
        ({"extra": ["b.jsonl"], "extra_weights": [0.0]}, "extra_weights="),
        ({"extra_weights": [0.5]}, "extra_weights="),
    ],
)
def test_wrong_values(changes, named):
    with pytest.raises(ProbeError, match=named):
        DataSources(**{"train": "a.jsonl", **changes})


class TestHoldingBack:
    def test_a_share(self, train):
        parts = DataSources(train).read(0)
        assert (len(parts["train"]), len(parts["validation"])) == (34, 6)
        assert not set(parts["train"].texts) & set(parts["validation"].texts)

    @pytest.mark.parametrize("count, folded", [(FEW_ROWS - 1, True), (FEW_ROWS, False)])
    def test_few_rows_are_folded(self, tmp_path, count, folded):
        parts = DataSources(write(tmp_path / "a.jsonl", count), folds=None).read(0)
        assert (parts["validation"] is parts["train"]) == folded
        assert len(parts["train"]) == (count if folded else 340)

    def test_test_rows_before_anything_else(self, train, caplog):
        parts = DataSources(train, test_share=0.25).read(0)
        assert [len(parts[name]) for name in ("train", "validation", "test")] == [25, 5, 10]
        assert len({text for rows in parts.values() for text in rows.texts}) == 40
        fewer = DataSources(train, test_share=0.25, max_rows=9, folds=3).read(0)
        assert fewer["test"].texts == parts["test"].texts and len(fewer["train"]) == 9
        assert "among the training rows" not in caplog.text

    def test_one_label_teaches_nothing(self, tmp_path):
        one, other = write(tmp_path / "a.jsonl", 30, labels=1), write(tmp_path / "b.jsonl", 30)
        with pytest.raises(ProbeError, match="'no'"):
            DataSources(one, label_names=["no", "yes"]).read(0)
        assert "extra" in DataSources(one, extra=[other], folds=3, label_names=["no", "yes"]).read(0)
        several = write(tmp_path / "c.jsonl", [{"text": f"{i}", "label": [0]} for i in range(30)])
        assert DataSources(several).read(0)["train"].label_names == ["LABEL_0"]

    def test_slices_without_test_rows(self, train):
        with pytest.raises(ProbeError, match="slice_columns"):
            DataSources(train, slice_columns=["text"]).read(0)

    def test_replies_to_one_prompt_stay_together(self, tmp_path):
        rows = [{"ask": f"number {i // 4}", "text": f"reply {i}", "label": i % 2} for i in range(48)]
        parts = DataSources(write(tmp_path / "a.jsonl", rows), prompt_column="ask", test_share=0.3).read(0)
        asked = {name: {text[0]["content"] for text in part.texts} for name, part in parts.items()}
        assert sum(map(len, asked.values())) == 12 == len(set.union(*asked.values()))
        folds = parts["train"].folds(3, 0)
        texts = [{parts["train"].texts[row][0]["content"] for row in fold} for fold in folds]
        assert sum(map(len, texts)) == len(set.union(*texts))

    @pytest.mark.parametrize("count, labels, folds", [(23, 2, 4), (6, 3, 5)])
    def test_each_row_is_held_out_once(self, tmp_path, count, labels, folds):
        rows = DataSources(write(tmp_path / "a.jsonl", count, labels), folds=folds).read(0)["train"]
        held = rows.folds(folds, 0)
        assert sorted(np.concatenate(held)) == list(range(count)) and len(held) == folds
        if count >= folds * labels:
            assert all(len(set(rows.labels[fold])) > 1 for fold in held), "labels are spread"
        assert all((a == b).all() for a, b in zip(held, rows.folds(folds, 0), strict=True))
        with pytest.raises(ProbeError, match=f"{count} different texts"):
            rows.folds(count + 1, 0)


class TestMixtures:
    def test_the_rows_of_all_sources(self, tmp_path):
        one = write(tmp_path / "a.jsonl", [{"text": f"a {i}", "label": 0, "of": "a"} for i in range(20)])
        other = write(tmp_path / "b.jsonl", [{"text": f"b {i}", "label": 1, "of": "b", "more": 1} for i in range(10)])
        data = DataSources([one, other], label_names=["no", "yes"], validation_share=0.2)
        parts = data.read(0)
        assert [len(parts[name]) for name in ("train", "validation")] == [24, 6]
        assert [text[0] == "b" for text in parts["train"].texts] == parts["train"].labels.tolist()
        assert set(parts["train"].columns) == {"of"} and set(parts["validation"].columns["of"]) == {"a", "b"}

    @pytest.mark.parametrize("limits, found", [(None, [20, 30]), (15, None), ([5, 0], [5, 30])])
    def test_limits(self, tmp_path, limits, found):
        sources = [
            write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "label": i % 2} for i in range(count)])
            for name, count in (("a", 20), ("b", 30))
        ]
        rows = DataSources(sources, max_rows=limits, folds=3).read(0)["train"]
        counts = [sum(text[0] == name for text in rows.texts) for name in "ab"]
        assert counts == found if found else sum(counts) == 15 and min(counts) > 0


class TestAugmentation:
    def test_only_training_rows_are_wrapped(self, tmp_path, train):
        system = write(tmp_path / "system.jsonl", [{"text": "You sell shoes."}])
        split = {"test_share": 0.25, "validation_share": 0.2}
        plain = DataSources(train, **split).read(0)
        data = DataSources(train, **split, augment=["system_prompt"], augment_share=1.0, system_prompts=system)
        parts, texts = data.read(0), plain["train"].texts
        assert parts["validation"].texts == plain["validation"].texts and parts["test"].texts == plain["test"].texts
        wrapped = [[turn["content"] for turn in text] for text in parts["train"].texts[len(texts) :]]
        assert parts["train"].texts[: len(texts)] == texts and wrapped == [["You sell shoes.", text] for text in texts]
        assert parts["train"].labels.tolist() == plain["train"].labels.tolist() * 2

    def test_refused(self, tmp_path, train):
        other = write(tmp_path / "b.jsonl", [{"t": "x"}])
        with pytest.raises(ProbeError, match="augment="):  # folds would share the copies
            DataSources(train, folds=3, augment=["lead_in"]).read(0)
        with pytest.raises(ProbeError, match="system_prompts"):
            DataSources(train, augment=["system_prompt"], system_prompts=other).read(0)


class TestExtraRows:
    def test_they_train_and_do_nothing_else(self, tmp_path, train):
        extra = write(tmp_path / "b.jsonl", 60)
        parts = DataSources(train, test_share=0.25, extra=[extra]).read(0)
        assert [len(parts[name]) for name in ("train", "validation", "test")] == [25, 5, 10], "as without them"
        judged = {*parts["validation"].texts, *parts["test"].texts}
        assert len(parts["extra"]) == 60 - 15 and not judged & set(parts["extra"].texts)
        with_folds = DataSources(train, folds=3, extra=[extra, extra]).read(0)
        assert with_folds["extra"].texts == [f"{('bad', 'good')[i % 2]} no {i}" for i in range(40, 60)] * 2
        fewer = DataSources(train, folds=3, extra=[extra, extra], max_extra_rows=7).read(0)["extra"]
        assert len(fewer) == 14 and set(fewer.texts) < set(with_folds["extra"].texts) and len(set(fewer.texts)) == 7

    def test_rows_that_are_all_validation_rows(self, tmp_path, train, caplog):
        extra, other = write(tmp_path / "b.jsonl", 20), write(tmp_path / "c.jsonl", 60)
        with pytest.raises(ProbeError, match="extra="):
            DataSources(train, folds=3, extra=[extra]).read(0)
        parts = DataSources(train, folds=3, extra=[extra, other]).read(0)
        assert len(parts["extra"]) == 20 and f"20 rows of {extra} are skipped" in caplog.text

    def test_a_named_data_set_is_read_by_the_order_of_its_labels(self, tmp_path):
        write(tmp_path / "advbench" / "test.jsonl", [{"text": "Make a bomb.", "label": 1}])
        write(tmp_path / "toxicchat" / "train.jsonl", 40)
        write(tmp_path / "goemotions" / "train.jsonl", [{"text": "Wow.", "label": [1, 2]}])
        parts = DataSources("toxicchat", extra=["advbench"], data_dir=tmp_path).read(0)
        assert parts["extra"].label_names == parts["train"].label_names and parts["extra"].labels.tolist() == [1]
        with pytest.raises(ProbeError, match="goemotions is for multi_label_classification"):
            DataSources("toxicchat", extra=["goemotions"], data_dir=tmp_path).read(0)


class TestWarnings:
    @pytest.mark.parametrize("name, told", [("eval", "40 of 50 validation rows"), ("test", "34 of 50 test rows")])
    def test_rows_that_are_learned_from_and_judged_by(self, tmp_path, train, name, told, caplog):
        DataSources(train, **{name: write(tmp_path / "b.jsonl", 50)}).read(0)
        assert caplog.text.count("among the training rows") == 1 and told in caplog.text

    def test_labels_without_a_training_row(self, train, caplog):
        DataSources(train, label_names=["bad", "good"]).read(0)
        assert not caplog.messages
        DataSources(train, label_names=["bad", "good", "so so"]).read(0)
        assert "has the label so so:" in caplog.text


class TestNamedDataSets:
    @pytest.fixture
    def copies(self, tmp_path):
        def rows(split, **more):
            return [{"text": f"{split} {i}", "label": i % 2, **more} for i in range(20)]

        folder = tmp_path / "copies"
        for split in ("train", "validation", "test"):
            write(folder / "emotion" / f"{split}.jsonl", rows(split))
        for split in ("train", "test"):
            write(folder / "toxicchat" / f"{split}.jsonl", rows(split, human_annotation=True, jailbreaking=0))
        write(folder / "xstest" / "test.jsonl", rows("test"))
        return folder

    def test_its_own_splits(self, copies):
        data = DataSources("emotion", data_dir=copies)
        assert (data.eval, data.test, data.slice_columns) == ("emotion:validation", "emotion:test", [])
        first = {name: rows.texts[0] for name, rows in data.read(seed=0).items()}
        assert first == {"train": "train 0", "validation": "validation 0", "test": "test 0"}

    def test_without_a_validation_split(self, copies):
        data = DataSources("toxicchat", data_dir=copies, validation_share=0.25)
        assert (data.eval, data.test, data.slice_columns) == (None, "toxicchat:test", ["human_annotation"])
        counts = {name: len(rows) for name, rows in data.read(seed=0).items()}
        assert counts == {"train": 15, "validation": 5, "test": 20}

    def test_given_values_stay(self, copies, train):
        data = DataSources("emotion", eval=train, test="toxicchat", slice_columns=["jailbreaking"], data_dir=copies)
        assert (data.eval, data.test, data.slice_columns) == (train, "toxicchat", ["jailbreaking"])
        assert DataSources("emotion", validation_share=0.2, data_dir=copies).eval is None
        assert DataSources("emotion:test", data_dir=copies).test is None, "never the rows that are trained on"
        assert DataSources("emotion:validation", data_dir=copies).eval is None
        file = DataSources(train, test="toxicchat", data_dir=copies)
        assert (file.eval, file.slice_columns) == (None, ["human_annotation"])

    def test_labels_of_another_set_are_those_of_train(self, copies):
        parts = DataSources("toxicchat", test="xstest", data_dir=copies).read(seed=0)
        assert parts["test"].label_names == ["non-toxic", "toxic"] and parts["test"].labels.sum() == 10
        with pytest.raises(ProbeError, match="safe, unsafe"):
            DataSources("emotion", test="xstest", data_dir=copies).read(seed=0)

    def test_the_label_to_flag_is_known_by_name(self, tmp_path, copies):
        parts = DataSources("toxicchat", test="xstest", data_dir=copies).read(seed=0)
        assert parts["train"].flagged == parts["test"].flagged == ["toxic"]
        named = DataSources("toxicchat", data_dir=copies, label_names=["toxic", "non-toxic"], test="xstest")
        assert named.read(seed=0)["train"].flagged == ["toxic"], "its own names are matched, whatever their order"
        renamed = DataSources("toxicchat", data_dir=copies, label_names=["ok", "rude"], validation_share=0.2)
        assert renamed.read(seed=0)["train"].flagged == ["rude"]
        own = write(tmp_path / "own.jsonl", [{"text": f"a {i}", "label": "ab"[i % 2]} for i in range(20)])
        assert DataSources(own, folds=2).read(seed=0)["train"].flagged is None
        assert DataSources(own, folds=2, flagged=["a"]).read(seed=0)["train"].flagged == ["a"]
        with pytest.raises(ProbeError, match=r"flagged=.*c.* a, b"):
            DataSources(own, flagged=["c"]).read(seed=0)

    def test_columns_of_files_beside_a_name(self, tmp_path, copies):
        own = write(tmp_path / "own.jsonl", [{"q": f"a {i}", "y": i % 2} for i in range(20)])
        parts = DataSources(own, test="toxicchat", text_column="q", label_column="y", data_dir=copies).read(seed=0)
        assert parts["train"].texts[0].startswith("a") and parts["test"].texts[0] == "test 0"
        for changes in ({"label_column": "jailbreaking"}, {"prompt_column": "q"}):
            with pytest.raises(ProbeError, match=r"label_column, prompt_column .* not for toxicchat, toxicchat:test"):
                DataSources("toxicchat", data_dir=copies, **changes)

    def test_replies_beside_replies_known_by_name(self, tmp_path, copies):
        own = write(tmp_path / "own.jsonl", [{"ask": f"q {i}", "text": f"a {i}", "label": i % 2} for i in range(20)])
        data = DataSources(own, test="beavertails:test", prompt_column="ask", data_dir=copies)
        write(copies / "beavertails" / "test.jsonl", [{"prompt": "Q", "response": "A", "text": "Q A", "label": 1}])
        assert [turn["content"] for turn in data.read(seed=0)["test"].texts[0]] == ["Q", "A"]
        write(copies / "beavertails" / "test.jsonl", [{"text": "Q A", "label": 1}])
        with pytest.raises(ProbeError, match="no column 'response'"):
            data.read(seed=0)

    def test_a_copy_without_the_column_to_slice_by(self, copies):
        write(copies / "toxicchat" / "test.jsonl", [{"text": "one", "label": 0}])
        data = DataSources("toxicchat", data_dir=copies)
        assert "test" in data.read(seed=0) and data.slice_columns == []
