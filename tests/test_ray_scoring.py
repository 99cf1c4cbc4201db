"""The example that runs on Ray Data gives what a scoring job gives."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_probe

from llama_probe.files import save_head
from llama_probe.scoring_job import ScoringJob


pytest.importorskip("ray")
EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_scoring.py"


def test_the_same_scores(tmp_path, backbone_folder):
    head = make_probe(1, probe_type="gate", id2label={0: "fine", 1: "awful"}, prompt_format="chat", max_length=64)
    save_head(head, tmp_path / "mood")
    rows = {"id": list(range(40)), "text": [f"good number {i}{'!' * (i % 7)}" for i in range(40)]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    source, probes = str(tmp_path / "rows.parquet"), [str(tmp_path / "mood")]
    arguments = ["--probe", probes[0], "--backbone", backbone_folder, "--batch-rows", "16", "--actors", "2"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), source, str(tmp_path / "ray"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert done.returncode == 0 and "40 rows" in done.stdout, done.stderr
    ScoringJob([source], tmp_path / "job", probes, str(backbone_folder), keep_columns=["id"]).execute()
    found, expected = (
        sorted(pq.read_table(tmp_path / name).to_pylist(), key=lambda row: row["id"]) for name in ("ray", "job")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["mood_label"] == theirs["mood_label"]
        assert ours["mood_probabilities"] == pytest.approx(theirs["mood_probabilities"], abs=1e-5)
