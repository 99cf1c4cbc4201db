"""Reproductions of the paper's tables with a few rows, as a fixture for all tests."""

import gzip
import json

import pytest


FAST = ["tfidf", "prototypes", "layer-linear", "pooling", "gate"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Local copies of the data sets, a few rows each."""
    folder = tmp_path_factory.mktemp("copies")

    def put(name, split, count, shift=0, labels=2):
        rows = []
        for i in range(shift, shift + count):
            words = ("kind", "rude", "odd", "sad", "shy", "loud")[i % labels]
            rows.append({"text": f"{words} no {i}", "label": i % labels, "human_annotation": i % 4 < 2})
        path = folder / name / f"{split}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    put("toxicchat", "train", 40)
    put("toxicchat", "test", 12, 100)
    put("emotion", "train", 30, labels=6)
    put("emotion", "validation", 12, 60, labels=6)
    put("emotion", "test", 12, 80, labels=6)
    put("xstest", "test", 8, 200)
    return folder


@pytest.fixture
def reproduction(copies, backbone_folder, tmp_path):
    def create(
        output="out",
        data=("toxicchat",),
        chosen=FAST,
        only=("main",),
        seeds=(0, 1),
        max_rows=None,
        cache=True,
        backbone=backbone_folder,
        **changes,
    ):
        from llama_probe.experiments.reproduction.reproduction import (
            Reproduction,  # which needs more than other tests have
        )
        from llama_probe.experiments.reproduction.workbench import Workbench

        bench = Workbench(str(backbone), tmp_path / output / ".states", copies, list(seeds), max_rows, 64, cache=cache)
        return Reproduction(bench, tmp_path / output, data, chosen, only, **{"epochs": 2, "shots": 2, **changes})

    return create
