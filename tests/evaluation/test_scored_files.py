"""Two outputs of `classify --input`, compared."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_probe import ProbeError
from llama_probe.evaluation.scored_files import compare_scored_files


@pytest.fixture
def write(tmp_path):
    """Write a folder of scores of the head `mood`."""

    def write(name, awful, labels=None, novelty=None, labels_of=("fine", "awful"), **more):
        folder = tmp_path / name
        folder.mkdir()
        columns = {"file": ["a.jsonl"] * len(awful), "row": range(len(awful))}
        scores = [None if score is None else dict(zip(labels_of, (1 - score, score), strict=True)) for score in awful]
        columns["mood_probabilities"] = scores
        if labels is None:
            labels = [None if score is None else labels_of[score >= 0.5] for score in awful]
        columns["mood_label"] = labels
        if novelty is not None:
            columns["mood_novelty"] = novelty
        pq.write_table(pa.table(columns | more), folder / "part-0.parquet")
        (folder / "_manifest.json").write_text("{}")
        return folder

    return write


def test_shares_scores_and_novelty_by_hand(write):
    usual = write("usual", [0.1] * 90 + [0.9] * 10, novelty=[0.5] * 100)
    log = write("log", [None, *[0.1] * 50, *[0.9] * 50], novelty=[None, *[0.2] * 60, *[0.999] * 40])
    found = compare_scored_files(usual, log, "mood")
    assert found["rows"] == {"reference": 100, "log": 100}, "a row without scores does not count"
    assert found["novelty"]["log"]["far"] == 0.4 and found["novelty"]["log"]["median"] == pytest.approx(0.2)
    low, high = found["novelty"]["reference"]["interval"]
    assert low == 0 < high < 0.05 and found["novelty"]["reference"]["far"] == 0
    assert found["labels"]["log"]["awful"]["share"] == 0.5 and found["labels"]["reference"]["awful"]["share"] == 0.1
    assert found["changed"] == ["fine", "awful"]
    assert compare_scored_files(usual, usual, "mood")["changed"] == []
    deciles = found["scores"]["awful"]
    assert deciles["log"] == pytest.approx(np.quantile([0.1] * 50 + [0.9] * 50, np.linspace(0, 1, 11)))
    assert deciles["reference"][5] == pytest.approx(0.1) and set(found["scores"]) == {"fine", "awful"}


def test_rows_that_are_new_or_unsure_come_first(write):
    log = write("log", [0.1, 0.5, 0.9, 0.4, None], novelty=[0.1, 0.6, 0.999, 0.1, None])
    worth = compare_scored_files(log, log, "mood", top=3)["worth_labelling"]
    assert [row["row"] for row in worth] == [1, 2, 3] and {row["file"] for row in worth} == {"a.jsonl"}
    assert [row["unsure"] for row in worth] == pytest.approx([1, 0.2, 0.8])
    assert [row["novelty"] for row in worth] == pytest.approx([0.6, 0.999, 0.1])


def test_other_heads(write, tmp_path):
    several = write("several", [0.9, 0.45, 0.1], [["awful"], [], ["fine"]])
    found = compare_scored_files(several, several, "mood", top=1)
    assert "novelty" not in found and found["labels"]["log"]["awful"]["share"] == pytest.approx(1 / 3)
    assert found["worth_labelling"][0]["row"] == 1 and found["worth_labelling"][0]["unsure"] == pytest.approx(0.9)
    values = tmp_path / "values.parquet"
    pq.write_table(pa.table({"mood_values": [{"size": 1.0}, None, {"size": 3.0}]}), values)
    found = compare_scored_files(values, values, "mood")
    assert found["rows"]["log"] == 2 and "labels" not in found and found["scores"]["size"]["log"][5] == 2


def test_files_that_cannot_be_compared(write, tmp_path):
    log = write("log", [0.1, 0.9])
    other = write("other", [0.1, 0.9], labels_of=("good", "bad"))
    empty = write("empty", [0.1, 0.9], novelty=pa.array([None, None], pa.float32()))
    (tmp_path / "text.parquet").write_text("no parquet")
    for words, reference, head in (
        ("good, bad", other, "mood"),
        ("reads something", empty, "mood"),
        ("no scores of 'guard'", log, "guard"),
        ("cannot be read", tmp_path / "text.parquet", "mood"),
        ("cannot be read", tmp_path / "nowhere", "mood"),
    ):
        with pytest.raises(ProbeError, match=words):
            compare_scored_files(reference, log, head)
