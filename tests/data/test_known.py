"""Data sets by name: rows shaped as on the Hub are converted, and local copies are read."""

import gzip
import json
from dataclasses import replace

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from llama_probe import ProbeError
from llama_probe.data.known import BENCHMARKS, find_benchmark
from llama_probe.data.texts import benchmark_splits, read_labelled
from llama_probe.heads.configuration import PROBLEM_TYPES


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Puts files where the named data set's Hub id is looked for: `{path: rows}`, with configurations as in a card."""

    def put(name, files, configurations=None, features=None):
        folder = tmp_path / "hub" / name
        for file, rows in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".csv":
                Dataset.from_list(rows).to_csv(path, index=False)
            elif path.suffix == ".parquet":
                Dataset.from_list(rows, features=features).to_parquet(path)
            else:
                jsonl(path, rows)
        lines = ["---", "configs:"]
        for configuration, splits in (configurations or {}).items():
            lines += [f"- config_name: {configuration}", "  data_files:"]
            for split, path in splits.items():
                lines += [f"  - split: {split}", f"    path: {path}"]
        if configurations:
            (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
        monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], hub_id=str(folder)))

    return put


def test_the_table_is_complete():
    assert list(BENCHMARKS) == [
        "toxicchat", "wildguardmix", "imdb", "sst2", "emotion", "goemotions",
        "xstest", "openai_moderation", "aegis", "beavertails", "advbench",
    ]  # fmt: skip
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.hub_id.count("/") == 1 and "test" in benchmark.splits
        assert len(set(benchmark.label_names)) == len(benchmark.label_names) >= 2
        assert benchmark.problem_type in PROBLEM_TYPES and set(benchmark.slices) <= set(benchmark.columns)
        assert benchmark.note.endswith(".") and "\n" not in benchmark.note and benchmark.license.islower()
    for name in ("toxicchat", "wildguardmix", "imdb", "sst2", "emotion", "goemotions"):
        assert "train" in BENCHMARKS[name].splits


