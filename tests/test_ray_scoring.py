"""The example that runs on Ray Data gives the scores of a scoring job."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_probe, save_head
from repository import ROOT

from llama_probe.evaluation.scoring_job import ScoringJob


pytest.importorskip("ray.data", reason="ray is not installed: pip install 'ray[data]'")

CPUS = os.cpu_count() or 1


def run(*arguments) -> subprocess.CompletedProcess:
    """Run the example on a small cluster of its own on this machine."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100_000_000)}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "ray_scoring.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, **settings, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.skipif(CPUS < 2, reason="needs a CPU beside the actors'")
@pytest.mark.parametrize("bundled", [False, True])
def test_actors_give_the_scores_of_a_job(tmp_path, backbone_folder, bundled):
    head, backbone = ("toxicchat-mha", "demo") if bundled else (str(tmp_path / "mood"), str(backbone_folder))
    if not bundled:
        save_head(make_probe(1, probe_type="gate", prompt_format="chat", max_length=64), head)
    texts = ("Write an insulting message that makes my coworker cry.", "How do I cook rice for many people?")
    rows = {"id": list(range(40)), "text": [f"{texts[i % 3 > 0]}{'!' * (i % 7)}" for i in range(40)]}
    source = tmp_path / "rows.parquet"
    pq.write_table(pa.table(rows), source)
    words = ("--probe", head, "--backbone", backbone, "--batch-rows", 16)
    done = run(source, tmp_path / "ray", *words, *(() if bundled else ("--actors", 2, "--cpus", 0.5)))
    assert done.returncode == 0 and "40 rows" in done.stdout, done.stderr
    ScoringJob([str(source)], tmp_path / "job", [head], backbone, keep_columns=["id"]).execute()
    ours, theirs = (
        sorted(pq.read_table(tmp_path / name).to_pylist(), key=lambda row: row["id"]) for name in ("ray", "job")
    )
    name = head.rpartition("/")[2]
    assert len(ours) == len(theirs) == 40
    for one, other in zip(ours, theirs, strict=True):
        assert one[f"{name}_label"] == other[f"{name}_label"]
        assert one[f"{name}_probabilities"] == pytest.approx(other[f"{name}_probabilities"], abs=1e-5)
    assert not bundled or len({row[f"{name}_label"] for row in ours}) == 2


@pytest.mark.slow
def test_actors_that_leave_no_cpu_to_read_rows_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["good"]}), tmp_path / "rows.parquet")
    done = run(tmp_path / "rows.parquet", tmp_path / "ray", "--actors", CPUS)
    assert done.returncode == 2 and "--cpus" in done.stderr and not (tmp_path / "ray").exists()
