"""Run the tests of engines on a GPU, with both model runners of vLLM, with CUDA graphs and without, and print a table.

    python tests/vllm/gpu.py [--dry-run]

Each combination is a process of its own. In each, a step of heads that follow replies must not synchronise: that is an
error. Then `measure.py` prints what heads cost there. With one GPU, tests of several ranks are left out.
`--dry-run` prints the commands, and needs no GPU.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch


FOLDER = Path(__file__).parent
ENGINES = ("test_engine.py", "test_features.py", "test_server.py")
RUNNERS = {"V1": "0", "V2": "1"}
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


def commands(ranks: int) -> list[tuple[str, str, str, list[str]]]:
    """Return runner, graphs, what is run and the command, for each row of the table."""
    test = [sys.executable, "-m", "pytest", "-p", "gpu", "-n", "0", "-q"]
    if ranks == 1:
        test += ["-k", "not ranks"]
    rows = []
    for runner, graphs in itertools.product(RUNNERS, GRAPHS):
        rows += [(runner, graphs, file, [*test, str(FOLDER / file)]) for file in ENGINES]
        rows.append((runner, graphs, "cost", [sys.executable, str(FOLDER / "measure.py")]))
    return rows


def environment(runner: str, graphs: str) -> dict[str, str]:
    """Return the variables of a process, beside those of this one."""
    paths = os.pathsep.join(map(str, (FOLDER.parent, FOLDER)))  # in this order: each has a conftest.py
    added = {"VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner], "GPU_GRAPHS": GRAPHS[graphs]}
    added["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for measure.py
    return added | {"PYTHONPATH": os.pathsep.join(filter(None, (paths, os.environ.get("PYTHONPATH"))))}


def run(what: str, command: list[str], variables: dict[str, str]) -> str:
    """Run one command. Return all costs, or the last line of its output, which counts tests."""
    process = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    lines = process.stdout.splitlines() or process.stderr.splitlines() or ["no output"]
    if what == "cost" and process.returncode == 0:
        return "<br>".join(lines)
    return f"exit {process.returncode}: {lines[-1][:120]}"


def main(is_dry: bool) -> None:
    if not (is_dry or torch.cuda.is_available()):
        sys.exit("error: there is no GPU; --dry-run prints what would be run")
    print("| runner | | what | result |\n|---|---|---|---|")
    for runner, graphs, what, command in commands(torch.cuda.device_count()):
        variables = environment(runner, graphs)
        words = [f"{name}={value}" for name, value in variables.items()]
        result = f"`{shlex.join([*words, *command])}`" if is_dry else run(what, command, variables)
        print(f"| {runner} | {graphs} | {what} | {result} |", flush=True)


if __name__ == "__main__":
    main("--dry-run" in sys.argv[1:])
