"""Rows of a source: where they are found, which of them are taken, and what their labels are."""

from typing import get_args

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from llama_probe import ProbeError
from llama_probe.data.known import BENCHMARKS, find_benchmark
from llama_probe.data.labelled_texts import LabelledTexts, Labels
from llama_probe.data.row_sources import Source, allows_commercial_use
from llama_probe.heads.rules import ProblemType


def read(rows, names=None, kind=None, data_dir=None, split="train", **fields) -> LabelledTexts:
    """Read rows without the column that names their source."""
    found = Source(rows=str(rows), **fields).read(Labels(names=names, problem_type=kind), data_dir, split)
    assert set(found.columns.pop("source")) <= {Source(rows=str(rows), **fields).name}
    return found


def write(path, rows):
    """Write rows in the format of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows)
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="," if path.suffix == ".csv" else "\t")
    else:
        (table.to_parquet if path.suffix == ".parquet" else table.to_json)(path)
    return path


ROWS = [
    {"text": "one", "label": 0, "kind": "x"},
    {"text": "two", "label": 2, "kind": "y"},
    {"text": "three", "label": 1, "kind": "x"},
]


class TestFiles:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
    def test_formats(self, tmp_path, name):
        rows = read(write(tmp_path / name, ROWS))
        assert rows.texts == ["one", "two", "three"] and rows.labels.tolist() == [0, 2, 1]
        assert rows.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"] and rows.columns == {"kind": ["x", "y", "x"]}
        assert rows.problem_type == "single_label_classification"

    @pytest.mark.parametrize("name", ["a.csv", "folder/train.csv", "folder/train.tsv"])
    def test_texts_of_a_csv_file_stay_as_they_are(self, tmp_path, name):
        path, text = tmp_path / name, "text,label,ask\n007,None,1.0\nNone,NA,NA\n1e3,None,x\n"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if name.endswith(".csv") else text.replace(",", "\t"))
        source = path.parent if "/" in name else path
        rows = read(source)
        assert rows.texts == ["007", "None", "1e3"]
        assert rows.label_names == ["NA", "None"] and rows.labels.tolist() == [1, 0, 1]
        assert [reply[0]["content"] for reply in read(source, prompt_column="ask").texts] == ["1.0", "NA", "x"]

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
        def write(name, labels, feature):
            features = Features({"text": Value("string"), "label": feature})
            rows = {"text": [f"t{i}" for i in range(len(labels))], "label": labels}
            Dataset.from_dict(rows, features).to_parquet(tmp_path / name)
            return tmp_path / name

        path = write("a.parquet", [0, 0, 1], ClassLabel(names=["pos", "neg"]))
        assert read(path).label_names == ["pos", "neg"]
        named = (["neg", "pos"], [1, 1, 0]), (["neg", "so so", "pos"], [2, 2, 0]), (["a", "b"], [0, 0, 1])
        for names, expected in named:
            rows = read(path, names)
            assert (rows.label_names, rows.labels.tolist()) == (names, expected)
        with pytest.raises(ProbeError, match="pos, neg"):
            read(path, ["a", "b", "c"])
        several = write("b.parquet", [[0], [0, 1]], List(ClassLabel(names=["pos", "neg"])))
        assert read(several, ["neg", "pos"]).labels.tolist() == [[0, 1], [1, 1]]
        assert read(path, kind="regression").labels.tolist() == [[0], [0], [1]]

    @pytest.mark.parametrize(
        "rows, fields, named",
        [
            (ROWS, {"text_column": "body"}, "no column 'body'; it has: text, label, kind"),
            (ROWS, {"prompt_column": "body"}, "no column 'body'"),
            (ROWS, {"prompt_column": "text"}, "prompt_column"),
            (ROWS, {"names": ["a", "b"]}, "'2'"),
            ([{"text": " ", "label": 1}], {}, "row 0 has no text"),
            ([{"text": ["one"], "label": 0}], {}, "row 0: .*must be a text"),
            ([{"text": "a", "label": None}, {"text": "b", "label": 1}], {}, "row 0 has no label"),
            (ROWS, {"label_map": {"0": "harmful"}}, "'1' is not in label_map"),
            (ROWS, {"label": "bad", "names": ["a", "b"]}, "bad"),
            (ROWS, {"where": {"kind": ["z"]}}, "no rows where"),
            (ROWS, {"where": {"from": ["x"]}}, "'from'"),
        ],
    )
    def test_wrong_rows(self, tmp_path, rows, fields, named):
        with pytest.raises(ProbeError, match=named):
            read(write(tmp_path / "a.jsonl", rows), **fields)


KINDS, TERMS = ("yes", "no", "unsure"), ("MIT", "CC BY-NC 4.0")
ASKED = [{"q": f"text {i}", "kind": KINDS[i % 3], "of": "ab"[i % 2], "terms": TERMS[i % 2]} for i in range(30)]
MAPPED = {
    "text_column": "q",
    "label_column": "kind",
    "label_map": {"yes": "harmful", "no": "harmless", "unsure": None},
}
HARM = Labels(names=["harmless", "harmful"], flagged=["harmful"])


class TestChoice:
    @pytest.fixture
    def place(self, tmp_path):
        return str(write(tmp_path / "a.jsonl", ASKED))

    def test_labels_are_mapped_and_rows_left_out(self, place):
        rows = Source(rows=place, **MAPPED).read(HARM)
        assert rows.labels.tolist() == [1, 0] * 10 and set(rows.columns["of"]) == {"a", "b"}

    def test_all_rows_of_one_label(self, place):
        assert set(Source(rows=place, text_column="q", label="harmful").read(HARM).labels.tolist()) == {1}
        several = Labels(names=["x", "y"], problem_type="multi_label_classification")
        assert Source(rows=place, text_column="q", label=["y"]).read(several).labels.tolist() == [[0, 1]] * 30
        assert Source(rows=place, text_column="q", label=[]).read(several).labels.sum() == 0

    def test_labels_that_nobody_gave_are_not_known(self, place):
        several = Labels(names=["x", "y"], problem_type="multi_label_classification")
        rows = Source(rows=place, text_column="q", label=["y"], known_labels=["y"]).read(several)
        assert np.isnan(rows.labels[:, 0]).all() and (rows.labels[:, 1] == 1).all()
        for labels, known in ((several, ["z"]), (several, ["x"]), (HARM, ["harmful"])):
            with pytest.raises(ProbeError, match="known_labels"):
                label = "harmful" if labels is HARM else ["y"]
                Source(rows=place, text_column="q", label=label, known_labels=known).read(labels)

    def test_where(self, place):
        rows = Source(rows=place, **MAPPED, where={"of": ["a"], "kind": ["yes", "no"]}).read(HARM)
        assert len(rows) == 10 and set(rows.columns["of"]) == {"a"}

    def test_parts_share_no_text(self, place):
        parts = [Source(rows=place, **MAPPED, part=part).read(HARM) for part in ([0, 0.6], [0.6, 1])]
        texts = [set(rows.texts) for rows in parts]
        assert len(texts[0]) + len(texts[1]) == 20 and not texts[0] & texts[1] and len(texts[0]) > len(texts[1])

    def test_limits(self, place):
        first, again, other = (Source(rows=place, **MAPPED, max_rows=7).read(HARM, seed=i).texts for i in (3, 3, 4))
        assert first == again != other and len(first) == 7

    @pytest.mark.parametrize(
        "licence, allowed",
        [("MIT", True), ("cc-by-4.0", True), ("odc-by", True), ("Apache-2.0", True), ("cc-by-nc-4.0", False),
         ("CC BY-NC 4.0: non-commercial", False), ("for research purposes", False), ("unknown", False), (None, False)],
    )  # fmt: skip
    def test_licences(self, licence, allowed):
        assert allows_commercial_use(licence) == allowed

    def test_rows_without_a_licence_for_commercial_use_are_left_out(self, place):
        by_row = Source(rows=place, **MAPPED, licence_column="terms")
        assert len(by_row.read(HARM)) == 20 and len(by_row.read(HARM, commercial=True)) == 10
        sources = (Source(rows=place, **MAPPED, licence=licence) for licence in ("MIT", "cc-by-nc-4.0", None))
        assert [len(source.read(HARM, commercial=True)) for source in sources] == [20, 0, 0]


class TestLocalCopies:
    @pytest.fixture
    def copies(self, tmp_path):
        folder = tmp_path / "copies"
        rows = [{"id": "a", "text": "fine", "label": 1}, {"id": "b", "text": "dull", "label": 0}]
        write(folder / "sst2" / "train.jsonl.gz", rows)
        write(folder / "sst2" / "train_sentences.jsonl.gz", rows[:1])
        write(folder / "goemotions" / "test.jsonl.gz", [{"id": "x", "text": "wow", "label": [0, 27]}])
        write(folder / "wildguardmix" / "train.jsonl.gz", [{"text": "a", "label": "harmful"}])
        write(folder / "xstest" / "test.jsonl", [{"prompt": "a", "label": "unsafe", "type": "x"}])
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
        rows = read("xstest", split="test", data_dir=copies)
        assert rows.texts == ["a"] and rows.labels.tolist() == [1] and rows.columns == {"type": ["x"]}

    def test_of_hub_data_sets(self, copies):
        source = Source(rows="someone/prompts@abc:main:train", **MAPPED)
        assert source.name == "prompts" and source.find() is source, "nothing is asked of the Hub yet"
        assert len(source.read(HARM, copies)) == len(Source(rows="prompts", **MAPPED).read(HARM, copies)) == 20
        assert len(Source(rows="someone/prompts::more", name="m", **MAPPED).read(HARM, copies)) == 7

    def test_fields_that_differ_in_copies(self, copies):
        local = {"rows": "prompts", "text_column": "q", "where": {"of": ["b"]}}
        source = Source(rows="someone/all", name="mine", text_column="prompt", label="harmful", local=local)
        rows = source.read(HARM, copies)
        assert len(rows) == 15 and set(rows.columns["source"]) == {"mine"} and set(rows.columns["of"]) == {"b"}

    @pytest.mark.parametrize(
        "source, named",
        [
            ("sst2:validation", "no split 'validation'; it has: train, train_sentences"),
            ("someone/prompts::test", "no split 'test', but more, train"),
            ("imdb", "DIR/imdb/SPLIT.jsonl.gz"),
            ("someone/other", "DIR/other/SPLIT.jsonl.gz"),
            ("emotion", "'9'"),
            ("rows.csv", "rows.csv"),
        ],
    )
    def test_wrong_copies(self, copies, source, named):
        with pytest.raises(ProbeError, match=named):
            read(source, data_dir=copies)

    def test_a_name_alone_needs_a_folder_of_copies(self):
        with pytest.raises(ProbeError, match=r"--data-dir.*prompts/SPLIT"):
            Source(rows="prompts").find()


def wildguard(prompt, label):
    return {"prompt": prompt, "adversarial": False, "prompt_harm_label": label, "subcategory": "benign"}


def aegis(text, *votes, kind="user_message"):
    padded = dict(zip([f"labels_{i}" for i in range(5)], [*votes, *["None"] * 5], strict=False))
    return {"id": text, "text": text, "text_type": kind, "num_annotations": len(votes), **padded}


BEAVERS = [
    {"prompt": "Q", "response": "A", "category": {"violence": False}, "is_safe": True},
    {"prompt": "Q", "response": "B", "category": {"violence": True}, "is_safe": False},
]
BEAVERS_COLUMNS = {name: [row[name] for row in BEAVERS] for name in ("prompt", "response", "category")}
# The split, its configuration and split on the Hub, the rows there, and the texts, labels and columns that come of them.
ON_HUB = {
    "toxicchat": (
        "train", ("toxicchat0124", "train"), [{"user_input": "grr", "toxicity": 1, "human_annotation": False, "x": 0}],
        ["grr"], [1], {"human_annotation": [False]},
    ),
    "wildguardmix": (
        "train", ("wildguardtrain", "train"),
        [wildguard("a", "unharmful"), wildguard("b", "harmful"), wildguard(None, "harmful"), wildguard("d", None)],
        ["a", "b"], [0, 1], {"adversarial": [False, False], "subcategory": ["benign", "benign"]},
    ),
    "goemotions": (
        "train", ("simplified", "train"),
        [{"text": "wow", "labels": [0, 26], "id": "x1"}, {"text": "ok", "labels": [27], "id": "x2"}],
        ["wow", "ok"], [[0, 26], [27]], {"id": ["x1", "x2"]},
    ),
    "openai_moderation": (
        "test", (None, "train"),
        [{"prompt": "none", "S": 0, "V2": 0}, {"prompt": "one", "S": 0, "V2": 1}, {"prompt": "?", "S": None, "V2": None}],
        ["none", "one", "?"], [0, 1, 0], {"S": [0, 0, None], "V2": [0, 1, None]},
    ),
    "aegis": (
        "train", (None, "train"),
        [
            aegis("safe", "Safe", "Violence", "Safe"),
            aegis("harmful", "Violence", "Threat", "Safe"),
            aegis("unsure", "Needs Caution", "Needs Caution", "Safe"),
            aegis("tie", "Safe", "Violence"),
            aegis("reply", "Safe", kind="llm_response"),
            aegis("nobody"),
        ],
        ["safe", "harmful", "unsure", "tie"], [0, 1, 1, 1], {"id": ["safe", "harmful", "unsure", "tie"]},
    ),
    "beavertails": (
        "test", (None, "30k_test"), BEAVERS,
        ["User: Q\n\nAssistant: A", "User: Q\n\nAssistant: B"], [0, 1], BEAVERS_COLUMNS,
    ),
    "beavertails_prompts": ("test", (None, "30k_test"), BEAVERS, ["Q", "Q"], [0, 1], BEAVERS_COLUMNS),
}  # fmt: skip


class TestDataSetsKnownByName:
    @pytest.fixture
    def on_hub(self, monkeypatch):
        """Lets the Hub have rows by id, configuration and split."""
        rows = {}
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *place, split, **_: Dataset.from_list(rows[*place, split])
        )

        def put(name, configuration, split, given):
            rows[BENCHMARKS[name].hub_id, configuration, split] = given

        return put

    def test_the_table_is_complete(self):
        for name, benchmark in BENCHMARKS.items():
            assert benchmark.name == name and benchmark.hub_id.count("/") == 1 and "test" in benchmark.splits
            assert len(set(benchmark.label_names)) == len(benchmark.label_names) >= 2
            assert benchmark.problem_type in get_args(ProblemType) and set(benchmark.slices) <= set(benchmark.columns)

    def test_names_and_paths(self, tmp_path, monkeypatch, caplog):
        monkeypatch.chdir(tmp_path)
        assert find_benchmark("imdb") == (BENCHMARKS["imdb"], None)
        assert find_benchmark("sst2:train_sentences") == (BENCHMARKS["sst2"], "train_sentences")
        for other in ("imdb.csv", "stanfordnlp/imdb", "./imdb", "IMDB"):
            assert find_benchmark(other) is None
        write(tmp_path / "imdb" / "train.jsonl", [{"text": "my own", "label": "x"}])
        write(tmp_path / "copies" / "imdb" / "train.jsonl", [{"text": "known", "label": 1}])
        assert read("./imdb").texts == ["my own"] and not caplog.records
        assert read("imdb", data_dir="copies").texts == ["known"] and "./imdb" in caplog.text

    def test_they_keep_their_columns(self):
        source = Source(rows="toxicchat")
        assert source.licence == "cc-by-nc-4.0" and "ToxicChat" in source.note
        for fields in ({"label_column": "jailbreaking"}, {"prompt_column": "question"}):
            with pytest.raises(ProbeError, match="text_column, label_column"):
                Source(rows="toxicchat", **fields)

    @pytest.mark.parametrize("name", ON_HUB)
    def test_rows_as_they_are_on_the_hub(self, on_hub, name):
        split, place, rows, texts, labels, columns = ON_HUB[name]
        on_hub(name, *place, rows)
        for found in (read(name, split=split), read(f"{name}:{split}")):
            assert found.texts == texts and found.columns == columns
            assert found.label_names == list(BENCHMARKS[name].label_names)
            several = found.labels.ndim == 2
            indices = [row.nonzero()[0].tolist() for row in found.labels] if several else found.labels.tolist()
            assert indices == labels and found.flagged in (None, [BENCHMARKS[name].flagged])

    def test_replies(self, on_hub):
        on_hub("beavertails", None, "30k_test", BEAVERS)
        rows = read("beavertails", split="test", prompt_column="prompt")
        asked = {"role": "user", "content": "Q"}
        assert rows.texts == [[asked, {"role": "assistant", "content": reply}] for reply in "AB"]
        assert rows.labels.tolist() == [0, 1] and list(rows.columns) == ["category"]

    def test_rows_that_the_hub_does_not_give(self, on_hub):
        on_hub("imdb", None, "train", [{"review": "a", "label": 1}])
        with pytest.raises(ProbeError, match=r"imdb.*'text'.*review, label"):
            read("imdb")
        with pytest.raises(ProbeError, match=r"dair-ai/emotion.*'split', 'validation'"):
            read("emotion", split="validation")
