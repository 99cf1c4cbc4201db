"""Find the folder of a head from a folder, a Hub id or an alias."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..errors import ProbeError
from .folder import list_heads, read_config_values, read_results
from .transport import HubOptions, HubReference, check_subfolder, download_head, without_waiting


_ALIAS = re.compile(r"[\w-]+")
_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))  # torch allows no module with such a name


@dataclass(frozen=True)
class Target:
    """The backbone that a head is looked up for: an alias names another head on each backbone.

    Attributes:
        name_or_path: folder or Hub id of the backbone.
        hidden_size, num_hidden_layers: its sizes.
        revision: its branch, tag or commit.
    """

    name_or_path: str | None
    hidden_size: int
    num_hidden_layers: int
    revision: str | None = None

    @classmethod
    def read(cls, name_or_path: str | os.PathLike, kwargs: Mapping[str, Any], options: HubOptions) -> Target | None:
        """Read the target from a backbone's `config.json`; None if that has no sizes.

        `kwargs` are those of its `from_pretrained`, for `revision` and `subfolder`.
        """
        revision = kwargs.get("revision")
        try:
            config = transformers.AutoConfig.from_pretrained(
                name_or_path,
                revision=revision,
                subfolder=kwargs.get("subfolder") or "",
                token=options.token,
                cache_dir=options.cache_dir,
                local_files_only=options.local_files_only,
                trust_remote_code=False,
            ).get_text_config(decoder=True)
            return cls(str(name_or_path), config.hidden_size, config.num_hidden_layers, revision)
        except (OSError, ValueError, AttributeError):  # a LoRA folder, remote code: loading tells what is wrong
            return None

    def fits(self, hidden_size: int | None, num_hidden_layers: int | None) -> bool:
        """Return True if a head of these sizes fits this backbone."""
        return (hidden_size, num_hidden_layers) == (self.hidden_size, self.num_hidden_layers)


def bundled_heads(target: Target | None = None) -> dict[str, Path]:
    """Return the folders of the heads that ship with the package, by alias; with a target only those that fit it."""
    package = Path(__file__).resolve().parents[1]
    # An editable install or a checkout has the second.
    places = (package / "hub_cards", package.parents[1] / "hub_cards")
    root = next((path for path in places if path.is_dir()), None)
    heads = {} if root is None else list_heads(root)
    if target is None:
        return heads
    sizes = ("hidden_size", "num_hidden_layers")
    return {alias: head for alias, head in heads.items() if target.fits(*map(read_config_values(head).get, sizes))}


def best_head(alias: str, heads: Mapping[str, Path]) -> Path | None:
    """Return the head among `alias-KIND` with the best validation score, or None if there is none.

    Heads are compared by the mean over seeds of the metric they were chosen by; the smaller one wins a tie. Heads
    without results, and heads chosen by another metric than most, do not take part.
    """
    ranked: dict[str, list[tuple[float, int, Path]]] = {}
    for name, folder in heads.items():
        stem, _, kind = name.rpartition("-")
        if stem != alias or read_config_values(folder).get("probe_type") != kind:
            continue
        try:
            results = read_results(folder)
            metric = results["recipe"]["metric"]
            score = float(results["summary"]["validation"][metric]["mean"])
            if math.isfinite(score):
                ranked.setdefault(metric, []).append((score, -int(results["num_parameters"]), folder))
        except (TypeError, KeyError, ValueError, OverflowError):  # no results, or none that can be compared
            continue
    if not ranked:
        return None
    return max(max(ranked.values(), key=len), key=lambda entry: entry[:2])[2]


def resolve_head(
    source: str | os.PathLike,
    target: Target | None = None,
    options: HubOptions = HubOptions(),  # noqa: B008 - frozen
    namespace: str | None = None,
    *,
    only_config: bool = False,
) -> Path:
    """Return the folder of a head, and fetch it first if it is on the Hub.

    Args:
        source: in this order, a folder; a Hub id (`user/repo`, with `@revision` and `:subfolder`); or an alias. An
            alias names a head that is bundled for the target, in the target's own folder, in the repository
            `NAMESPACE/TARGET-probes`, or in the target's own repository. On the Hub it is a subfolder. An alias without
            a kind is the best of the kinds; see `best_head`.
        target: the backbone. Without one, an alias names a bundled head.
        options: for the Hub. The revision is the head's.
        namespace: a Hub user. Defaults to the variable `LLAMA_PROBE_NAMESPACE`.
        only_config: fetch the head's config, but not its weights, results, card and plots.

    Raises:
        ProbeError: there is no such head; the message lists those that exist.
    """
    if source == "":  # pathlib would take it for the current folder
        raise ProbeError("probe='' names no head: give a folder, a Hub id or an alias")
    if os.path.isdir(source):  # unlike that of pathlib, it does not raise for a name that is too long
        return Path(source)
    if is_alias(source):
        return _resolve_alias(source, target, options, namespace, only_config)
    if os.path.isfile(source):
        raise ProbeError(f"probe={str(source)!r} is a file: give the head's folder, {str(Path(source).parent)!r}")
    reference = HubReference.parse(str(source))
    if reference is None:
        told = f"probe={str(source)!r} is neither a folder nor a Hub id (user/repo@revision:subfolder)"
        raise ProbeError(f"{told}; {_known(target)}")
    return download_head(reference, without_waiting(reference, options), only_config=only_config)


def _resolve_alias(
    alias: str, target: Target | None, options: HubOptions, namespace: str | None, only_config: bool
) -> Path:
    told = f"probe={alias!r} is neither a folder nor a bundled head"
    if (chosen := _choose(alias, bundled_heads(target))) is not None:
        if options.revision is None:
            return chosen
        told = f"probe={alias!r} is a bundled head and has no revision {options.revision!r}"
    found = [told, _known(target)]  # and names of heads that exist, for the message
    for place, revision in _places(target, options, namespace):
        if isinstance(place, Path):
            heads = list_heads(place)
            if (chosen := _choose(alias, heads)) is not None:
                return chosen
            found.append(f"in {place}: {', '.join(heads) or 'none'}")
            continue
        reference = HubReference(place, revision, alias)
        try:
            options = without_waiting(reference, options)
            return download_head(reference, options, only_config=only_config)
        except ProbeError as error:
            found.append(str(error))
    raise ProbeError("; ".join(found))


def _choose(alias: str, heads: Mapping[str, Path]) -> Path | None:
    return heads.get(alias) or best_head(alias, heads)


def _places(target: Target | None, options: HubOptions, namespace: str | None) -> Iterator[tuple[Path | str, Any]]:
    """Give the folders and Hub ids where an alias may be for a target, with the revision to ask for."""
    namespace = namespace or os.environ.get("LLAMA_PROBE_NAMESPACE")
    if namespace and not (isinstance(namespace, str) and re.fullmatch(r"[\w.-]+", namespace)):
        raise ProbeError(f"namespace={namespace!r} must be the name of a user or organisation on the Hub")
    if target is None or not target.name_or_path:
        return
    local = os.path.isdir(target.name_or_path)
    if local:
        yield Path(target.name_or_path), None
    if namespace:
        yield f"{namespace}/{Path(target.name_or_path).name}-probes", options.revision
    if not local and target.name_or_path.count("/") == 1:
        # One repository holds both: the head and the backbone come from the same commit.
        yield target.name_or_path, options.revision or target.revision


def _known(target: Target | None) -> str:
    everything = ", ".join(bundled_heads()) or "none"
    if target is None:
        return f"bundled heads: {everything}"
    fitting = ", ".join(bundled_heads(target)) or "none"
    sizes = f"hidden_size={target.hidden_size}, num_hidden_layers={target.num_hidden_layers}"
    return f"bundled heads: {fitting} for {sizes}, of {everything}; set LLAMA_PROBE_NAMESPACE to look for others"


def with_subfolder(source: str | os.PathLike, subfolder: str | None) -> str | os.PathLike:
    """Return `source` narrowed down to a subfolder of a folder or of a repository on the Hub."""
    check_place(source)
    check_subfolder(subfolder)
    if subfolder is None:
        return source
    if os.path.isdir(source):
        return Path(source) / subfolder
    reference = HubReference.parse(str(source))
    if reference is None or reference.subfolder not in (None, subfolder):
        raise ProbeError(f"subfolder={subfolder!r} needs a folder or a Hub id without one, not {str(source)!r}")
    return str(replace(reference, subfolder=subfolder))


def check_place(source: Any) -> None:
    """Raise `ProbeError` unless a source is a str or a path."""
    if not isinstance(source, (str, os.PathLike)):
        raise ProbeError(f"a head is given as a folder, a Hub id or an alias, not as {type(source).__name__}")


def is_alias(source: Any) -> bool:
    """Return True if a source can be an alias, which names another head on each backbone."""
    return isinstance(source, str) and _ALIAS.fullmatch(source) is not None


def default_name(source: str | os.PathLike) -> str:
    """Return a head's name from its subfolder, repository, alias or folder, spelled so that `check_name` allows it."""
    reference = None if os.path.isdir(source) else HubReference.parse(str(source))
    if reference is None:
        name = Path(source).resolve().name
    else:
        name = (reference.subfolder or reference.repo_id).split("/")[-1]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name) or "head"  # a dot separates modules in torch
    return f"{name}-head" if name in _ATTRIBUTES else name


def check_name(name: str) -> str:
    """Return a head's name, of letters, digits, `-` and `_`, if torch modules have no attribute of this name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ProbeError(f"{name!r} cannot name a head: use letters, digits, - and _")
    if name in _ATTRIBUTES:
        raise ProbeError(f"{name!r} cannot name a head: torch modules have this attribute; try {name + '-head'!r}")
    return name
