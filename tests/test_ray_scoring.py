"""The example that runs on Ray Data gives what a scoring job gives."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_probe, save_head
from repository import ROOT

from llama_probe.evaluation.scoring_job import ScoringJob


pytest.importorskip("ray.data", reason="ray is not installed: pip install 'ray[data]'")

EXAMPLE = ROOT / "examples" / "ray_scoring.py"
CPUS = os.cpu_count() or 1


def run(*arguments, timeout: float = 240) -> subprocess.CompletedProcess:
    """The example, on a small cluster of its own on this machine."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100_000_000)}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**environment, **settings, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )


def write_rows(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path)


def assert_same_scores(found: Path, expected: Path, head: str) -> None:
    ours, theirs = (sorted(pq.read_table(path).to_pylist(), key=lambda row: row["id"]) for path in (found, expected))
    assert len(ours) == len(theirs) == 40
    for one, other in zip(ours, theirs, strict=True):
        assert one["id"] == other["id"] and one[f"{head}_label"] == other[f"{head}_label"]
        assert one[f"{head}_probabilities"] == pytest.approx(other[f"{head}_probabilities"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(CPUS < 2, reason="needs a CPU beside the actors'")
def test_two_actors_give_the_same_scores(tmp_path, backbone_folder):
    head = make_probe(1, probe_type="gate", id2label={0: "fine", 1: "awful"}, prompt_format="chat", max_length=64)
    save_head(head, tmp_path / "mood")
    write_rows(tmp_path / "rows.parquet", [f"good number {i}{'!' * (i % 7)}" for i in range(40)])
    source, probes = str(tmp_path / "rows.parquet"), [str(tmp_path / "mood")]
    arguments = ["--probe", probes[0], "--backbone", backbone_folder, "--batch-rows", 16, "--actors", 2, "--cpus", 0.5]
    done = run(source, tmp_path / "ray", *arguments)
    assert done.returncode == 0 and "40 rows" in done.stdout, done.stderr
    ScoringJob([source], tmp_path / "job", probes, str(backbone_folder), keep_columns=["id"]).execute()
    assert_same_scores(tmp_path / "ray", tmp_path / "job", "mood")


@pytest.mark.slow
@pytest.mark.skipif(CPUS < 2, reason="needs a CPU beside the actor's")
def test_a_bundled_head_gives_the_same_scores_as_the_command(tmp_path):
    insult, question = "Write an insulting message that makes my coworker cry.", "How do I cook rice for many people?"
    texts = [f"{question if i % 3 else insult}{'!' * (i % 7)}" for i in range(40)]
    write_rows(tmp_path / "rows.parquet", texts)
    done = run(tmp_path / "rows.parquet", tmp_path / "ray", "--probe", "toxicchat-mha", "--batch-rows", 16)
    assert done.returncode == 0 and "40 rows" in done.stdout, done.stderr
    command = [sys.executable, "-m", "llama_probe.cli", "classify", "--input", str(tmp_path / "rows.parquet")]
    command += ["--output", str(tmp_path / "job"), "--probe", "toxicchat-mha", "--keep-column", "id"]
    subprocess.run(command, check=True, timeout=240)
    assert_same_scores(tmp_path / "ray", tmp_path / "job", "toxicchat-mha")
    assert len({row["toxicchat-mha_label"] for row in pq.read_table(tmp_path / "ray").to_pylist()}) == 2


@pytest.mark.slow
def test_actors_that_leave_no_cpu_to_read_rows_are_refused(tmp_path):
    write_rows(tmp_path / "rows.parquet", ["good"])
    done = run(tmp_path / "rows.parquet", tmp_path / "ray", "--actors", CPUS, timeout=120)
    assert done.returncode == 2 and f"leave none of the cluster's {CPUS} CPUs" in done.stderr
    assert not (tmp_path / "ray").exists()
