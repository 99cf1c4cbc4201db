"""Labelled rows from files and folders."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from llama_probe import ProbeError
from llama_probe.data.sources import Source
from llama_probe.data.texts import LabelledTexts, Labels


def read(rows: str, names=None, kind=None, **fields) -> LabelledTexts:
    return Source(rows=rows, **fields).read(Labels(names=names, problem_type=kind))


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path, table = tmp_path / name, Dataset.from_list(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".csv", ".tsv"):
            table.to_csv(path, sep="," if path.suffix == ".csv" else "\t")
        else:
            (table.to_parquet if path.suffix == ".parquet" else table.to_json)(path)
        return str(path)

    return write


ROWS = [
    {"text": "one", "label": 0, "kind": "x"},
    {"text": "two", "label": 2, "kind": "y"},
    {"text": "three", "label": 1, "kind": "x"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_formats(write, name):
    rows = read(write(ROWS, name))
    assert rows.texts == ["one", "two", "three"] and rows.labels.tolist() == [0, 2, 1]
    assert rows.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert rows.columns["kind"] == ["x", "y", "x"]
    assert rows.problem_type == "single_label_classification"


@pytest.mark.parametrize("name", ["a.csv", "folder/train.csv", "folder/train.tsv"])
def test_texts_of_a_csv_file_stay_as_they_are(tmp_path, name):
    path, text = tmp_path / name, "text,label,ask\n007,None,1.0\nNone,NA,NA\n1e3,None,x\n"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text if name.endswith(".csv") else text.replace(",", "\t"))
    source = str(path.parent if "/" in name else path)
    rows = read(source)
    assert rows.texts == ["007", "None", "1e3"]
    assert rows.label_names == ["NA", "None"] and rows.labels.tolist() == [1, 0, 1]
    replies = read(source, prompt_column="ask").texts
    assert [reply[0]["content"] for reply in replies] == ["1.0", "NA", "x"]


def test_class_label_names_are_matched_with_those_given(tmp_path):
    def write(name, labels, feature):
        features = Features({"text": Value("string"), "label": feature})
        rows = {"text": [f"t{i}" for i in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    path = write("a.parquet", [0, 0, 1], ClassLabel(names=["pos", "neg"]))
    assert read(path).label_names == ["pos", "neg"]
    for names, expected in (["neg", "pos"], [1, 1, 0]), (["neg", "so so", "pos"], [2, 2, 0]), (["a", "b"], [0, 0, 1]):
        rows = read(path, names)
        assert (rows.label_names, rows.labels.tolist()) == (names, expected)
    with pytest.raises(ProbeError, match="pos, neg"):
        read(path, ["a", "b", "c"])
    several = write("b.parquet", [[0], [0, 1]], List(ClassLabel(names=["pos", "neg"])))
    assert read(several, ["neg", "pos"]).labels.tolist() == [[0, 1], [1, 1]]
    assert read(path, kind="regression").labels.tolist() == [[0], [0], [1]]


def test_a_digest_is_of_texts_and_labels(write):
    rows = read(write(ROWS))
    assert rows.digest() == read(write(ROWS, "b.csv")).digest()
    others = {rows.select([1, 0, 2]).digest(), rows.select([0, 1]).digest(), rows.renamed(["a", "b", "c"]).digest()}
    assert len(others | {rows.digest()}) == 4


def test_own_columns_and_names(write):
    path = write([{"q": "a", "y": "spam", "text": "x", "label": 7}, {"q": "b", "y": "ham", "text": "x", "label": 7}])
    columns = {"text_column": "q", "label_column": "y"}
    rows = read(path, **columns)
    assert rows.label_names == ["ham", "spam"] and rows.labels.tolist() == [1, 0]
    assert rows.columns["text"] == ["x", "x"] and rows.columns["label"] == [7, 7]
    assert read(path, ["spam", "ham"], **columns).labels.tolist() == [0, 1]


def test_splits_are_even_and_keep_equal_texts_together(write):
    rows = [{"text": f"t{i % 80}", "label": int(i % 80 % 4 == 0)} for i in range(100)]
    data = read(write(rows))
    large, small = data.split(0.25, seed=1)
    assert len(large) + len(small) == 100 and not set(large.texts) & set(small.texts)
    assert abs(np.mean(small.labels) - 0.25) < 0.08
    again = data.split(0.25, seed=1)[1]
    assert again.texts == small.texts and data.split(0.25, seed=2)[1].texts != small.texts


def test_a_label_of_one_text_stays_in_the_larger_part(write):
    rows = read(write([{"text": f"no {i}", "label": "rare" if i == 7 else "ab"[i % 2]} for i in range(40)]))
    inside, outside = rows.split(0.2, seed=0)
    assert "no 7" in inside.texts and len(outside) == 8
    assert outside.labels.tolist().count(0) == outside.labels.tolist().count(1)


@pytest.mark.parametrize(
    "rows, kwargs, named",
    [
        (ROWS, {"text_column": "body"}, "no column 'body'; it has: text, label, kind"),
        (ROWS, {"prompt_column": "body"}, "no column 'body'"),
        (ROWS, {"names": ["a", "b"]}, "'2'"),
        ([{"text": " ", "label": 1}], {}, "row 0 has no text"),
        ([{"text": ["one"], "label": 0}], {}, "row 0: .*must be a text"),
        ([{"text": "a", "label": None}, {"text": "b", "label": 1}], {}, "row 0 has no label"),
        (ROWS, {"prompt_column": "text"}, "prompt_column"),
    ],
)
def test_wrong_rows(write, rows, kwargs, named):
    with pytest.raises(ProbeError, match=named):
        read(write(rows), **kwargs)


def test_replies_with_their_prompts(write):
    def replies(prompt):
        return read(write([{"q": prompt, "text": "ho", "label": 1}]), prompt_column="q")

    reply = {"role": "assistant", "content": "ho"}
    assert replies("hi").texts == [[{"role": "user", "content": "hi"}, reply]] and "q" not in replies("hi").columns
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert replies(chat).texts == [[*chat, reply]]
    assert replies(7).texts[0][0]["content"] == "7"
    for wrong in ("", None, ["hi"]):
        with pytest.raises(ProbeError, match="row 0"):
            replies(wrong)
