"""What `probe=` may be: a head folder, a Hub id, an alias, a list of these, or a dict of names."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from ..backbone.decoder import find_decoder
from ..errors import ProbeError
from ..files import is_head_folder, read_config, read_head, read_results
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from .transport import HubOptions, HubReference, check_subfolder, download_head, list_heads, without_waiting


_ALIAS = re.compile(r"[\w-]+")
_ATTRIBUTES = frozenset(
    dir(nn.ModuleDict())
)  # of what holds the heads of a model, where torch takes no module of such a name

ProbeSource = str | os.PathLike | ProbeModel
ProbeSpec = ProbeSource | Sequence[ProbeSource] | Mapping[str, ProbeSource]


@dataclass(frozen=True)
class Target:
    """The backbone that heads are looked up for: one alias stands for another head on each.

    Attributes:
        name_or_path: folder or Hub id of the backbone.
        hidden_size, num_hidden_layers: its sizes.
        revision: at which it was asked for.
    """

    name_or_path: str | None
    hidden_size: int
    num_hidden_layers: int
    revision: str | None = None

    @classmethod
    def of(cls, lm: nn.Module) -> Target:
        """The target that a loaded causal LM is."""
        decoder = find_decoder(lm)
        return cls(decoder.name_or_path, decoder.hidden_size, decoder.num_hidden_layers)

    @classmethod
    def read(cls, name_or_path: str | os.PathLike, kwargs: Mapping[str, Any], options: HubOptions) -> Target | None:
        """The target that a folder or a Hub id is, from its `config.json` alone; `None` where that says too little.

        Args:
            kwargs: of `from_pretrained`; its `revision` and `subfolder` are the backbone's.
        """
        revision = kwargs.get("revision")
        try:
            config = AutoConfig.from_pretrained(
                name_or_path,
                revision=revision,
                subfolder=kwargs.get("subfolder") or "",
                token=options.token,
                cache_dir=options.cache_dir,
                local_files_only=options.local_files_only,
                trust_remote_code=False,
            ).get_text_config(decoder=True)
            return cls(str(name_or_path), config.hidden_size, config.num_hidden_layers, revision)
        except (OSError, ValueError, AttributeError):  # a LoRA folder, remote code: loading it will tell what is wrong
            return None

    def fits(self, config: ProbeConfig) -> bool:
        """Whether a head has the sizes of this backbone."""
        sizes = (config.hidden_size, config.num_hidden_layers)
        return sizes == (self.hidden_size, self.num_hidden_layers)


def bundled_heads(target: Target | None = None) -> dict[str, Path]:
    """Folders of the heads that ship with the package, by alias; with a target only those that fit it."""
    package = Path(__file__).resolve().parents[1]
    # The second is where an editable install or a checkout has them.
    places = (package / "hub_cards", package.parents[1] / "hub_cards")
    root = next((path for path in places if path.is_dir()), None)
    if root is None:
        return {}
    heads = heads_in(root)
    return {alias: head for alias, head in heads.items() if target is None or target.fits(read_config(head))}


def heads_in(folder: str | os.PathLike) -> dict[str, Path]:
    """The head folders that lie in a folder, by name."""
    return {item.name: item for item in sorted(Path(folder).iterdir()) if is_head_folder(item)}


def best_head(alias: str, heads: Mapping[str, Path]) -> Path | None:
    """The head that an alias without a kind stands for: of `alias-KIND`, the one with the best validation score.

    Heads are compared by the mean over the seeds of the metric that they were chosen by; of equal ones the smaller comes
    first. Heads that were not measured, or were chosen by another metric than most, do not take part.

    Args:
        heads: folders by alias.
    """
    ranked: dict[str, list[tuple[float, int, Path]]] = {}
    for name, folder in heads.items():
        if name.rpartition("-")[0] != alias or read_config(folder).probe_type != name.rpartition("-")[2]:
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


def probe_namespace(namespace: str | None = None) -> str | None:
    """User or organisation on the Hub that aliases are looked up under.

    The argument, else the environment variable `LLAMA_PROBE_NAMESPACE`, else `"namespace"` in
    `$XDG_CONFIG_HOME/llama_probe/config.json` (`~/.config` where that is not set); `None` where none says.

    Raises:
        ProbeError: the file is no JSON object with a text there.
    """
    chosen = namespace or os.environ.get("LLAMA_PROBE_NAMESPACE")
    path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "llama_probe" / "config.json"
    if not chosen and path.is_file():
        try:
            chosen = json.loads(path.read_text(encoding="utf-8")).get("namespace")
        except (ValueError, AttributeError) as error:
            raise ProbeError(f'{path} must be a JSON object like {{"namespace": "user"}}: {error}') from None
    if chosen is not None and (not isinstance(chosen, str) or not re.fullmatch(r"[\w.-]+", chosen)):
        raise ProbeError(f"namespace {chosen!r} must be the name of a user or organisation on the Hub")
    return chosen or None


def alias_repository(target: Target, namespace: str) -> str:
    """The repository that holds a namespace's heads for a backbone: `namespace/backbone-probes`, a subfolder an alias."""
    return f"{namespace}/{Path(target.name_or_path or 'unknown').name}-probes"


