"""Rows of a source: where they are found, which of them are taken, and what their labels are."""

from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from training_runs import write

from llama_probe import ProbeError
from llama_probe.data.known import BENCHMARKS
from llama_probe.data.labelled_texts import LabelledTexts, Labels
from llama_probe.data.row_sources import Source


def read(rows, names=None, problem_type=None, data_dir=None, split="train", **fields) -> LabelledTexts:
    """Read rows without the column that names their source."""
    found = Source(rows=str(rows), **fields).read(Labels(names=names, problem_type=problem_type), data_dir, split)
    assert set(found.columns.pop("source")) <= {Source(rows=str(rows), **fields).name}
    return found


ROWS = [{"text": "one", "label": label, "tone": "x"} for label in (0, 2, 1)]


class TestFiles:
    @pytest.mark.parametrize("name, source", [("a.csv", "a.csv"), ("folder/train.tsv", "folder")])
    def test_texts_of_a_csv_file_stay_as_they_are(self, tmp_path, name, source):
        path, text = tmp_path / name, "text,label,ask\n007,None,1.0\nNone,NA,NA\n1e3,None,x\n"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if name.endswith(".csv") else text.replace(",", "\t"))
        rows = read(tmp_path / source)
        assert rows.texts == ["007", "None", "1e3"]
        assert rows.label_names == ["NA", "None"] and rows.labels.tolist() == [1, 0, 1]
        asked = read(tmp_path / source, prompt_column="ask").texts
        assert [reply[0]["content"] for reply in asked] == ["1.0", "NA", "x"]

    def test_replies_with_their_prompts(self, tmp_path):
        def replies(prompt):
            rows = [{"q": prompt, "text": "ho", "label": 1}]
            return read(write(tmp_path / "a.jsonl", rows), prompt_column="q")

        reply = {"role": "assistant", "content": "ho"}
        assert replies("hi").texts == [[{"role": "user", "content": "hi"}, reply]] and not replies("hi").columns
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
        assert replies(chat).texts == [[*chat, reply]] and replies(7).texts[0][0]["content"] == "7"
        for wrong in ("", None, ["hi"]):
            with pytest.raises(ProbeError, match="row 0"):
                replies(wrong)

    def test_class_label_names_are_matched_with_those_given(self, tmp_path):
        def write_parquet(name, labels, feature):
            features = Features({"text": Value("string"), "label": feature})
            Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features).to_parquet(tmp_path / name)
            return tmp_path / name

        path = write_parquet("a.parquet", [0, 0, 1], ClassLabel(names=["pos", "neg"]))
        assert read(path).label_names == ["pos", "neg"]
        named = (["neg", "pos"], [1, 1, 0]), (["neg", "so so", "pos"], [2, 2, 0]), (["a", "b"], [0, 0, 1])
        for names, expected in named:
            rows = read(path, names)
            assert (rows.label_names, rows.labels.tolist()) == (names, expected)
        with pytest.raises(ProbeError, match="pos, neg"):
            read(path, ["a", "b", "c"])
        several = write_parquet("b.parquet", [[0], [0, 1]], List(ClassLabel(names=["pos", "neg"])))
        assert read(several, ["neg", "pos"]).labels.tolist() == [[0, 1], [1, 1]]
        assert read(path, problem_type="regression").labels.tolist() == [[0], [0], [1]]

    @pytest.mark.parametrize(
        "rows, fields, named",
        [
            (ROWS, {"text_column": "body"}, "no column 'body'; it has: text, label, tone"),
            (ROWS, {"prompt_column": "body"}, "no column 'body'"),
            (ROWS, {"names": ["a", "b"]}, "'2'"),
            ([{"text": " ", "label": 1}], {}, "row 0 has no text"),
            ([{"text": ["one"], "label": 0}], {}, "row 0: .*must be a text"),
            ([{"text": "a", "label": None}, {"text": "b", "label": 1}], {}, "row 0 has no label"),
            (ROWS, {"label_map": {"0": "harmful"}}, "'2' is not in label_map"),
            (ROWS, {"label": "bad", "names": ["a", "b"]}, "bad"),
            (ROWS, {"where": {"tone": ["z"]}}, "no rows where"),
            (ROWS, {"where": {"from": ["x"]}}, "'from'"),
        ],
    )
    def test_wrong_rows(self, tmp_path, rows, fields, named):
        with pytest.raises(ProbeError, match=named):
            read(write(tmp_path / "a.jsonl", rows), **fields)


TONES, TERMS = ("yes", "no", "unsure"), ("MIT", "CC BY-NC 4.0")
ASKED = [{"q": f"text {i}", "tone": TONES[i % 3], "of": "ab"[i % 2], "terms": TERMS[i % 2]} for i in range(30)]
MAPPED = {"label_column": "tone", "label_map": {"yes": "harmful", "no": "harmless", "unsure": None}}
HARM = Labels(names=["harmless", "harmful"], flagged=["harmful"])
SEVERAL = Labels(names=["x", "y"], problem_type="multi_label_classification")


