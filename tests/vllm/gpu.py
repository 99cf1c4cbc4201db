"""Run the tests of engines on a GPU, with both model runners of vLLM, with CUDA graphs and without, and print a table.

    python tests/vllm/gpu.py [--dry-run]

Each combination is a process of its own. In each, heads that follow replies must not wait for the device: a step of theirs that
synchronises is an error. Then it measures milliseconds between tokens on the demo backbone, without heads and with one that
follows replies. With one GPU, tests of several ranks are left out. `--dry-run` prints the commands, and needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


FOLDER = Path(__file__).parent
ENGINES = ("test_engine.py", "test_reply_engine.py", "test_features.py")
SERVERS = {"eager": "test_reply_server.py", "graphs": "test_server.py"}  # both on two ranks
RUNNERS = {"V1": "0", "V2": "1"}
GRAPHS = {"eager": "0", "graphs": "1"}
HEADS = ("plain", "gate", "multimax")
CONCURRENT, NEW, TURNS = (1, 8, 64), 65, 5
_MARK = "measured "  # vLLM logs to the same stream


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


def measure(head: str) -> None:
    """Print milliseconds between tokens by number of requests at once, the medians of some turns."""
    from measure import make_reply_head
    from vllm import LLM, SamplingParams

    from llama_probe.backbone.loading import demo_backbone
    from llama_probe.vllm import engine_kwargs

    options = {"dtype": "bfloat16", "max_model_len": 512, "enforce_eager": os.environ["GPU_GRAPHS"] == "0"}
    with tempfile.TemporaryDirectory() as folder:
        kwargs = {"model": str(demo_backbone()), **options}
        if head != "plain":
            rules = {head: {"label": "LABEL_1", "threshold": 1.0}}
            heads = {head: make_reply_head(head, folder)}
            kwargs = engine_kwargs("demo", heads, halt_on=rules, compare_fingerprints=False, **options)
        llm = LLM(**kwargs)

    def seconds(requests: int, new: int) -> float:
        prompts = [{"prompt_token_ids": list(range(100 + i, 228 + i))} for i in range(requests)]
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    times = {}
    for requests in CONCURRENT:
        seconds(requests, 2)  # warms up; afterwards the prompts are in the prefix cache
        turns = sorted(seconds(requests, NEW) - seconds(requests, 1) for _ in range(TURNS))
        times[requests] = round(1000 * turns[TURNS // 2] / (NEW - 1), 3)
    print(f"{_MARK}{json.dumps(times)}", flush=True)


def commands(ranks: int) -> list[tuple[str, str, str, list[str]]]:
    """Return runner, graphs, what is run and the command, for each row of the table."""
    chosen = [] if ranks > 1 else ["-k", "not pipeline"]
    rows = []
    for runner, graphs in itertools.product(RUNNERS, GRAPHS):
        test = [sys.executable, "-m", "pytest", "-p", "gpu", "-n", "0", "-q", *chosen]
        files = (*ENGINES, SERVERS[graphs]) if ranks > 1 else ENGINES
        rows += [(runner, graphs, file, [*test, str(FOLDER / file)]) for file in files]
        rows += [
            (runner, graphs, f"ms a token, {head}", [sys.executable, __file__, "--measure", head]) for head in HEADS
        ]
    return rows


def environment(runner: str, graphs: str) -> dict[str, str]:
    """Return the variables of a process, beside those of this one."""
    paths = os.pathsep.join(map(str, (FOLDER.parent, FOLDER)))  # in this order: each has a conftest.py
    added = {"VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner], "GPU_GRAPHS": GRAPHS[graphs]}
    return added | {"PYTHONPATH": os.pathsep.join(filter(None, (paths, os.environ.get("PYTHONPATH"))))}


def run(command: list[str], variables: dict[str, str]) -> str:
    """Run one command. Return what the table says of it: times, or else the last line of its output, which counts tests."""
    process = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    lines = process.stdout.splitlines()
    times = next((line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)), None)
    return times or f"exit {process.returncode}: {(lines or process.stderr.splitlines() or ['no output'])[-1][:120]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    parser.add_argument("--measure", choices=HEADS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    if not (options.dry_run or torch.cuda.is_available()):
        sys.exit("error: there is no GPU; --dry-run prints what would be run")
    print("| runner | | what | result |\n|---|---|---|---|")
    for runner, graphs, what, command in commands(torch.cuda.device_count()):
        variables = environment(runner, graphs)
        shown = [f"{name}={value}" for name, value in variables.items()]
        result = f"`{shlex.join([*shown, *command])}`" if options.dry_run else run(command, variables)
        print(f"| {runner} | {graphs} | {what} | {result} |", flush=True)


if __name__ == "__main__":
    main()
