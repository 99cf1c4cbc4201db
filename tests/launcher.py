"""Starts ranks on loopback as torchrun does, in fresh processes or in copies of this one, and kills one of them."""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import psutil
from accelerate.state import AcceleratorState
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "USE_LIBUV": "0"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def options(nodes: int, node: int, port: int | None) -> list[str]:
    """The options of torchrun for two ranks on one node, or for one rank on each of two."""
    words = [
        "--nnodes", nodes, "--node_rank", node, "--nproc_per_node", 2 // nodes,
        "--master_addr", "127.0.0.1", "--master_port", port or free_port(),
    ]  # fmt: skip
    return list(map(str, words))


def torchrun(*args) -> subprocess.Popen:
    """Start two ranks by the command itself. Each imports all modules anew, which takes ten seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", *options(1, 0, None), *map(str, args)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


class ForkedRun:
    """What torchrun does with its arguments, in processes that are forked from this one and have its modules."""

    def __init__(self, *args, nodes: int = 1, node: int = 0, port: int | None = None):
        self.args = list(map(str, args))
        self._files = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]  # noqa: SIM115
        words = [*options(nodes, node, port), *self.args]
        self._process = get_context("fork").Process(target=self._supervise, args=(words,))
        self._process.start()
        self.pid = self._process.pid

    def _supervise(self, words: list[str]) -> None:
        for number, file in enumerate(self._files, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(ENVIRONMENT)
        settings = parse_args(words)
        config, _, _ = config_from_args(settings)
        config.start_method = "fork"
        elastic_launch(config, run_rank)(settings.module, settings.training_script, settings.training_script_args)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout)
        texts = []
        for file in self._files:
            with file:
                file.seek(0)
                texts.append(file.read())
        return tuple(texts)


def run_rank(is_module: bool, name: str, words: list[str]) -> None:
    """Run a module or a script as Python does when it is started with it."""
    sys.argv = [name, *words]
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test may have trained alone in this process
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as ended:  # the launcher waits for a value
        if ended.code:
            raise RuntimeError(f"{name} ended with the status {ended.code}") from ended


def kill_rank(process: subprocess.Popen | ForkedRun, is_time: Callable[[], object]) -> list[psutil.Process]:
    """Kill rank 1, which is started last, as soon as `is_time` says so. Return all ranks."""
    deadline = time.monotonic() + 200
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    assert len(ranks) == 2
    ranks[1].kill()
    return ranks


def finish(process: subprocess.Popen | ForkedRun, timeout: float = 240) -> subprocess.CompletedProcess:
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)
