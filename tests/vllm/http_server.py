"""`python -m llama_probe.vllm` as a process, and questions to it."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tiny_engine import TinyServing


HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer none"}


def guarded(tiny: TinyServing, heads: Sequence[str], threshold: float, options: str) -> list[str]:
    """The arguments of a server called `tiny`, with `guard` and further heads."""
    probes = [word for name in heads for word in ("--probe", f"{name}={tiny.heads[name]}")]
    common = "--served-model-name tiny --dtype float32 --max-model-len 512 --max-num-seqs 8"
    halting = ["--halt-on", f'guard={{"threshold": {threshold}}}']
    return [str(tiny.backbone), *probes, *halting, *common.split(), *shlex.split(options)]


@contextmanager
def serving(arguments: Sequence[str], log: Path, seconds: float = 900) -> Iterator[str]:
    """Serves while the block lasts; the URL of the API.

    Raises:
        RuntimeError: the server did not start; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "llama_probe.vllm", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + seconds
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@contextmanager
def judging(is_bad: Callable[[str], bool]) -> Iterator[tuple[str, list[str]]]:
    """Moderates texts on loopback while the block lasts; its URL, and a list that gets the texts."""
    texts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"results": [{"flagged": is_bad(texts[-1])}]}).encode())

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/moderations", texts
        server.shutdown()


def ask(client, text: str, **kwargs):
    messages = [{"role": "user", "content": text}]
    options = {"temperature": 0.0, "max_tokens": 4, **kwargs}
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def post(url: str, body: dict):
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), HEADERS), timeout=250)