def resolve_head(
    source: str | os.PathLike,
    target: Target | None = None,
    options: HubOptions = HubOptions(),  # noqa: B008 - frozen
    namespace: str | None = None,
) -> Path:
    """The folder of a head, fetched where it is on the Hub.

    Args:
        source: in this order: a folder; a Hub id (`user/repo`, with `@revision` and `:subfolder`); the alias of a head
            that is bundled for the target, that lies in the target's own folder, that a namespace has for the target on
            the Hub (see `probe_namespace` and `alias_repository`), or that lies in the target's own repository there.
            An alias without a kind is the best of the kinds; see `best_head`. On the Hub it is a subfolder of that name.
        target: the backbone. Without one, an alias is that of any bundled head.
        options: for the Hub. Its revision is that of the head.
        namespace: see `probe_namespace`.

    Raises:
        ProbeError: there is no such head; the message lists those that exist.
    """
    if source == "":  # which pathlib takes for the folder that one is in
        raise ProbeError("probe='' names no head: give a folder, a Hub id or an alias")
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file() and not _ALIAS.fullmatch(str(source)):
        raise ProbeError(f"probe={str(source)!r} is a file: give the head's folder, {str(Path(source).parent)!r}")
    if not isinstance(source, str) or not _ALIAS.fullmatch(source):
        reference = HubReference.parse(str(source))
        if reference is None:
            raise ProbeError(
                f"probe={str(source)!r} is neither a folder nor a bundled head nor a Hub id (user/repo, with @revision and "
                f":subfolder where wanted); bundled heads: {', '.join(bundled_heads(target)) or 'none'}"
            )
        return download_head(reference, options)
    bundled = bundled_heads(target)
    if options.revision is None:  # what is bundled has no revisions
        chosen = bundled.get(source) or best_head(source, bundled)
        if chosen is not None:
            return chosen
    namespace = probe_namespace(namespace)
    refused: ProbeError | None = None
    for repository, at in _repositories(target, options, namespace):
        if isinstance(repository, Path):
            beside = heads_in(repository)
            chosen = beside.get(source) or best_head(source, beside)
            if chosen is not None:
                return chosen
            continue
        reference = HubReference(repository, at, source)
        options = without_waiting(reference, options)
        try:
            return download_head(reference, options)
        except ProbeError as error:
            refused = error
    raise ProbeError(_unknown_alias(source, target, bundled, options, namespace, refused))


def _repositories(target: Target | None, options: HubOptions, namespace: str | None):
    """Where an alias may lie for a target: (folder or Hub id, revision), in order."""
    if target is None or not target.name_or_path:
        return
    local = Path(target.name_or_path).is_dir()
    if local:
        yield Path(target.name_or_path), None
    if namespace:
        yield alias_repository(target, namespace), options.revision
    if not local and target.name_or_path.count("/") == 1:
        # One repository holds both: the head is taken from the commit that the backbone is taken from.
        yield target.name_or_path, options.revision or target.revision


def _unknown_alias(source, target, bundled, options, namespace, refused) -> str:
    backbone = (target.name_or_path or "this backbone") if target else None
    lines = [f"probe={source!r} is neither a folder nor a bundled head" + (f" for {backbone}" if target else "")]
    if source in bundled or best_head(source, bundled) is not None:
        lines = [
            f"probe={source!r} is a bundled head, and has no revisions such as {options.revision!r}: leave it out"
        ]
    lines.append(f"bundled heads: {', '.join(bundled) or 'none'}")
    for repository, at in _repositories(target, options, namespace=None):  # the backbone's own folder or repository
        local = isinstance(repository, Path)
        found = list(heads_in(repository)) if local else list_heads(repository, replace(options, revision=at))
        if not local and options.local_files_only:
            lines.append(f"the Hub, where {repository} may have more, was not asked or not reached")
        if found := [head for head in found if head]:
            lines.append(f"beside the backbone: {', '.join(found)}")
    others: dict[str, list[str]] = {}
    for alias, folder in bundled_heads().items():
        if alias not in bundled:
            config = read_config(folder)
            sizes = f"hidden_size={config.hidden_size}, num_hidden_layers={config.num_hidden_layers}"
            others.setdefault(f"{config.base_model_name_or_path} with {sizes}", []).append(alias)
    if others:
        lines.append(
            f"{backbone} has hidden_size={target.hidden_size}, num_hidden_layers={target.num_hidden_layers}; "
            "bundled for other backbones: "
            + "; ".join(f"{', '.join(names)} ({other})" for other, names in others.items())
        )
    if target and namespace:
        repository = alias_repository(target, namespace)
        found = [head for head in list_heads(repository, options) if head]
        lines.append(f"on the Hub in {repository}: {', '.join(found) or 'none'}")
        if refused is not None and not found:
            lines.append(str(refused))
    elif target:
        lines.append(
            "set LLAMA_PROBE_NAMESPACE, or pass probe_namespace= (namespace= of load_probe), to look for user/"
            f"{Path(target.name_or_path or 'backbone').name}-probes on the Hub"
        )
    return "; ".join(lines)


