"""Find the folder of a head from a folder, a Hub id or an alias."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ..errors import ProbeError
from .folder import CONFIG_NAME, PROBES_FOLDER, head_name, list_heads, read_config_values
from .transport import HubOptions, HubReference, check_subfolder, download_head


# The folder of the bundled heads: one folder for each head of the demo backbone, and one for each other backbone. A checkout has it
# beside src.
BUNDLE = Path(__file__).resolve().parents[1] / "hub_cards"
BUNDLE = BUNDLE if BUNDLE.is_dir() else BUNDLE.parents[2] / "hub_cards"
# Bundled heads by their shorter alias, which is the name of their recipe too.
ALIASES = {
    "emotion": "emotion-multimax",
    "imdb": "imdb-multimax",
    "injection": "injection-multimax",
    "safety": "safety-multimax",
    "safety-categories": "safety-categories-multimax",
    "safety-reply": "safety-reply-multimax",
    "sst2": "sst2-multimax",
    "toxicchat": "toxicchat-multimax",
}
_ALIAS = re.compile(r"[\w-]+")
_PRECISION = re.compile(r"([-._](gguf|i?q\d\w*|b?fp?(16|32)))+$")  # at the end of a GGUF file's name
_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))  # torch allows no module with such a name


@dataclass(frozen=True)
class Target:
    """The backbone for which a head is looked up. An alias names a different head for each backbone.

    Attributes:
        name_or_path: folder or Hub id of the backbone.
        hidden_size, num_hidden_layers: its sizes; None for a GGUF file that is not loaded.
        model_type: that of its config; None fits any.
    """

    name_or_path: str | None
    hidden_size: int | None
    num_hidden_layers: int | None
    revision: str | None = None
    model_type: str | None = None

    def fits(self, hidden_size: int | None, num_hidden_layers: int | None) -> bool:
        """Return True if a head of these sizes fits this backbone, as far as its sizes are known."""
        sizes = (hidden_size, num_hidden_layers)
        return self.hidden_size is None or sizes == (self.hidden_size, self.num_hidden_layers)


def model_name(name_or_path: str) -> str:
    """Return a model's name in lower case, without owner, folders and the precision of a GGUF file."""
    return _PRECISION.sub("", Path(name_or_path).name.lower())


def bundled_heads(target: Target | None = None) -> dict[str, Path]:
    """Return the folders of the heads that ship with the package, by name.

    Without a target, all heads are returned: as `NAME` for the demo backbone, as `BACKBONE/NAME` for another backbone. With a
    target, only the heads of its backbone are returned, as `NAME`. The backbone is the one with the target's name, or else the
    only one with its sizes and type.
    """
    configs = [path for depth in ("*", "*/*") for path in sorted(BUNDLE.glob(f"{depth}/{CONFIG_NAME}"))]
    heads = {path.parent.relative_to(BUNDLE).as_posix(): path.parent for path in configs}
    if target is None:
        return heads
    by_backbone: dict[str, dict[str, Path]] = {}
    for folder in heads.values():
        config = read_config_values(folder)
        fits = target.fits(config["hidden_size"], config["num_hidden_layers"])
        if fits and target.model_type in (None, config["base_model_type"]):
            by_backbone.setdefault(model_name(config["base_model_name_or_path"]), {})[folder.name] = folder
    only = next(iter(by_backbone.values())) if len(by_backbone) == 1 else {}
    return by_backbone.get(model_name(target.name_or_path or ""), only)


def bundled_alias(source: str | os.PathLike, folder: Path) -> str | None:
    """Return `source` if it is an alias for which `resolve_head` returned the folder of a bundled head, else None."""
    return source if is_alias(source) and BUNDLE in folder.parents else None


def resolve_head(
    source: str | os.PathLike,
    target: Target | None = None,
    options: HubOptions = HubOptions(),
    *,
    only_config: bool = False,
) -> Path:
    """Return the folder of a head, and fetch it first if it is on the Hub.

    Args:
        source: a folder, a Hub id (`user/repo`, with `@revision` and `:subfolder`) or an alias; a folder comes first. An
            alias names a bundled head for the target, a head in the target's folder, or a head in a subfolder of the
            target's repository.
        target: the backbone. Without a target, an alias names a head of the demo backbone.
        options: for the Hub. The revision is the head's.
        only_config: fetch the head's config, but not its weights, results, card and plots.
    """
    if source == "":  # pathlib takes an empty path for the current folder
        raise ProbeError("probe='' names no head: give a folder, a Hub id or an alias")
    if os.path.isdir(source):  # pathlib's is_dir raises for a name that is too long
        return Path(source)
    if is_alias(source):
        return _resolve_alias(source, target, options, only_config)
    if (bundled := bundled_heads().get(str(source))) is not None:  # BACKBONE/NAME, as `inspect` lists it
        return bundled
    reference = HubReference.parse(str(source))
    if reference is None:
        raise ProbeError(no_bundled_head(str(source), None))
    return download_head(reference, options, only_config=only_config)


