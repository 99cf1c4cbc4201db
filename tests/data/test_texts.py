"""Labelled rows from files and folders."""

import gzip
import json
import os

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from llama_probe import ProbeError
from llama_probe.data.sources import DataSources
from llama_probe.data.texts import read_labelled


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        elif name.endswith((".csv", ".tsv")):
            sep = "," if name.endswith(".csv") else "\t"
            lines = [sep.join(rows[0])] + [sep.join(str(value) for value in row.values()) for row in rows]
            path.write_text("\n".join(lines) + "\n")
        elif name.endswith(".parquet"):
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(path)

    return write


ROWS = [
    {"text": "one", "label": 0, "kind": "x"},
    {"text": "two", "label": 2, "kind": "y"},
    {"text": "three", "label": 1, "kind": "x"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_formats(write, name):
    rows = read_labelled(write(ROWS, name))
    assert rows.texts == ["one", "two", "three"] and rows.labels.tolist() == [0, 2, 1]
    assert rows.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert rows.columns == {"kind": ["x", "y", "x"]}
    assert rows.problem_type == "single_label_classification"


@pytest.mark.parametrize("name", ["rows[1].jsonl", "a [b]/rows (2)*.csv"])
def test_paths_are_taken_as_they_are(write, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    path = write(ROWS, name)
    write(ROWS[:1], name.replace("*", " and more").replace("[1]", "1"))
    assert read_labelled(path).texts == ["one", "two", "three"]


def test_texts_of_a_csv_stay_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,ask\n007,None,1.0\nNone,NA,NA\n1e3,None,x\n", encoding="utf-8")
    rows = read_labelled(str(tmp_path / "a.csv"))
    assert rows.texts == ["007", "None", "1e3"]
    assert rows.label_names == ["NA", "None"] and rows.labels.tolist() == [1, 0, 1]
    replies = read_labelled(str(tmp_path / "a.csv"), prompt_column="ask").texts
    assert [[message["content"] for message in reply] for reply in replies] == [
        ["1.0", "007"],
        ["NA", "None"],
        ["x", "1e3"],
    ]


def test_texts_that_a_csv_takes_for_numbers(write):
    assert read_labelled(write([{"text": 12, "label": 0}, {"text": 7, "label": 1}], "a.csv")).texts == ["12", "7"]


def test_a_folder_is_read_as_its_files_are(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("train.csv", "train.tsv"):
        lines = "text,label\n007,None\n1e3,some\n".replace(",", "\t" if name == "train.tsv" else ",")
        (tmp_path / "a" / name).write_text(lines, encoding="utf-8")
        for folder in (tmp_path / "a", tmp_path / "a" / name):
            rows = read_labelled(str(folder))
            assert (rows.texts, rows.label_names, rows.labels.tolist()) == (["007", "1e3"], ["None", "some"], [0, 1])
        (tmp_path / "a" / name).unlink()


def test_a_csv_with_a_column_that_changes_late(write):
    rows = [{"id": i if i < 11_000 else f"A{i}", "text": f"t{i}", "label": i % 2} for i in range(11_500)]
    found = read_labelled(write(rows, "a.csv"))
    assert found.texts[-1] == "t11499" and found.labels[-2:].tolist() == [0, 1] and found.columns["id"][-1] == "A11499"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "folder/train.csv"])
def test_whole_numbers_of_more_than_64_bits_are_texts(write, tmp_path, name):
    (tmp_path / "folder").mkdir()
    rows = [{"id": 10**20 + i, "text": f"t{i}", "label": i % 2, "size": i, "part": i / 2} for i in range(4)]
    path = write(rows, name)
    found = read_labelled(path if "/" not in name else str(tmp_path / "folder"))
    assert found.columns == {
        "id": [str(10**20 + i) for i in range(4)],
        "size": [0, 1, 2, 3],
        "part": [0, 0.5, 1, 1.5],
    }
    assert found.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "folder/train.csv"])
