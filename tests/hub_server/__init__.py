"""A small Hub on loopback: the real `huggingface_hub` client pushes to it and pulls from it in the tests.

It keeps everything in memory and speaks the client's protocol: caching, revisions, error classes, atomic commits. It
says nothing about the public Hub's own policies, such as quotas, scans or the rules for cards.
"""

from .server import HubServer


__all__ = ["HubServer"]
