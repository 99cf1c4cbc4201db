"""What `probe=` may be: a head folder, a bundled alias, a list of these, or a dict of names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from .errors import ProbeError
from .files import is_head_folder, read_head
from .probe import ProbeModel


ProbeSource = str | os.PathLike | ProbeModel
ProbeSpec = ProbeSource | Sequence[ProbeSource] | Mapping[str, ProbeSource]


def bundled_heads() -> dict[str, Path]:
    """Folders of the heads that ship with the package, by alias."""
    root = Path(str(files("llama_probe").joinpath("hub_cards")))
    if not root.is_dir():  # an editable install or a checkout
        root = Path(__file__).resolve().parents[2] / "hub_cards"
    if not root.is_dir():
        return {}
    return {folder.name: folder for folder in sorted(root.iterdir()) if is_head_folder(folder)}


def resolve_head(source: str | os.PathLike) -> Path:
    """The folder of a head: `source` itself where it is a folder, else the bundled head of that alias.

    Raises:
        ProbeError: neither; the message lists the known aliases.
    """
    if Path(source).is_dir():
        return Path(source)
    bundled = bundled_heads()
    if isinstance(source, str) and source in bundled:
        return bundled[source]
    raise ProbeError(
        f"probe={str(source)!r} is neither a folder nor a bundled head; bundled heads: {', '.join(bundled) or 'none'}"
    )


def check_name(name: str) -> str:
    """A head's name on a model: letters, digits, `-` and `_`.

    Raises:
        ProbeError: it is something else.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ProbeError(
            f"{name!r} cannot name a head: use letters, digits, - and _ (pass name=, or a dict name -> head)"
        )
    return name


def read_heads(spec: ProbeSpec | None) -> dict[str, ProbeModel]:
    """Reads every head of a `probe=` argument, before any model is touched.

    Returns:
        Heads by name: the key of a dict, else the alias or the folder's name.

    Raises:
        ProbeError: a source is not found or damaged, a name is not allowed or occurs twice.
    """
    if spec is None:
        return {}
    if isinstance(spec, (str, os.PathLike)):
        pairs = [(None, spec)]
    elif isinstance(spec, Mapping):
        pairs = list(spec.items())
    elif isinstance(spec, Sequence):
        pairs = [(None, source) for source in spec]
    else:
        raise ProbeError(f"probe= takes a folder, an alias, a list or a dict of names, not {type(spec).__name__}")
    heads: dict[str, ProbeModel] = {}
    for name, source in pairs:
        if isinstance(source, ProbeModel):
            head = source
        elif isinstance(source, (str, os.PathLike)):
            folder = resolve_head(source)
            name = name if name is not None else folder.resolve().name
            head = read_head(folder)
        else:
            raise ProbeError(f"a head is given as a folder or an alias, not as {type(source).__name__}")
        if check_name(name) in heads:
            raise ProbeError(f"two heads are called {name!r}; pass a dict name -> head to tell them apart")
        heads[name] = head
    return heads
