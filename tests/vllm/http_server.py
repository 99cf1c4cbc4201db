"""`python -m llama_probe.vllm` as a process, and questions to it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
from launcher import free_port


HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer none"}


@contextmanager
def serving(arguments: Sequence[str], log: Path, seconds: float = 900) -> Iterator[str]:
    """Serves while the block lasts; the URL of the API.

    Raises:
        RuntimeError: the server did not start; with the end of its log.
    """
    port = free_port()
    words = [sys.executable, "-m", "llama_probe.vllm", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    # The engine computes in its own process, as on a GPU: on a CPU vLLM makes one more, and each spins while it waits.
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=env)
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
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    return False


class PlayedGuard(ThreadingHTTPServer):
    """A judge on loopback that does as it is told.

    Attributes:
        requests: headers and body of each.
        sent: bytes of a long answer that were taken.
        gone: requests that the other side left.
    """

    def __init__(self, behave: Callable[["PlayedRequest"], None]):
        super().__init__(("127.0.0.1", 0), PlayedRequest)
        self.behave, self.requests, self.sent, self.gone = behave, [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class PlayedRequest(BaseHTTPRequestHandler):
    """A request to a `PlayedGuard`."""

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers, self.body))
        self.server.behave(self)

    def answer(self, payload, status: int = 200, length: int | None = None, **headers: str) -> None:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(length or len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


def ask(client, text: str, **kwargs):
    messages = [{"role": "user", "content": text}]
    options = {"temperature": 0.0, "max_tokens": 4, **kwargs}
    return client.chat.completions.create(model="tiny", messages=messages, **options)
