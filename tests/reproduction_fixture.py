"""Reproductions of the paper's tables with a few rows, as fixtures for all tests."""

import gzip
import json
import shutil

import pytest


FAST = ["tfidf", "prototypes", "layer-linear", "pooling", "gate"]
ALL = [*FAST, "zero-shot", "few-shot", "last-token", "mha"]


@pytest.fixture(scope="session")
def copies(tmp_path_factory):
    """Local copies of the data sets, a few rows each."""
    folder = tmp_path_factory.mktemp("copies")

    def put(name, split, count, shift=0, labels=2):
        rows = []
        for i in range(shift, shift + count):
            words = ("kind", "rude", "odd", "sad", "shy", "loud")[i % labels]
            label = [i % 3 + 1, 27] if name == "goemotions" else i % labels
            rows.append({"text": f"{words} no {i}", "label": label, "human_annotation": i % 4 < 2})
        path = folder / name / f"{split}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    put("toxicchat", "train", 40)
    put("toxicchat", "test", 12, 100)
    put("emotion", "train", 30, labels=6)
    put("emotion", "validation", 12, 60, labels=6)
    put("emotion", "test", 12, 80, labels=6)
    put("xstest", "test", 8, 200)
    put("goemotions", "train", 40)
    put("goemotions", "test", 12, 100)
    return folder


def create_reproduction(
    output, copies, backbone, data=("toxicchat",), chosen=FAST, only=("main",), max_rows=None, **changes
):
    """A reproduction of two seeds and two epochs."""
    # Imported here, as it needs more packages than other tests have.
    from llama_probe.experiments.reproduction.reproduction import Reproduction
    from llama_probe.experiments.reproduction.workbench import Workbench

    seeds = list(changes.pop("seeds", (0, 1)))
    bench = Workbench(str(backbone), output / ".states", copies, seeds, max_rows, 64)
    return Reproduction(output, data, chosen, only, bench=bench, **{"epochs": 2, "shots": 2, **changes})


@pytest.fixture
def reproduction(copies, backbone_folder, tmp_path, monkeypatch):
    """A function that creates a reproduction without plots, which take longer than the rest."""
    from llama_probe.experiments.reproduction import report

    monkeypatch.setattr(report, "find_spec", lambda name: None)

    def create(output="out", copies=copies, **changes):
        return create_reproduction(tmp_path / output, copies, backbone_folder, **changes)

    return create


@pytest.fixture(scope="session")
def everything(copies, backbone_folder, tmp_path_factory):
    """A finished reproduction of all parts, few-labels of one data set alone: its report and its folder."""
    from llama_probe.experiments.reproduction.methods import HEADS, HeadMethod

    output = tmp_path_factory.mktemp("reproduction") / "out"
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"probe_type": "mha", "downcast": 8, "num_attention_heads": 2}
        patch.setitem(HEADS, "mha", HeadMethod(sizes, HEADS["mha"].recipe))
        create_reproduction(output, copies, backbone_folder, chosen=["pooling", "gate"], only=["few-labels"]).execute()
        parts = ["main", "ood", "downcast", "layers", "sensitivity"]
        data = ("toxicchat", "emotion")
        return create_reproduction(output, copies, backbone_folder, data, ALL, parts, trials=2).execute(), output


@pytest.fixture
def finished(everything, tmp_path):
    """A copy of the finished reproduction, as the output `out` of `reproduction`: its report."""
    shutil.copytree(everything[1], tmp_path / "out")
    return everything[0]
