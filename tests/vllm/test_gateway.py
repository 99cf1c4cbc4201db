"""LiteLLM's gateway before a server with heads, by the config of the guide: its own process, on loopback."""

import os
import re
import subprocess
import sys
import threading
import time

import httpx
import pytest
import uvicorn
from launcher import free_port
from played_server import play, save_heads
from repository import ROOT

from llama_probe.vllm.settings import ProbeSettings


FINE, BAD = [9.0, -9.0], [-9.0, 9.0]
START = 120  # seconds until the gateway must answer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of a server with a guard, its engine, and a function that ends it."""
    guard = {"id2label": {0: "fine", 1: "bad"}, "flagged": ["bad"]}
    folders = save_heads(tmp_path_factory.mktemp("heads"), {"guard": guard})
    app, engine = play(ProbeSettings(folders), {"guard": FINE})
    port = free_port()
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()

    def end():
        running.should_exit = True
        thread.join()

    yield port, engine, end
    end()


@pytest.fixture(scope="module")
def gateway(server, tmp_path_factory):
    """A function that sends a message to a model behind the gateway, and returns the response."""
    page = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"^    model_list:\n(?:    .*\n)+", page, re.MULTILINE)
    config = config.replace("localhost:8000", f"127.0.0.1:{server[0]}").replace("sk-...", "sk-1")
    path, port = tmp_path_factory.mktemp("gateway") / "config.yaml", free_port()
    path.write_text(re.sub("^    ", "", config, flags=re.MULTILINE), encoding="utf-8")
    # Its import asks GitHub for prices.
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", "from litellm import run_server; run_server()"]
    command += ["--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
    with (path.parent / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as process:
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer sk-1"}, timeout=60
        )

        def post(**body) -> httpx.Response:
            chat = {"model": "any", "messages": [{"role": "user", "content": "How do I bake bread?"}], **body}
            return client.post("/v1/chat/completions", json=chat)

        try:
            for _ in range(START):
                time.sleep(1)
                try:
                    client.get("/health/liveliness").raise_for_status()
                    break
                except httpx.HTTPError:
                    assert process.poll() is None, (path.parent / "log").read_text()
            else:
                pytest.fail(f"no answer in {START} seconds")
            yield post
        finally:
            process.terminate()


@pytest.mark.parametrize("stream", [False, True])
def test_a_flagged_request_is_blocked(server, gateway, stream):
    _, engine, _ = server
    engine.logits["guard"] = FINE
    answer = gateway(stream=stream)
    texts = re.findall(r'"content": ?"(.*?)"', answer.text)
    assert (answer.status_code, "".join(texts), engine.authorization) == (200, "Fine.", "Bearer KEY")
    asked = len(engine.prompts)
    engine.logits["guard"] = BAD
    answer = gateway(stream=stream)
    assert answer.status_code == 400 and "guard/bad" in answer.text and len(engine.prompts) == asked + 1


def test_out_of_reach_no_model_is_asked(server, gateway):
    *_, end = server
    end()
    answer = gateway()
    assert answer.status_code == 500 and "Fine." not in answer.text