def test_names_and_paths(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert find_benchmark("imdb") == (BENCHMARKS["imdb"], None)
    assert find_benchmark("sst2:train_sentences") == (BENCHMARKS["sst2"], "train_sentences")
    for other in ("imdb.csv", "stanfordnlp/imdb", "./imdb", "IMDB"):
        assert find_benchmark(other) is None
    jsonl(tmp_path / "imdb" / "train.jsonl", [{"text": "my own", "label": "x"}])
    assert read_labelled("./imdb").texts == ["my own"] and not caplog.records


def test_a_folder_that_is_called_as_a_data_set_does_not_hide_it(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "copies" / "imdb" / "train.jsonl", [{"text": "known", "label": 1}])
    (tmp_path / "imdb").mkdir()  # as `--output imdb` makes it
    assert find_benchmark("imdb") == (BENCHMARKS["imdb"], None)
    assert read_labelled("imdb", data_dir="copies").texts == ["known"]
    assert "written ./imdb" in caplog.text


class TestHub:
    def test_toxicchat(self, on_hub):
        def row(text, toxicity, human):
            return {
                "conv_id": text, "user_input": text, "model_output": "Sure.", "human_annotation": human,
                "toxicity": toxicity, "jailbreaking": 0, "openai_moderation": "[]",
            }  # fmt: skip

        rows = {"train": [row("hello", 0, True), row("grr, you", 1, True)], "test": [row("hm", 0, False)]}
        path = "data/{}/toxic-chat_annotation_{}.csv"
        on_hub(
            "toxicchat",
            {path.format("0124", split): rows[split] for split in rows} | {path.format("1123", "train"): rows["test"]},
            {
                "toxicchat0124": {split: path.format("0124", split) for split in rows},
                "toxicchat1123": {"train": path.format("1123", "train")},
            },
        )
        train = read_labelled("toxicchat")
        assert train.texts == ["hello", "grr, you"] and train.labels.tolist() == [0, 1]
        assert train.label_names == ["non-toxic", "toxic"]
        assert train.columns == {
            "conv_id": ["hello", "grr, you"], "human_annotation": [True, True], "jailbreaking": [0, 0],
        }  # fmt: skip
        assert read_labelled("toxicchat", split="test").columns["human_annotation"] == [False]
        assert read_labelled("toxicchat:test", split="train").texts == ["hm"]

    def test_wildguardmix_without_rows_that_have_no_label_or_prompt(self, on_hub, caplog):
        def row(prompt, label):
            return {
                "prompt": prompt, "adversarial": False, "response": None, "prompt_harm_label": label,
                "response_harm_label": None, "response_refusal_label": None, "subcategory": "benign",
            }  # fmt: skip

        train = [row("a", "unharmful"), row("b", "harmful"), row(None, "harmful"), row("d", None)]
        on_hub(
            "wildguardmix",
            {"train/wildguard_train.parquet": train, "test/wildguard_test.parquet": [row("t", "harmful")]},
            {
                "wildguardtrain": {"train": "train/wildguard_train.parquet"},
                "wildguardtest": {"test": "test/wildguard_test.parquet"},
            },
        )
        rows = read_labelled("wildguardmix")
        assert rows.texts == ["a", "b"] and rows.labels.tolist() == [0, 1]
        assert rows.columns == {"adversarial": [False, False], "subcategory": ["benign", "benign"]}
        assert "2 of 4 rows of wildguardmix:train have no text or no label" in caplog.text
        assert read_labelled("wildguardmix", split="test").labels.tolist() == [1], (
            "a label that is not in use keeps its index"
        )

    def test_imdb(self, on_hub):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
        files = {
            f"plain_text/{split}-00000-of-00001.parquet": [{"text": split, "label": 1}] for split in ("train", "test")
        }
        files["plain_text/unsupervised-00000-of-00001.parquet"] = [{"text": "u", "label": -1}]
        paths = {path.split("/")[1].split("-")[0]: path for path in files}
        on_hub("imdb", files, {"plain_text": paths}, features)
        rows = read_labelled("imdb", split="test")
        assert rows.texts == ["test"] and rows.labels.tolist() == [1] and rows.label_names == ["negative", "positive"]
        with pytest.raises(ProbeError, match="imdb has no split 'validation'; it has: train, test"):
            read_labelled("imdb:validation")

    def test_sst2_is_tested_on_the_split_that_has_labels(self, on_hub):
        names = ClassLabel(names=["negative", "positive"])
        features = Features({"idx": Value("int32"), "sentence": Value("string"), "label": names})
        rows = {"train": ("fine", 1), "validation": ("dull", 0), "test": ("hidden", -1)}
        files = {
            f"data/{split}-00000-of-00001.parquet": [{"idx": 0, "sentence": text, "label": label}]
            for split, (text, label) in rows.items()
        }
        on_hub("sst2", files, features=features)
        assert read_labelled("sst2").texts == ["fine"]
        test = read_labelled("sst2", split="test")
        assert test.texts == ["dull"] and test.labels.tolist() == [0]
        with pytest.raises(ProbeError, match="it has: train, test"):
            read_labelled("sst2:validation")

    def test_emotion(self, on_hub):
        names = ["sadness", "joy", "love", "anger", "fear", "surprise"]
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        splits = ("train", "validation", "test")
        files = {f"split/{split}-0.parquet": [{"text": split, "label": 5}] for split in splits}
        files["unsplit/train-0.parquet"] = [{"text": "all", "label": 0}]
        configurations = {"split": {split: f"split/{split}-0.parquet" for split in splits}}
        on_hub("emotion", files, configurations | {"unsplit": {"train": "unsplit/train-0.parquet"}}, features)
        for split in splits:
            rows = read_labelled("emotion", split=split)
            assert rows.texts == [split] and rows.labels.tolist() == [5] and rows.label_names == names

    def test_goemotions_has_several_labels_a_row(self, on_hub):
        names = list(BENCHMARKS["goemotions"].label_names)
        assert len(names) == 28 and names[0] == "admiration" and names[27] == "neutral"
        features = Features(
            {"text": Value("string"), "labels": Sequence(ClassLabel(names=names)), "id": Value("string")}
        )
        rows = [{"text": "wow", "labels": [0, 26], "id": "x1"}, {"text": "ok", "labels": [27], "id": "x2"}]
        on_hub(
            "goemotions",
            {"simplified/train-0.parquet": rows, "raw/train-0.parquet": rows[:1]},
            {"raw": {"train": "raw/train-0.parquet"}, "simplified": {"train": "simplified/train-0.parquet"}},
            features,
        )
        found = read_labelled("goemotions")
        assert found.problem_type == "multi_label_classification" and found.labels.shape == (2, 28)
        assert [labels.nonzero()[0].tolist() for labels in found.labels] == [[0, 26], [27]]
        assert found.columns == {"id": ["x1", "x2"]}

    def test_xstest(self, on_hub):
        rows = [
            {"id": 1, "prompt": "stop a process?", "type": "homonyms", "label": "safe", "focus": "stop", "note": ""},
            {"id": 2, "prompt": "an unsafe one", "type": "contrast", "label": "unsafe", "focus": "stop", "note": ""},
        ]
        on_hub("xstest", {"xstest_prompts.csv": rows})
        found = read_labelled("xstest", split="test")
        assert found.labels.tolist() == [0, 1] and found.columns["type"] == ["homonyms", "contrast"]
        with pytest.raises(ProbeError, match="xstest has no split 'train'; it has: test"):
            read_labelled("xstest")

    def test_openai_moderation_flags_any_category(self, on_hub):
        rows = [
            {"prompt": "none", "S": 0, "H": 0},
            {"prompt": "one of them", "S": 0, "V2": 1},
            {"prompt": "nothing known", "HR": None},
        ]
        on_hub("openai_moderation", {"samples-1680.jsonl.gz": rows})
        found = read_labelled("openai_moderation", split="test")
        assert found.texts == [row["prompt"] for row in rows] and found.labels.tolist() == [0, 1, 0]
        assert found.columns["V2"] == [None, 1, None]

    def test_aegis_prompts_by_majority(self, on_hub):
        def row(text, *votes, kind="user_message"):
            padded = dict(zip([f"labels_{i}" for i in range(5)], [*votes, *["None"] * 5], strict=False))
            return {"id": text, "text": text, "text_type": kind, "num_annotations": len(votes), **padded}

        rows = [
            row("safe", "Safe", "Violence", "Safe"),
            row("harmful", "Violence", "Threat", "Safe"),
            row("unsure", "Needs Caution", "Needs Caution", "Safe"),
            row("tie", "Safe", "Violence"),
            row("reply", "Safe", kind="llm_response"),
            row("nobody"),
        ]
        on_hub("aegis", {"train.csv": rows, "test.csv": rows[:1]})
        found = read_labelled("aegis")
        assert found.columns["id"] == found.texts == ["safe", "harmful", "unsure", "tie"]
        assert found.labels.tolist() == [0, 1, 1, 1]

    def test_beavertails_reads_question_and_answer(self, on_hub):
        rows = [
            {"prompt": "Q", "response": "A", "category": {"violence": False}, "is_safe": True},
            {"prompt": "Q", "response": "B", "category": {"violence": True}, "is_safe": False},
        ]
        path = "round0/30k/test.jsonl.gz"
        on_hub("beavertails", {path: rows, "round0/330k/test.jsonl.gz": rows * 3}, {"default": {"30k_test": path}})
        found = read_labelled("beavertails", split="test")
        assert found.texts == ["User: Q\n\nAssistant: A", "User: Q\n\nAssistant: B"] and found.labels.tolist() == [
            0,
            1,
        ]
        assert found.columns["category"][1] == {"violence": True}
        exchanges = read_labelled("beavertails", split="test", prompt_column="prompt")
        asked = {"role": "user", "content": "Q"}
        assert exchanges.texts == [[asked, {"role": "assistant", "content": reply}] for reply in "AB"]
        assert exchanges.labels.tolist() == [0, 1] and list(exchanges.columns) == ["category"]
        with pytest.raises(ProbeError, match=r"for files \(allowed: prompt_column='prompt'\)"):
            read_labelled("beavertails", split="test", prompt_column="question")

    def test_advbench_is_all_harmful(self, on_hub):
        path = "data/train-00000-of-00001.parquet"
        on_hub("advbench", {path: [{"prompt": "a", "target": "Sure"}, {"prompt": "b", "target": "Sure"}]})
        found = read_labelled("advbench", split="test")
        assert found.labels.tolist() == [1, 1] and found.label_names == ["unharmful", "harmful"]

    def test_rows_of_another_shape(self, on_hub):
        on_hub("imdb", {"train.csv": [{"review": "a", "label": 1}]})
        with pytest.raises(ProbeError, match="the rows of imdb have no column 'text'; they have: review, label"):
            read_labelled("imdb")

    def test_out_of_reach(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise ConnectionError("no way there\nmore lines")

        monkeypatch.setattr("llama_probe.data.texts.load_dataset", refuse)
        message = r"emotion cannot be loaded as dair-ai/emotion from the Hub: no way there \(.*--data-dir reads local"
        with pytest.raises(ProbeError, match=message):
            read_labelled("emotion")

    def test_what_is_asked_of_the_hub(self, monkeypatch):
        asked = []

        def load(*args, **kwargs):
            asked.append((args, kwargs))
            return Dataset.from_dict({"text": ["a"], "label": [0]})

        monkeypatch.setattr("llama_probe.data.texts.load_dataset", load)
        monkeypatch.setitem(BENCHMARKS, "emotion", replace(BENCHMARKS["emotion"], revision="abc"))
        read_labelled("emotion", split="validation")
        assert asked == [(("dair-ai/emotion", "split"), {"split": "validation", "revision": "abc"})]


class TestLocalCopies:
    @pytest.fixture
    def copies(self, tmp_path):
        folder = tmp_path / "copies"
        rows = [{"id": "a", "text": "fine", "label": 1}, {"id": "b", "text": "dull", "label": 0}]
        jsonl(folder / "sst2" / "train.jsonl.gz", rows)
        jsonl(folder / "sst2" / "train_sentences.jsonl.gz", rows[:1])
        jsonl(folder / "sst2" / "test.jsonl", rows[1:])
        jsonl(folder / "goemotions" / "test.jsonl.gz", [{"id": "x", "text": "wow", "label": [0, 27]}])
        jsonl(folder / "wildguardmix" / "train.jsonl.gz", [{"text": "a", "label": "harmful"}])
        (folder / "sst2" / "notes.md").write_text("not a split")
        return folder

    def test_all_that_is_there(self, copies):
        rows = read_labelled("sst2", data_dir=copies)
        assert rows.texts == ["fine", "dull"] and rows.labels.tolist() == [1, 0]
        assert rows.label_names == ["negative", "positive"] and rows.columns == {"id": ["a", "b"]}
        assert read_labelled("sst2:train_sentences", data_dir=str(copies)).texts == ["fine"]
        assert read_labelled("sst2", split="test", data_dir=copies).texts == ["dull"]
        assert list(benchmark_splits(BENCHMARKS["sst2"], copies)) == ["test", "train", "train_sentences"]
        several = read_labelled("goemotions:test", data_dir=copies)
        assert several.labels.shape == (1, 28) and several.labels.sum() == 2
        assert read_labelled("wildguardmix", data_dir=copies).labels.tolist() == [1], "names of labels do as well"

    def test_rows_as_they_are_on_the_hub(self, copies):
        jsonl(copies / "xstest" / "test.jsonl", [{"prompt": "a", "label": "unsafe", "type": "x"}])
        rows = read_labelled("xstest", split="test", data_dir=copies)
        assert rows.texts == ["a"] and rows.labels.tolist() == [1] and rows.columns == {"type": ["x"]}

    def test_what_is_missing(self, copies):
        with pytest.raises(ProbeError, match="sst2 has no split 'validation'; it has: test, train, train_sentences"):
            read_labelled("sst2", split="validation", data_dir=copies)
        with pytest.raises(ProbeError, match=r"imdb is no folder; local copies lie in DIR/imdb/SPLIT.jsonl.gz"):
            read_labelled("imdb", data_dir=copies)
        jsonl(copies / "imdb" / "train.jsonl", [{"text": "a", "label": 2}])
        with pytest.raises(ProbeError, match="labels go from 2 to 2, but there are 2 names"):
            read_labelled("imdb", data_dir=copies)


def test_columns_and_kinds_that_do_not_fit():
    with pytest.raises(ProbeError, match="imdb is known by name and has its own columns"):
        read_labelled("imdb", label_column="stars")
    with pytest.raises(ProbeError, match="imdb is for single_label_classification, not for regression"):
        read_labelled("imdb", problem_type="regression")


@pytest.mark.parametrize(
    "names, labels",
    [
        (["positive", "negative"], [0, 1]),
        (["neutral", "negative", "positive"], [2, 1]),
        (["no", "yes"], [1, 0]),
    ],
)
def test_other_label_names(tmp_path, caplog, names, labels):
    jsonl(tmp_path / "imdb" / "train.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    rows = read_labelled("imdb", label_names=names, data_dir=tmp_path)
    assert rows.label_names == names and rows.labels.tolist() == labels
    assert ("negative, positive of the data are read as no, yes" in caplog.text) == (names == ["no", "yes"])


def test_other_label_names_that_do_not_fit(tmp_path):
    jsonl(tmp_path / "imdb" / "train.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(ProbeError, match="labels negative, positive of the data cannot be read as a, b, c"):
        read_labelled("imdb", label_names=["a", "b", "c"], data_dir=tmp_path)


def test_several_labels_are_matched_by_name(tmp_path):
    names = list(BENCHMARKS["goemotions"].label_names)
    jsonl(tmp_path / "goemotions" / "train.jsonl", [{"text": "a", "label": [0, 2]}])
    rows = read_labelled("goemotions", label_names=names[::-1], data_dir=tmp_path)
    assert rows.labels.nonzero()[1].tolist() == [25, 27] and rows.labels.dtype == "float32"


def test_conversion_keeps_no_column_that_is_not_named():
    found = BENCHMARKS["xstest"].convert(Dataset.from_list([{"prompt": "a", "label": "safe", "other": 1}]))
    assert found == {"text": ["a"], "label": ["safe"]}
