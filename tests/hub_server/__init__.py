"""A small Hub on loopback: the real `huggingface_hub` client pushes to it and pulls from it in the tests.

It keeps everything in memory and answers the requests that the client makes in these tests: who am I, create, branches,
model info, trees, uploads (preupload, LFS, commit) and downloads.
"""

from .server import HubServer


__all__ = ["HubServer"]
