"""Rows in memory."""

import numpy as np
import pytest
import torch

from llama_probe import ProbeError
from llama_probe.data.memory import is_tokenized, rows_in_memory


@pytest.mark.parametrize(
    "data",
    [
        {"text": ["a", "b"], "label": np.array([1, 0])},
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
        [("a", 1), ("b", 0)],
        {"messages": [[{"role": "user", "content": text}] for text in "ab"], "labels": [1, 0]},
        {"prompt": ["a", "b"], "response": ["no", "yes"], "label": [1, 0]},
    ],
)
def test_tables(data):
    rows = rows_in_memory("rows", data)
    assert rows.labels.tolist() == [1, 0] and len(rows.texts) == 2 and not is_tokenized(rows)


def test_tokens_without_their_padding():
    data = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "probe_mask": torch.tensor([[0, 0, 1], [1, 0, 0]]),
        "label": ["x", "y"],
    }
    rows = rows_in_memory("rows", data)
    assert rows.texts == [[5, 6], [7, 8, 9]] and rows.columns["probe_mask"] == [[0, 1], [1, 0, 0]]
    assert is_tokenized(rows) and rows.label_names == ["x", "y"]


def test_names_that_the_data_gives():
    from datasets import ClassLabel, Dataset, DatasetDict

    kinds = Dataset.from_dict({"words": ["a", "b"], "kind": [1, 0]})
    kinds = kinds.cast_column("kind", ClassLabel(names=["no", "yes"]))
    mapping = {"words": "text", "kind": "label"}
    assert rows_in_memory("rows", kinds.with_format("torch"), mapping).label_names == ["no", "yes"]
    assert rows_in_memory("rows", kinds, mapping, ["yes", "no"]).labels.tolist() == [0, 1]
    with pytest.raises(ProbeError, match="split"):
        rows_in_memory("rows", DatasetDict(train=kinds), mapping)


def test_a_missing_cell_of_a_frame():
    frame = pytest.importorskip("pandas").DataFrame({"text": ["a", None], "label": [1, 0]})
    with pytest.raises(ProbeError, match="row 1"):
        rows_in_memory("rows", frame)