def inside(source: str | os.PathLike, subfolder: str | None) -> str | os.PathLike:
    """`source` narrowed down to a subfolder, of a folder or of a repository on the Hub.

    Raises:
        ProbeError: `source` is no text and no path, the subfolder is not inside, or `source` names another one itself.
    """
    _check_place(source)
    check_subfolder(subfolder)
    if subfolder is None:
        return source
    if Path(source).is_dir():
        return Path(source) / subfolder
    reference = HubReference.parse(str(source))
    if reference is None or reference.subfolder not in (None, subfolder):
        raise ProbeError(
            f"subfolder={subfolder!r} does not go with {str(source)!r}: it needs a folder or a Hub id without one"
        )
    return str(HubReference(reference.repo_id, reference.revision, subfolder))


def _check_place(source: Any) -> None:
    if not isinstance(source, (str, os.PathLike)):
        raise ProbeError(f"a head is given as a folder, a Hub id or an alias, not as {type(source).__name__}")


def default_name(source: str | os.PathLike) -> str:
    """The name of a head where none is given: the subfolder, the repository's name, the alias or the folder's name, with a `-`
    for what a name may not hold, and `-head` behind one that is taken; see `check_name`."""
    reference = None if Path(source).is_dir() else HubReference.parse(str(source))
    if reference is None:
        name = Path(source).resolve().name
    else:
        name = (reference.subfolder or reference.repo_id).split("/")[-1]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name) or "head"  # such as dots, which separate modules in torch
    return f"{name}-head" if name in _ATTRIBUTES else name


def check_name(name: str) -> str:
    """A head's name on a model: letters, digits, `-` and `_`, and nothing that a torch module has already, such as `type`.

    Raises:
        ProbeError: it is something else.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ProbeError(
            f"{name!r} cannot name a head: use letters, digits, - and _ (pass name=, or a dict name -> head)"
        )
    if name in _ATTRIBUTES:
        raise ProbeError(
            f"{name!r} cannot name a head: torch modules have an attribute of that name. Give another one (name=, or a dict "
            f"name -> head), such as {name + '-head'!r}"
        )
    return name


def needs_target(spec: ProbeSpec | None) -> bool:
    """Whether an argument names an alias, which stands for another head on each backbone."""
    sources: Sequence[Any] = list(spec.values()) if isinstance(spec, Mapping) else _as_list(spec)
    return any(isinstance(source, str) and _ALIAS.fullmatch(source) for source in sources)


def named_sources(spec: ProbeSpec | None) -> dict[str, ProbeSource]:
    """The heads of a `probe=` argument by name: the key of a dict, else see `default_name`.

    Raises:
        ProbeError: a source is of another type, or a name is not allowed or occurs twice.
    """
    pairs = list(spec.items()) if isinstance(spec, Mapping) else [(None, source) for source in _as_list(spec)]
    sources: dict[str, ProbeSource] = {}
    for name, source in pairs:
        if not isinstance(source, ProbeModel):
            _check_place(source)
            name = name if name is not None else default_name(source)
        if check_name(name) in sources:
            raise ProbeError(
                f"two heads are called {name!r}; pass a dict name -> head to tell them apart, or put one into a folder of "
                "another name (llama-probe pull)"
            )
        sources[name] = source
    return sources


def read_heads(
    spec: ProbeSpec | None,
    target: Target | None = None,
    options: HubOptions = HubOptions(),  # noqa: B008 - frozen
    namespace: str | None = None,
) -> dict[str, ProbeModel]:
    """Reads every head of a `probe=` argument, before any model is touched.

    Args:
        spec: a source of `resolve_head` or a `ProbeModel`, a list of these, or a dict name -> one of these.
        target, options, namespace: see `resolve_head`.

    Returns:
        Heads by name; see `named_sources`.

    Raises:
        ProbeError: a source is not found or damaged, a name is not allowed or occurs twice.
    """
    return {
        name: source if isinstance(source, ProbeModel) else read_head(resolve_head(source, target, options, namespace))
        for name, source in named_sources(spec).items()
    }


def read_heads_beside(
    spec: ProbeSpec | None,
    backbone: str | os.PathLike,
    kwargs: Mapping[str, Any],
    revision: str | None = None,
    namespace: str | None = None,
) -> dict[str, ProbeModel]:
    """`read_heads` for a backbone that is about to be loaded.

    Args:
        spec: heads.
        backbone: folder or Hub id.
        kwargs: the arguments that it will be loaded with. Token, cache and offline settings count for heads as well.
        revision, namespace: of the heads.
    """
    options = HubOptions.beside(kwargs, revision)
    target = Target.read(backbone, kwargs, options) if needs_target(spec) else None
    return read_heads(spec, target, options, namespace)


def _as_list(spec: Any) -> list[Any]:
    if spec is None:
        return []
    if isinstance(spec, (str, os.PathLike, ProbeModel)):
        return [spec]
    if isinstance(spec, Sequence):
        return list(spec)
    raise ProbeError(
        f"probe= takes a folder, a Hub id, an alias, a list or a dict of names, not {type(spec).__name__}"
    )
