"""Data sets by name: rows with the columns of the Hub are converted, and local copies are read."""

from typing import get_args

import datasets
import pytest
from datasets import Dataset

from llama_probe import ProbeError
from llama_probe.data.known import BENCHMARKS, find_benchmark
from llama_probe.data.sources import Source
from llama_probe.heads.rules import ProblemType


def read(rows, data_dir=None, split="train", **fields):
    found = Source(rows=rows, **fields).read(data_dir=data_dir, split=split)
    del found.columns["source"]
    return found


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_json(path)


@pytest.fixture
def on_hub(monkeypatch):
    """Lets the Hub have rows by id, configuration and split."""
    rows = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *place, split, **_: Dataset.from_list(rows[*place, split]))

    def put(name, configuration, split, given):
        rows[BENCHMARKS[name].hub_id, configuration, split] = given

    return put


def test_the_table_is_complete():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.hub_id.count("/") == 1 and "test" in benchmark.splits
        assert len(set(benchmark.label_names)) == len(benchmark.label_names) >= 2
        assert benchmark.problem_type in get_args(ProblemType) and set(benchmark.slices) <= set(benchmark.columns)


def test_names_and_paths(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert find_benchmark("imdb") == (BENCHMARKS["imdb"], None)
    assert find_benchmark("sst2:train_sentences") == (BENCHMARKS["sst2"], "train_sentences")
    for other in ("imdb.csv", "stanfordnlp/imdb", "./imdb", "IMDB"):
        assert find_benchmark(other) is None
    jsonl(tmp_path / "imdb" / "train.jsonl", [{"text": "my own", "label": "x"}])
    jsonl(tmp_path / "copies" / "imdb" / "train.jsonl", [{"text": "known", "label": 1}])
    assert read("./imdb").texts == ["my own"] and not caplog.records
    assert read("imdb", data_dir="copies").texts == ["known"] and "./imdb" in caplog.text


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


@pytest.mark.parametrize("name", ON_HUB)
def test_rows_as_they_are_on_the_hub(on_hub, name):
    split, place, rows, texts, labels, columns = ON_HUB[name]
    on_hub(name, *place, rows)
    for found in (read(name, split=split), read(f"{name}:{split}")):
        assert found.texts == texts and found.columns == columns
        assert found.label_names == list(BENCHMARKS[name].label_names)
        several = found.labels.ndim == 2
        assert ([row.nonzero()[0].tolist() for row in found.labels] if several else found.labels.tolist()) == labels


def test_replies_of_a_benchmark(on_hub):
    on_hub("beavertails", None, "30k_test", BEAVERS)
    rows = read("beavertails", split="test", prompt_column="prompt")
    asked = {"role": "user", "content": "Q"}
    assert rows.texts == [[asked, {"role": "assistant", "content": reply}] for reply in "AB"]
    assert rows.labels.tolist() == [0, 1] and list(rows.columns) == ["category"]
    for changes in ({"prompt_column": "question"}, {"label_column": "stars"}):
        with pytest.raises(ProbeError, match="prompt_column"):
            read("beavertails", split="test", **changes)


def test_rows_that_the_hub_does_not_give(on_hub):
    on_hub("imdb", None, "train", [{"review": "a", "label": 1}])
    with pytest.raises(ProbeError, match=r"imdb.*'text'.*review, label"):
        read("imdb")
    with pytest.raises(ProbeError, match=r"dair-ai/emotion.*'split', 'validation'"):
        read("emotion", split="validation")


class TestLocalCopies:
    @pytest.fixture
    def copies(self, tmp_path):
        folder = tmp_path / "copies"
        rows = [{"id": "a", "text": "fine", "label": 1}, {"id": "b", "text": "dull", "label": 0}]
        jsonl(folder / "sst2" / "train.jsonl.gz", rows)
        jsonl(folder / "sst2" / "train_sentences.jsonl.gz", rows[:1])
        jsonl(folder / "goemotions" / "test.jsonl.gz", [{"id": "x", "text": "wow", "label": [0, 27]}])
        jsonl(folder / "wildguardmix" / "train.jsonl.gz", [{"text": "a", "label": "harmful"}])
        jsonl(folder / "xstest" / "test.jsonl", [{"prompt": "a", "label": "unsafe", "type": "x"}])
        jsonl(folder / "emotion" / "train.jsonl", [{"text": "a", "label": 9}])
        (folder / "sst2" / "notes.md").write_text("not a split")
        return folder

    def test_copies(self, copies):
        rows = read("sst2", data_dir=copies)
        assert rows.texts == ["fine", "dull"] and rows.labels.tolist() == [1, 0]
        assert rows.label_names == ["negative", "positive"] and rows.columns == {"id": ["a", "b"]}
        assert read("sst2:train_sentences", data_dir=str(copies)).texts == ["fine"]
        assert read("goemotions:test", data_dir=copies).labels.nonzero()[1].tolist() == [0, 27]
        assert read("wildguardmix", data_dir=copies).labels.tolist() == [1], "names of labels do as well"
        rows = read("xstest", split="test", data_dir=copies)
        assert rows.texts == ["a"] and rows.labels.tolist() == [1] and rows.columns == {"type": ["x"]}

    @pytest.mark.parametrize(
        "source, named",
        [
            ("sst2:validation", "no split 'validation'; it has: train, train_sentences"),
            ("imdb", "DIR/imdb/SPLIT.jsonl.gz"),
            ("emotion", "'9'"),
        ],
    )
    def test_wrong_copies(self, copies, source, named):
        with pytest.raises(ProbeError, match=named):
            read(source, data_dir=copies)