def test_columns_that_are_there_twice(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("text,label,text\na,0,b\n".replace(",", "\t" if name == "a.tsv" else ","))
    source = str(path if path.parent == tmp_path else path.parent)
    with pytest.raises(ProbeError, match=f"{path.name} has 2 columns 'text': leave one"):
        read_labelled(source)


def test_a_file_in_the_place_of_another(write):
    for count in (3, 2):
        path = write(ROWS[:count])
        os.utime(path, (10**9, 10**9))
        assert len(read_labelled(path)) == count
        assert len(read_labelled(os.path.dirname(path))) == count


def test_names_of_the_data_set_are_matched_with_those_that_are_known(tmp_path):
    def write(name, labels, feature):
        features = Features({"text": Value("string"), "label": feature})
        rows = {"text": [f"t{i}" for i in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    path = write("a.parquet", [0, 0, 1], ClassLabel(names=["pos", "neg"]))
    assert read_labelled(path).label_names == ["pos", "neg"]
    for names, expected in (["neg", "pos"], [1, 1, 0]), (["neg", "so so", "pos"], [2, 2, 0]), (["a", "b"], [0, 0, 1]):
        rows = read_labelled(path, label_names=names)
        assert (rows.label_names, rows.labels.tolist()) == (names, expected)
    with pytest.raises(ProbeError, match="labels pos, neg of the data cannot be read as a, b, c"):
        read_labelled(path, label_names=["a", "b", "c"])
    several = write("b.parquet", [[0], [0, 1]], List(ClassLabel(names=["pos", "neg"])))
    assert read_labelled(several, label_names=["neg", "pos"]).labels.tolist() == [[0, 1], [1, 1]]
    assert read_labelled(path, problem_type="regression").labels.tolist() == [[0], [0], [1]]


def test_texts_that_are_none(write):
    with pytest.raises(
        ProbeError, match=r"the text of row 0 is .*'one'.*; it must be a text, or a list of chat messages"
    ):
        read_labelled(write([{"text": ["one"], "label": 0}]))


def test_the_reason_of_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,0\n".encode("latin-1"))
    with pytest.raises(ProbeError, match="codec can't decode byte 0xe9"):
        read_labelled(str(tmp_path / "a.csv"))


def test_a_digest_is_of_texts_and_labels(write):
    rows = read_labelled(write(ROWS))
    assert rows.digest() == read_labelled(write(ROWS, "b.csv")).digest()
    others = {rows.select([1, 0, 2]).digest(), rows.select([0, 1]).digest(), rows.renamed(["a", "b", "c"]).digest()}
    assert len(others | {rows.digest()}) == 4


def test_a_folder_with_splits(write, tmp_path):
    write(ROWS, "data/train.jsonl")
    write(ROWS[:1], "data/test.jsonl")
    assert len(read_labelled(str(tmp_path / "data"), split="test")) == 1
    with pytest.raises(ProbeError, match="has no split 'validation'; it has: train, test"):
        read_labelled(str(tmp_path / "data"), split="validation")


def test_own_columns_and_names(write):
    path = write([{"q": "a", "y": "spam"}, {"q": "b", "y": "ham"}])
    rows = read_labelled(path, "q", "y")
    assert rows.label_names == ["ham", "spam"] and rows.labels.tolist() == [1, 0]
    assert read_labelled(path, "q", "y", ["spam", "ham"]).labels.tolist() == [0, 1]


def test_several_labels_and_values(write):
    rows = read_labelled(write([{"text": "a", "label": [0, 2]}, {"text": "b", "label": []}]))
    assert rows.problem_type == "multi_label_classification"
    assert rows.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    values = read_labelled(write([{"text": "a", "label": 0.5}, {"text": "b", "label": 2.0}]))
    assert values.problem_type == "regression" and values.labels.tolist() == [[0.5], [2.0]]


def test_splits_are_even_and_keep_equal_texts_together(write):
    rows = [{"text": f"t{i % 80}", "label": int(i % 80 % 4 == 0)} for i in range(100)]
    data = read_labelled(write(rows))
    large, small = data.split(0.25, seed=1)
    assert len(large) + len(small) == 100 and not set(large.texts) & set(small.texts)
    assert abs(np.mean(small.labels) - 0.25) < 0.08
    again = data.split(0.25, seed=1)[1]
    assert again.texts == small.texts and data.split(0.25, seed=2)[1].texts != small.texts


def test_a_label_of_one_text_stays_in_the_larger_part(write):
    rows = read_labelled(write([{"text": f"no {i}", "label": "rare" if i == 7 else "ab"[i % 2]} for i in range(40)]))
    inside, outside = rows.split(0.2, seed=0)
    assert "no 7" in inside.texts and len(outside) == 8
    assert outside.labels.tolist().count(0) == outside.labels.tolist().count(1)


@pytest.mark.parametrize(
    "rows, kwargs, words",
    [
        (ROWS, {"text_column": "body"}, "has no column 'body'; it has: text, label, kind"),
        (ROWS, {"label_names": ["a", "b"]}, "labels go from 0 to 2, but there are 2 names"),
        ([{"text": "a", "label": "x"}], {"label_names": ["y"]}, r"labels without a name: \['x'\]"),
        ([{"text": " ", "label": 1}], {}, "row 0 has no text"),
        (ROWS, {"label_column": "text"}, "text and text: texts, prompts and labels stand in columns of their own"),
        (ROWS, {"prompt_column": "text"}, "stand in columns of their own"),
        ([{"text": "a", "label": None}, {"text": "b", "label": 1}], {}, "row 0 has no text or no label"),
        ([{"text": "a", "label": -1}], {"label_names": ["a"]}, "labels go from -1"),
        ([{"text": "a", "label": [1]}], {"problem_type": "single_label_classification"}, "labels are lists"),
    ],
)
def test_wrong_rows(write, rows, kwargs, words):
    with pytest.raises(ProbeError, match=words):
        read_labelled(write(rows), **kwargs)


def test_wrong_sources(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ProbeError, match=r"is of no known format; allowed: \.json"):
        read_labelled(str(tmp_path / "a.txt"))
    with pytest.raises(ProbeError, match="cannot be read as a file, a folder or a Hub data set"):
        read_labelled(str(tmp_path / "nowhere"))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ProbeError, match="cannot be read"):
        read_labelled(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "folder/train.jsonl"])
@pytest.mark.parametrize("encoding, byte", [("cp1252", "0xe9"), ("utf-16", "0xff")])
def test_files_that_are_not_in_utf_8(tmp_path, name, encoding, byte):
    (tmp_path / "folder").mkdir()
    text = "text,label\ncafé,0\n" if name.endswith("csv") else '{"text": "café", "label": 0}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ProbeError, match=f"{byte}.*: save the file in UTF-8, or as parquet"):
        read_labelled(str(tmp_path / name.removesuffix("/train.jsonl")))


@pytest.mark.parametrize("name, text", [("a.jsonl", ""), ("a.csv", "text,label\n"), ("a.csv", "")])
def test_a_file_without_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ProbeError, match=rf"{name} holds no rows$"):
        read_labelled(str(tmp_path / name))


