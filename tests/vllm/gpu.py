"""Run the tests of engines on a GPU, with both model runners of vLLM, with CUDA graphs and without, and print a table.

    python tests/vllm/gpu.py

Each combination is a process of its own. In each, a step of heads that follow replies must not synchronise: that is an
error. Then `measure.py` prints what heads cost there. With one GPU, tests of several ranks are left out.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch
from vllm.version import __version__

from llama_probe.compatibility import minor


FOLDER = Path(__file__).parent
ENGINES = ("test_engine.py", "test_features.py", "test_server.py")
RUNNERS = {"V1": "0", "V2": "1"} if minor(__version__) < (0, 34) else {"V2": "1"}
GRAPHS = {"eager": "0", "graphs": "1"}


def pytest_configure() -> None:
    """Set the tests' engines up for a GPU: pytest takes this file as a plugin."""
    import tiny_engine

    from llama_probe.vllm.scoring import Scorer

    tiny_engine.OPTIONS |= {"enforce_eager": os.environ["GPU_GRAPHS"] == "0", "gpu_memory_utilization": 0.2}
    follow = Scorer.follow

    def follow_without_waiting(scorer, tokens):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return follow(scorer, tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    Scorer.follow = follow_without_waiting


def run(command: list[str], runner: str, graphs: str) -> str:
    """Run one command. Return what `measure.py` prints, or the last line of pytest's output, which counts tests."""
    paths = (FOLDER.parent, FOLDER, os.environ.get("PYTHONPATH"))  # in this order: each has a conftest.py
    variables = {
        "VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner],
        "GPU_GRAPHS": GRAPHS[graphs],
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for measure.py
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
    }
    process = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    lines = process.stdout.splitlines() or process.stderr.splitlines() or ["no output"]
    if "pytest" not in command and process.returncode == 0:
        return "<br>".join(lines)
    return f"exit {process.returncode}: {lines[-1][:120]}"


def main() -> None:
    pytest = [sys.executable, "-m", "pytest", "-p", "gpu", "-n", "0", "-q"]
    if torch.cuda.device_count() == 1:
        pytest += ["-k", "not ranks"]
    commands = {file: [*pytest, str(FOLDER / file)] for file in ENGINES}
    measure = [sys.executable, str(FOLDER / "measure.py")]
    commands |= {f"cost of {number} requests": ["env", f"REQUESTS={number}", *measure] for number in (1, 8, 64)}
    print("| runner | | what | result |\n|---|---|---|---|")
    for runner, graphs, (what, command) in itertools.product(RUNNERS, GRAPHS, commands.items()):
        print(f"| {runner} | {graphs} | {what} | {run(command, runner, graphs)} |", flush=True)


if __name__ == "__main__":
    main()
