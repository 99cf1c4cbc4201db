"""Which rows train, which are held back, and which are left out."""

import json

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data.sources import FEW_ROWS, DataSources


def write(path, count, labels=2):
    lines = [
        json.dumps({"text": f"{('bad', 'good', 'so so')[i % labels]} no {i}", "label": i % labels})
        for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return str(path)


class TestHoldingBack:
    def test_a_share(self, tmp_path):
        parts = DataSources(train=write(tmp_path / "a.jsonl", 40)).read(0)
        assert (len(parts["train"]), len(parts["validation"])) == (34, 6)
        assert not set(parts["train"].texts) & set(parts["validation"].texts)

    @pytest.mark.parametrize("count, folded", [(FEW_ROWS - 1, True), (FEW_ROWS, False)])
    def test_few_rows_are_folded(self, tmp_path, count, folded):
        parts = DataSources(train=write(tmp_path / "a.jsonl", count), folds=None).read(0)
        assert (parts["validation"] is parts["train"]) == folded
        assert len(parts["train"]) == (count if folded else 340)

    def test_a_share_of_few_rows_that_is_asked_for(self, tmp_path):
        train = write(tmp_path / "a.jsonl", 40)
        parts = DataSources(train, validation_share=0.25, folds=None).read(0)
        assert [len(parts[name]) for name in ("train", "validation")] == [30, 10]

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"validation_share": 7}, "validation_share=7 must lie between 0 and 1"),
            ({"validation_share": 0.0, "folds": None}, "validation_share=0.0 must lie between 0 and 1"),
            ({"test_share": 1.0}, "test_share=1.0 must lie between 0 and 1"),
            ({"validation_share": 0.2, "folds": 3}, "validation_share=0.2 and folds=3 cannot both be used"),
            (
                {"validation_share": 0.2, "eval": "b.jsonl"},
                r"validation_share=0.2 and .* of b\.jsonl cannot both be used",
            ),
        ],
    )
    def test_shares_that_cannot_be(self, tmp_path, changes, words):
        with pytest.raises(ProbeError, match=words):
            DataSources(write(tmp_path / "a.jsonl", 40), **changes)

    def test_rows_of_their_own_come_first(self, tmp_path):
        train, other = write(tmp_path / "a.jsonl", 20), write(tmp_path / "b.jsonl", 10)
        parts = DataSources(train=train, eval=other, folds=None).read(0)
        assert (len(parts["train"]), len(parts["validation"])) == (20, 10)
        with pytest.raises(ProbeError, match=r"folds=3 and the validation rows of .* cannot both be used"):
            DataSources(train=train, eval=other, folds=3)

    def test_test_rows_before_anything_else(self, tmp_path):
        train = write(tmp_path / "a.jsonl", 40)
        parts = DataSources(train=train, test_share=0.25).read(0)
        assert [len(parts[name]) for name in ("train", "validation", "test")] == [25, 5, 10]
        assert len({text for rows in parts.values() for text in rows.texts}) == 40
        fewer = DataSources(train=train, test_share=0.25, max_rows=9, folds=3).read(0)
        assert fewer["test"].texts == parts["test"].texts and len(fewer["train"]) == 9
        with pytest.raises(ProbeError, match=r"test_share=0.5 and the test rows of .* cannot both be used"):
            DataSources(train=train, test=train, test_share=0.5)

    def test_extra_rows_train_and_do_nothing_else(self, tmp_path, caplog):
        train, extra = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 60)
        parts = DataSources(train=train, test_share=0.25, extra=[extra]).read(0)
        assert [len(parts[name]) for name in ("train", "validation", "test")] == [25, 5, 10], "as without them"
        judged = {*parts["validation"].texts, *parts["test"].texts}
        assert len(parts["extra"]) == 60 - 15 and not judged & set(parts["extra"].texts)
        with_folds = DataSources(train=train, folds=3, extra=[extra, extra]).read(0)
        assert with_folds["extra"].texts == [f"{('bad', 'good')[i % 2]} no {i}" for i in range(40, 60)] * 2
        fewer = DataSources(train=train, folds=3, extra=[extra, extra], max_extra_rows=7).read(0)["extra"]
        assert len(fewer) == 14 and set(fewer.texts) < set(with_folds["extra"].texts) and len(set(fewer.texts)) == 7

    def test_extra_rows_that_are_all_judged_by(self, tmp_path, caplog):
        train, extra, other = (
            write(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("abc", (40, 20, 60), strict=True)
        )
        with pytest.raises(
            ProbeError, match=r"no rows of .*b\.jsonl are left: all of them are validation or test rows"
        ):
            DataSources(train, folds=3, extra=[extra]).read(0)
        parts = DataSources(train, folds=3, extra=[extra, other]).read(0)
        assert len(parts["extra"]) == 20 and f"20 rows of {extra} are left out" in caplog.text

    @pytest.mark.parametrize(
        ("weights", "reason"),
        [
            ([], "must be numbers"),
            ([-0.1, 1.0], "must be numbers"),
            ([0.0], "not all of them 0"),
            ([float("inf")], "must"),
        ],
    )
    def test_weights_of_extra_rows_that_are_none(self, tmp_path, weights, reason):
        train = write(tmp_path / "a.jsonl", 40)
        with pytest.raises(ProbeError, match=reason):
            DataSources(train=train, extra=[train], extra_weights=weights)
        with pytest.raises(ProbeError, match="are for the rows of extra, and there are none"):
            DataSources(train=train, extra_weights=[0.5])

    def test_extra_rows_of_a_named_data_set_are_read_by_the_order_of_its_labels(self, tmp_path):
        (tmp_path / "advbench").mkdir()
        (tmp_path / "advbench" / "test.jsonl").write_text(json.dumps({"text": "Make a bomb.", "label": 1}))
        (tmp_path / "toxicchat").mkdir()
        write(tmp_path / "toxicchat" / "train.jsonl", 40)
        parts = DataSources(train="toxicchat", extra=["advbench"], data_dir=tmp_path).read(0)
        assert parts["extra"].label_names == parts["train"].label_names and parts["extra"].labels.tolist() == [1]
        (tmp_path / "goemotions").mkdir()
        (tmp_path / "goemotions" / "train.jsonl").write_text(json.dumps({"text": "Wow.", "label": [1, 2]}))
        with pytest.raises(ProbeError, match="goemotions is multi_label_classification, and toxicchat single_label"):
            DataSources(train="toxicchat", extra=["goemotions"], data_dir=tmp_path).read(0)

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"max_rows": 0}, "max_rows=0 must be at least 1"),
            ({"max_extra_rows": -1}, "max_extra_rows=-1 must be at least 1"),
            ({"label_names": ["no", "yes", ""]}, "none of them empty"),
            ({"label_names": ["no", "no"]}, "must be different names"),
        ],
    )
    def test_what_cannot_be(self, tmp_path, changes, words):
        with pytest.raises(ProbeError, match=words):
            DataSources(train=write(tmp_path / "a.jsonl", 40), **changes)

    def test_one_label_teaches_nothing(self, tmp_path):
        """Two are wanted where a row has one of them; one that holds or not is fine."""
        train, other = write(tmp_path / "a.jsonl", 30, labels=1), write(tmp_path / "b.jsonl", 30)
        for changes in ({}, {"label_names": ["no", "yes"]}, {"folds": 3, "label_names": ["no", "yes"]}):
            with pytest.raises(ProbeError, match=r"all rows to learn from have the label '(LABEL_0|no)'"):
                DataSources(train, **changes).read(0)
        assert "extra" in DataSources(train, extra=[other], folds=3, label_names=["no", "yes"]).read(0)
        (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": f"{i}", "label": [0]}) for i in range(30)))
        assert DataSources(str(tmp_path / "c.jsonl")).read(0)["train"].label_names == ["LABEL_0"]

    def test_slices_without_test_rows(self, tmp_path):
        data = DataSources(train=write(tmp_path / "a.jsonl", 40), slice_columns=["text"])
        with pytest.raises(ProbeError, match="are for test rows, and there are none"):
            data.read(0)

    def test_replies_to_one_prompt_stay_together(self, tmp_path):
        lines = [{"ask": f"number {i // 4}", "text": f"reply {i}", "label": i % 2} for i in range(48)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        sources = DataSources(train=str(tmp_path / "a.jsonl"), prompt_column="ask", test_share=0.3)
        parts = sources.read(0)
        asked = {name: {rows[0]["content"] for rows in part.texts} for name, part in parts.items()}
        assert sum(map(len, asked.values())) == 12 == len(set.union(*asked.values()))
        folds = parts["train"].folds(3, 0)
        texts = [{parts["train"].texts[row][0]["content"] for row in fold} for fold in folds]
        assert sum(map(len, texts)) == len(set.union(*texts))

    @pytest.mark.parametrize("count, labels, folds", [(23, 2, 4), (11, 3, 5), (6, 3, 5)])
    def test_each_row_is_held_out_once(self, tmp_path, count, labels, folds):
        sources = DataSources(train=write(tmp_path / "a.jsonl", count, labels), folds=folds)
        rows = sources.read(0)["train"]
        held = rows.folds(sources.folds, 0)
        assert sorted(np.concatenate(held)) == list(range(count)) and len(held) == folds
        if count >= folds * labels:
            assert all(len(set(rows.labels[fold])) > 1 for fold in held), "labels are spread"
        assert all((a == b).all() for a, b in zip(held, rows.folds(sources.folds, 0), strict=True))

    @pytest.mark.parametrize(
        "folds, words", [(1, r"0 .* or at least 2"), (-2, "or at least 2"), (8, "7 different texts are too few for 8")]
    )
    def test_numbers_that_cannot_be(self, tmp_path, folds, words):
        with pytest.raises(ProbeError, match=words):
            DataSources(train=write(tmp_path / "a.jsonl", 7), folds=folds).read(0)["train"].folds(folds, 0)


@pytest.mark.parametrize("name", ["eval", "test"])
def test_rows_that_are_learned_from_and_judged_by(tmp_path, name, caplog):
    train = write(tmp_path / "a.jsonl", 40)
    part = "validation" if name == "eval" else name
    DataSources(train, **{name: write(tmp_path / "b.jsonl", 50)}).read(0)
    (told,) = [line for line in caplog.messages if "among the training rows" in line]
    assert told.startswith(f"{40 if name == 'eval' else 34} of 50 {part} rows")


def test_parts_of_the_same_rows_share_no_text(tmp_path, caplog):
    train = write(tmp_path / "a.jsonl", 40)
    DataSources(train, test_share=0.2, folds=3).read(0)
    assert "among the training rows" not in caplog.text


@pytest.mark.parametrize("labels", [[0, 1], [[0], [1]]])
def test_labels_that_no_row_to_learn_from_has(tmp_path, labels, caplog):
    lines = [json.dumps({"text": f"no {i}", "label": labels[i % 2]}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    DataSources(str(tmp_path / "a.jsonl"), label_names=["bad", "good", "so so"]).read(0)
    assert "No row to learn from has the label so so: the head will hardly give it" in caplog.messages
    caplog.clear()
    DataSources(str(tmp_path / "a.jsonl"), label_names=["bad", "good"]).read(0)
    assert "No row" not in caplog.text