class TestChoice:
    @pytest.fixture
    def take(self, tmp_path):
        place = str(write(tmp_path / "a.jsonl", ASKED))

        def take(labels=HARM, seed=0, commercial=False, **fields):
            counted = Counter() if commercial else None
            return Source(rows=place, text_column="q", **fields).read(labels, seed=seed, not_commercial=counted)

        return take

    def test_labels_are_mapped_and_rows_left_out(self, take):
        rows = take(**MAPPED)
        assert rows.labels.tolist() == [1, 0] * 10 and set(rows.columns["of"]) == {"a", "b"}
        rows = take(**MAPPED, where={"of": ["a"], "tone": ["yes", "no"]})
        assert len(rows) == 10 and set(rows.columns["of"]) == {"a"}
        others = take(label_column="tone", label_map={"no": "harmless", "*": "harmful"})
        assert others.labels.tolist() == [1, 0, 1] * 10
        assert len(take(label_column="tone", label_map={"no": "harmless", "*": None})) == 10

    def test_all_rows_of_one_label(self, take):
        assert set(take(label="harmful").labels.tolist()) == {1}
        assert take(SEVERAL, label=["y"]).labels.tolist() == [[0, 1]] * 30
        assert take(SEVERAL, label=[]).labels.sum() == 0

    def test_labels_that_nobody_gave_are_not_known(self, take):
        labels = take(SEVERAL, label=["y"], known_labels=["y"]).labels
        assert np.isnan(labels[:, 0]).all() and (labels[:, 1] == 1).all()
        for labels, label, known in ((SEVERAL, ["y"], "z"), (SEVERAL, ["y"], "x"), (HARM, "harmful", "harmful")):
            with pytest.raises(ProbeError, match="known_labels"):
                take(labels, label=label, known_labels=[known])

    def test_the_place_of_a_request_in_its_text(self, tmp_path):
        chat = [{"role": "tool", "content": "x go"}, {"role": "user", "content": "Well?"}]
        lines = [
            {"text": "Dear all, go home.", "asks": "go"},
            {"text": chat, "asks": "go"},
            {"text": "No.", "asks": "go"},
        ]
        lines.append({"text": "Hello.", "asks": None})
        source = Source(rows=write(tmp_path / "b.jsonl", lines), label="harmful", request_column="asks")
        assert source.read(HARM).places == [(0, 10, 12), (0, 2, 4), None, None]

    def test_parts_share_no_text(self, take):
        first, rest = (set(take(**MAPPED, part=part).texts) for part in ([0, 0.6], [0.6, 1]))
        assert len(first) + len(rest) == 20 and not first & rest and len(first) > len(rest)

    def test_limits(self, take):
        first, again, other = (take(**MAPPED, max_rows=7, seed=seed).texts for seed in (3, 3, 4))
        assert first == again != other and len(first) == 7

    def test_rows_without_a_licence_for_commercial_use_are_left_out(self, take):
        assert len(take(**MAPPED, licence_column="terms")) == 20
        assert len(take(**MAPPED, licence_column="terms", commercial=True)) == 10
        for licence in ("MIT", "cc-by-4.0", "odc-by", "Apache-2.0"):
            assert len(take(**MAPPED, licence=licence, commercial=True)) == 20
        for licence in ("cc-by-nc-4.0", "CC BY-NC 4.0", "for research purposes", "unknown", None):
            assert len(take(**MAPPED, licence=licence, commercial=True)) == 0