def test_paths_that_the_loader_does_not_find(tmp_path):
    with pytest.raises(ProbeError, match=r"there is no file .*a\.jsonl$"):
        read_labelled(str(tmp_path / "a.jsonl"))
    (tmp_path / "part[1]").mkdir()
    (tmp_path / "part[1]" / "train.jsonl").write_text('{"text": "a", "label": 0}')
    with pytest.raises(ProbeError, match=r"must have no \[ in its path"):
        read_labelled(str(tmp_path / "part[1]"))
    assert len(read_labelled(str(tmp_path / "part[1]" / "train.jsonl"))) == 1


def test_an_unknown_name_tells_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ProbeError, match=r"toxichat cannot be read .*known by name: toxicchat, wildguardmix, imdb, sst2"
    ):
        read_labelled("toxichat")
    with pytest.raises(ProbeError) as refused:
        read_labelled("someone/toxichat")
    assert "known by name" not in str(refused.value)


def test_whole_numbers_as_values(write):
    rows = read_labelled(write([{"text": "a", "label": 3}, {"text": "b", "label": 5}]), problem_type="regression")
    assert rows.labels.tolist() == [[3.0], [5.0]] and rows.labels.dtype == np.float32
    assert rows.label_names == ["value"] and rows.problem_type == "regression"
    with pytest.raises(ProbeError, match="regression labels must be numbers"):
        read_labelled(write([{"text": "a", "label": "many"}]), problem_type="regression")
    with pytest.raises(ProbeError, match="labels are lists, which is not regression"):
        read_labelled(write([{"text": "a", "label": [1.5, 2.5]}]), problem_type="regression")


def test_columns_named_text_and_label_beside_the_chosen_ones(write):
    rows = read_labelled(write([{"q": "a", "y": "n", "text": "other", "label": 7}]), "q", "y")
    assert rows.texts == ["a"] and rows.columns == {"text": ["other"], "label": [7]}


