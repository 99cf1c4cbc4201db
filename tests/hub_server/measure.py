"""Requests and seconds of a push and of pulls against the loopback Hub: `python tests/hub_server/measure.py`.

The head is the size of the paper's `mha` on a 3B model: 28 layers, hidden size 3072, downcast 32, 35 million parameters.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_server import HubServer
from hub_server.client import point_client_at
from llama_probe import ProbeConfig, ProbeModel
from llama_probe.hub.transport import HubReference, download_head


def main() -> None:
    """Prints one line a step."""
    with HubServer() as hub, tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        point_client_at(hub, Path(home), patch)
        patch.setenv("HF_TOKEN", hub.add_user("alice"))
        probe = ProbeModel(ProbeConfig(hidden_size=3072, num_hidden_layers=28, downcast=32, num_attention_heads=4))
        print(f"{probe.num_parameters():,} parameters")

        def timed(title: str, step: Callable[[], object]) -> None:
            hub.clear_requests()
            start = time.perf_counter()
            step()
            print(f"{title:34} {time.perf_counter() - start:6.2f} s  {len(hub.requests)} requests")

        timed("first push (creates the repository)", lambda: probe.push_to_hub("alice/head", license="mit"))
        timed("push without a change", lambda: probe.push_to_hub("alice/head", license="mit"))
        probe.classifier.bias.data.add_(1)
        timed("push of new weights", lambda: probe.push_to_hub("alice/head", license="mit"))
        timed("cold pull", lambda: download_head(HubReference("alice/head")))
        timed("warm pull of a branch", lambda: download_head(HubReference("alice/head")))
        commit = HubReference("alice/head", hub.head("alice/head"))
        timed("warm pull of a commit", lambda: download_head(commit))


if __name__ == "__main__":
    main()