def _resolve_alias(alias: str, target: Target | None, options: HubOptions, only_config: bool) -> Path:
    heads = bundled_heads(target)
    backbone = target.name_or_path if target is not None else None
    bundled = heads.get(alias) or heads.get(ALIASES.get(alias, ""))
    if bundled is not None:
        if options.revision is None:
            return bundled
        raise ProbeError(f"probe={alias!r} is a bundled head and has no revision {options.revision!r}")
    details: list[str] = []  # for the message
    if backbone and os.path.isdir(backbone):
        heads = list_heads(backbone) | list_heads(Path(backbone) / PROBES_FOLDER)
        if alias in heads:
            return heads[alias]
        details = [f"in {backbone}: {', '.join(heads)}"] if heads else []
    elif backbone and HubReference.unless_path(backbone) is not None:
        # A repository with a backbone and its heads: both must come from the same commit.
        for place in (alias, f"{PROBES_FOLDER}/{alias}"):
            reference = HubReference(backbone, options.revision or target.revision, place)
            try:
                return download_head(reference, options, only_config=only_config)
            except ProbeError as error:
                details = details or [str(error)]
    raise ProbeError(no_bundled_head(alias, backbone, *details))


def no_bundled_head(alias: str, backbone: str | None, *details: str) -> str:
    """Return the message for an alias that names no head of a backbone, with the command that trains such a head."""
    folders = [folder for folder in bundled_heads().values() if folder.name in (alias, ALIASES.get(alias))]
    if not folders:
        wanted = f"probe={alias!r} is neither a folder nor a bundled head nor a Hub id (user/repo@revision:subfolder)"
        known = ", ".join(sorted({*ALIASES, *(folder.name for folder in bundled_heads().values())}))
        return "; ".join([wanted, f"bundled heads: {known}", *details])
    bases = dict.fromkeys(Path(read_config_values(folder)["base_model_name_or_path"]).name for folder in folders)
    backbone = backbone or "this backbone"
    recipe = max((name for name in ALIASES if alias.startswith(name)), key=len, default=None)
    command = [f"make one: llama-probe train {recipe} --backbone {backbone} --output DIR"] if recipe else []
    return "; ".join(
        [f"probe={alias!r}: no bundled head for {backbone}", f"they are for {', '.join(bases)}", *details, *command]
    )


def with_subfolder(source: str | os.PathLike, subfolder: str | None) -> str | os.PathLike:
    """Return a subfolder of a source: a path in a folder, or a Hub id with `:subfolder`. Without a subfolder return the source."""
    check_place(source)
    if not subfolder:
        return source
    subfolder = subfolder.rstrip("/")
    check_subfolder(subfolder)
    if os.path.isdir(source):
        return Path(source).absolute() / subfolder  # a missing relative path would be taken for a Hub id
    reference = HubReference.parse(str(source))
    if reference is None or reference.subfolder not in (None, subfolder):
        raise ProbeError(f"subfolder={subfolder!r} needs a folder or a Hub id without one, not {str(source)!r}")
    return str(replace(reference, subfolder=subfolder))


def check_place(source: object) -> None:
    """Raise `ProbeError` unless a source is a str or a path."""
    if not isinstance(source, (str, os.PathLike)):
        raise ProbeError(f"a head is given as a folder, a Hub id or an alias, not as {type(source).__name__}")


def is_alias(source: object) -> bool:
    """Return True if a source can be an alias, as its spelling tells."""
    return isinstance(source, str) and _ALIAS.fullmatch(source) is not None


def default_name(source: str | os.PathLike) -> str:
    """Return a head's name from its subfolder, repository, alias or folder, spelled so that `check_name` allows it."""
    reference = HubReference.unless_path(source)
    # abspath keeps the name of a link, and gives `.` the name of its folder.
    path = os.path.abspath(source) if reference is None else reference.subfolder or reference.repo_id
    name = head_name(os.path.basename(path)) or "head"
    return f"{name}-head" if name in _ATTRIBUTES else name


def check_name(name: str) -> str:
    """Return a head's name, of letters, digits, `-` and `_`, if torch modules have no attribute of this name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ProbeError(f"{name!r} cannot name a head: use letters, digits, - and _")
    if name in _ATTRIBUTES:
        raise ProbeError(f"{name!r} cannot name a head: torch modules have this attribute; try {name + '-head'!r}")
    return name