class TestLocalCopies:
    @pytest.fixture
    def copies(self, tmp_path):
        folder = tmp_path / "copies"
        rows = [{"id": "a", "text": "fine", "label": 1}, {"id": "b", "text": "dull", "label": 0}]
        write(folder / "sst2" / "train.jsonl.gz", rows)
        write(folder / "sst2" / "train_sentences.jsonl.gz", rows[:1])
        write(folder / "goemotions" / "test.jsonl.gz", [{"id": "x", "text": "wow", "label": [0, 27]}])
        cells = [("a", "harmful"), (None, "harmful"), ("b", None), ("c", " ")]  # the last three are skipped
        write(folder / "wildguardmix" / "train.jsonl.gz", [{"text": text, "label": label} for text, label in cells])
        write(folder / "xstest" / "test.jsonl", [{"prompt": "a", "label": "unsafe", "type": "x"}])
        write(folder / "beavertails" / "train.jsonl", [{"prompt": "a", "text": "b", "label": 1}])
        write(folder / "emotion" / "train.jsonl", [{"text": "a", "label": 9}])
        write(folder / "prompts" / "train.jsonl", ASKED)
        write(folder / "prompts" / "more.jsonl", ASKED[:10])
        (folder / "sst2" / "notes.md").write_text("not a split")
        return folder

    def test_of_data_sets_known_by_name(self, copies):
        rows = read("sst2", data_dir=copies)
        assert rows.texts == ["fine", "dull"] and rows.labels.tolist() == [1, 0]
        assert rows.label_names == ["negative", "positive"] and rows.columns == {"id": ["a", "b"]}
        assert read("sst2:train_sentences", data_dir=str(copies)).texts == ["fine"]
        assert read("goemotions:test", data_dir=copies).labels.nonzero()[1].tolist() == [0, 27]
        assert read("wildguardmix", data_dir=copies).labels.tolist() == [1], "names of labels do as well"
        with pytest.raises(ProbeError, match="'response'"):
            read("beavertails", data_dir=copies, prompt_column="prompt")
        rows = read("xstest", split="test", data_dir=copies)
        assert rows.texts == ["a"] and rows.labels.tolist() == [1] and rows.columns == {"type": ["x"]}

    def test_of_hub_data_sets(self, copies):
        asked = {"text_column": "q", **MAPPED}
        source = Source(rows="someone/prompts@abc:main:train", **asked)
        assert source.name == "prompts" and source.find() is source, "nothing is asked of the Hub yet"
        assert len(source.read(HARM, copies)) == len(Source(rows="prompts", **asked).read(HARM, copies)) == 20
        assert len(Source(rows="someone/prompts::more", name="m", **asked).read(HARM, copies)) == 7
        assert len(Source(rows="someone/prompts", **asked).read(HARM, copies, "more")) == 7, "the split asked for"
        everything = Source(rows="someone/prompts", **asked).read(HARM, copies, "all")
        assert len(everything) == 20, "copies need no file of all splits"

    def test_fields_that_differ_in_copies(self, copies):
        local = {"rows": "prompts", "name": "theirs", "text_column": "q", "where": {"of": ["b"]}}
        source = Source(rows="someone/all", name="mine", text_column="prompt", label="harmful", local=local)
        rows = source.read(HARM, copies)
        assert len(rows) == 15 and set(rows.columns["source"]) == {"mine"} and set(rows.columns["of"]) == {"b"}

    @pytest.mark.parametrize(
        "source, named",
        [
            ("sst2:validation", "no split 'validation'; it has: train, train_sentences"),
            ("someone/prompts::test", "no split 'test', but more, train"),
            ("imdb", "DIR/imdb/SPLIT.jsonl.gz"),
            ("emotion", "'9'"),
            ("rows.csv", "rows.csv"),
        ],
    )
    def test_wrong_copies(self, copies, source, named):
        with pytest.raises(ProbeError, match=named):
            read(source, data_dir=copies)

    def test_a_name_alone_needs_a_folder_of_copies(self):
        with pytest.raises(ProbeError, match=r"known by name: toxicchat, .*--data-dir.*prompts/SPLIT"):
            Source(rows="prompts").find()


VOTES = {
    "text_type": ["user_message"] * 4 + ["llm_response"],
    "labels_0": ["Safe", "Threat", "Safe", None, "Safe"],
    "labels_1": ["Violence", "Needs Caution", None, "None", "Safe"],
}
BEAVERS = {"prompt": ["Q", "Q"], "response": ["A", "B"], "is_safe": [True, False], "category": [{}, {}]}
# Columns of data sets on the Hub, and the texts and labels that come of them.
ON_HUB = {
    "wildguardmix": ({"prompt": ["a", None], "prompt_harm_label": ["harmful", None]}, ["a", None], ["harmful", None]),
    "openai_moderation": ({"prompt": list("abc"), "S": [0, 0, None], "V2": [0, 1, None]}, list("abc"), [0, 1, 0]),
    "aegis": ({"text": list("abcde"), **VOTES}, list("abcde"), [1, 1, 0, None, None]),
    "beavertails": (BEAVERS, ["User: Q\n\nAssistant: A", "User: Q\n\nAssistant: B"], [0, 1]),
    "beavertails_prompts": (BEAVERS, ["Q", "Q"], [0, 1]),
}


class TestDataSetsKnownByName:
    def test_names_and_paths(self, tmp_path, monkeypatch, caplog):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "imdb" / "train.jsonl", [{"text": "my own", "label": "x"}])
        write(tmp_path / "copies" / "imdb" / "train.jsonl", [{"text": "known", "label": 1}])
        assert read("./imdb").texts == ["my own"] and not caplog.records
        write(tmp_path / "imdb" / "test.jsonl", [{"text": "another", "label": "x"}])
        assert read("./imdb::test", data_dir="copies").texts == ["another"] == read(f"{tmp_path}/imdb::test").texts
        write(tmp_path / "c++.jsonl", [{"text": "my own", "label": "x"}])
        assert Source(rows="c++.jsonl").name == "c__", "a plus joins names"
        assert read("imdb", data_dir="copies").texts == ["known"] and "./imdb" in caplog.text

    def test_they_keep_their_columns(self):
        source = Source(rows="toxicchat")
        assert source.licence == "cc-by-nc-4.0" and "ToxicChat" in source.note
        for fields in ({"label_column": "jailbreaking"}, {"prompt_column": "question"}):
            with pytest.raises(ProbeError, match="text_column, label_column"):
                Source(rows="toxicchat", **fields)

    @pytest.mark.parametrize("name", ON_HUB)
    def test_rows_as_they_are_on_the_hub(self, name):
        columns, texts, labels = ON_HUB[name]
        table = BENCHMARKS[name].convert(columns)
        assert (table.pop("text"), table.pop("label")) == (texts, labels)
        assert table == {column: columns[column] for column in BENCHMARKS[name].columns if column in columns}