class TestSources:
    """What `DataSources` takes from a data set that is known by name."""

    @pytest.fixture
    def copies(self, tmp_path, write):
        def rows(split, **more):
            return [{"text": f"{split} {i}", "label": i % 2, **more} for i in range(20)]

        for split in ("train", "validation", "test"):
            write(rows(split), f"copies/emotion/{split}.jsonl")
        for split in ("train", "test"):
            write(rows(split, human_annotation=True, jailbreaking=0), f"copies/toxicchat/{split}.jsonl")
        write(rows("test"), "copies/xstest/test.jsonl")
        return tmp_path / "copies"

    def test_its_own_splits(self, copies):
        data = DataSources("emotion", data_dir=copies)
        assert (data.eval, data.test, data.slice_columns) == ("emotion:validation", "emotion:test", [])
        parts = data.read(seed=0)
        assert {name: rows.texts[0] for name, rows in parts.items()} == {
            "train": "train 0",
            "validation": "validation 0",
            "test": "test 0",
        }
        assert parts["train"].label_names == ["sadness", "joy", "love", "anger", "fear", "surprise"]

    def test_a_part_of_train_where_there_is_no_validation_split(self, copies):
        data = DataSources("toxicchat", data_dir=copies, validation_share=0.25)
        assert (data.eval, data.test, data.slice_columns) == (None, "toxicchat:test", ["human_annotation"])
        parts = data.read(seed=0)
        assert [len(parts[name]) for name in ("train", "validation", "test")] == [15, 5, 20]
        assert all(text.startswith("train") for text in parts["validation"].texts)

    def test_what_is_given_stays(self, copies, write):
        own = write(ROWS[:1], "own.jsonl")
        data = DataSources("emotion", eval=own, test="toxicchat", slice_columns=["jailbreaking"], data_dir=copies)
        assert (data.eval, data.test, data.slice_columns) == (own, "toxicchat", ["jailbreaking"])
        assert DataSources("emotion", validation_share=0.2, data_dir=copies).eval is None
        assert DataSources("emotion:test", data_dir=copies).test is None, "never the rows that are trained on"
        assert DataSources("emotion:validation", data_dir=copies).eval is None
        file = DataSources(own, test="toxicchat", data_dir=copies)
        assert (file.eval, file.slice_columns) == (None, ["human_annotation"])

    def test_labels_of_another_set_are_those_of_train(self, copies):
        parts = DataSources("toxicchat", test="xstest", data_dir=copies).read(seed=0)
        assert parts["test"].label_names == ["non-toxic", "toxic"] and parts["test"].labels.sum() == 10
        with pytest.raises(ProbeError, match="labels safe, unsafe of the data cannot be read as sadness, joy"):
            DataSources("emotion", test="xstest", data_dir=copies).read(seed=0)

    def test_own_columns_beside_a_name(self, copies, write):
        own = write([{"q": f"a {i}", "y": i % 2} for i in range(20)], "own.jsonl")
        parts = DataSources(own, test="toxicchat", text_column="q", label_column="y", data_dir=copies).read(seed=0)
        assert parts["train"].texts[0].startswith("a") and parts["test"].texts[0] == "test 0"
        with pytest.raises(ProbeError, match="toxicchat, toxicchat:test have their own columns"):
            DataSources("toxicchat", label_column="jailbreaking", data_dir=copies)

    def test_replies_beside_replies_known_by_name(self, copies, write):
        own = write([{"ask": f"q {i}", "text": f"a {i}", "label": i % 2} for i in range(20)], "own.jsonl")
        write([{"prompt": "Q", "response": "A", "text": "Q A", "label": 1}], "copies/beavertails/test.jsonl")
        parts = DataSources(own, test="beavertails", prompt_column="ask", data_dir=copies).read(seed=0)
        assert [turn["content"] for turn in parts["test"].texts[0]] == ["Q", "A"]
        write([{"text": "Q A", "label": 1}], "copies/beavertails/test.jsonl")
        with pytest.raises(
            ProbeError, match="the copy of beavertails:test has no column 'prompt'; it has: text, label"
        ):
            DataSources(own, test="beavertails:test", prompt_column="ask", data_dir=copies).read(seed=0)

    def test_a_copy_without_the_column_to_slice_by(self, copies, write):
        write(ROWS[:1], "copies/toxicchat/test.jsonl")
        data = DataSources("toxicchat", data_dir=copies)
        assert "test" in data.read(seed=0) and data.slice_columns == []

    def test_the_hub_without_copies(self):
        for name, evaluated, tested in (
            ("goemotions", "goemotions:validation", "goemotions:test"),
            ("sst2", None, "sst2:test"),
            ("imdb", None, "imdb:test"),
        ):
            data = DataSources(name)
            assert (data.eval, data.test) == (evaluated, tested)


def test_replies_with_their_prompts(write):
    path = write([{"q": "hi", "text": "ho", "label": 1}])
    rows = read_labelled(path, prompt_column="q")
    assert (
        rows.texts == [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]
        and not rows.columns
    )
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    rows = read_labelled(write([{"q": chat, "text": "b", "label": 0}]), prompt_column="q")
    assert rows.texts == [[*chat, {"role": "assistant", "content": "b"}]]
    assert read_labelled(write([{"q": 7, "text": "b", "label": 0}]), prompt_column="q").texts[0][0]["content"] == "7"
    for empty in ("", None):
        with pytest.raises(ProbeError, match="row 0 has no prompt"):
            read_labelled(write([{"q": empty, "text": "b", "label": 0}]), prompt_column="q")
    with pytest.raises(
        ProbeError, match=r"the prompt of row 0 is .*'hi'.*; it must be a text, or a list of chat messages"
    ):
        read_labelled(write([{"q": ["hi"], "text": "b", "label": 0}]), prompt_column="q")
    with pytest.raises(ProbeError, match="no column 'ask'"):
        read_labelled(path, prompt_column="ask")
    with pytest.raises(ProbeError, match="prompt_column are for files"):
        DataSources("imdb", prompt_column="q")
