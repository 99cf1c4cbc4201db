"""What the tests of the Hub have in common: a repository, its files, and the calls of a client that may write."""

import hashlib
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save


REPO = "alice/head"
WEIGHTS = save({"weight": torch.arange(6.0)})
FILES = {"config.json": b'{"a": 1}', "sub/notes.txt": b"notes", "model.safetensors": WEIGHTS}


def add(files):
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def push(api, files=FILES, **options):
    return api.create_commit(REPO, add(files), commit_message="Push", **options)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def read(path):
    return Path(path).read_bytes()


def failed_with(status):
    return pytest.raises(HfHubHTTPError, check=lambda error: error.response.status_code == status)


def refused_upload():
    """The client's plain RuntimeError around whatever went wrong with one file."""
    return pytest.raises(RuntimeError, match="Error while uploading '")
