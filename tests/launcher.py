"""Starts the real torchrun on loopback, and kills one of its ranks."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(*args, nodes: int = 1, node: int = 0, port: int | None = None) -> subprocess.Popen:
    """Two processes on one node, or one on each of two."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--node_rank", node,
        "--nproc_per_node", 2 // nodes, "--master_addr", "127.0.0.1", "--master_port", port or free_port(), *args,
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "USE_LIBUV": "0"}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def kill_rank(process: subprocess.Popen, is_time: Callable[[], object]) -> list[psutil.Process]:
    """Kill rank 1, as soon as `is_time` says so. Return all ranks."""
    deadline = time.monotonic() + 200
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children()
    (victim,) = [child for child in ranks if child.environ().get("RANK") == "1"]
    victim.kill()
    return ranks


def finish(process: subprocess.Popen, timeout: float = 240) -> subprocess.CompletedProcess:
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)
