"""A small Hub on loopback: the real `huggingface_hub` client pushes to it and pulls from it in the tests.

It keeps everything in memory and answers the requests that the client makes in these tests: who am I, create, branches,
model info, trees, uploads (preupload, commit) and downloads. Importing this starts it and makes it the only Hub of this
process, offline at first; so import it before `huggingface_hub`, which reads the environment once.
"""

import os
import tempfile

from .server import HubServer


__all__ = ["HOME", "HUB", "HubServer"]

HUB = HubServer()
HOME = tempfile.TemporaryDirectory(prefix="hf_home.")
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": HOME.name, "HF_HUB_OFFLINE": "1"}
os.environ |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
for switch in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ[switch] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
