"""Heads on an LM: attached, switched, saved and removed by name."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import CommitInfo
from torch import nn

from ..backbone.decoder import backbone_name, find_decoder, target_of
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.match import check_backbone, describe
from ..heads.probe import ProbeModel
from ..hub.folder import PROBES_FOLDER
from ..hub.resolve import check_name, default_name, with_subfolder
from ..hub.transport import HubOptions
from .loading import SAVED_HEADS


# Held while the heads of any model are replaced. A lock in the model could not be copied or pickled.
_CHANGING = threading.RLock()

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    class CausalLM(PreTrainedModel, GenerationMixin):
        """The classes that the mixins are mixed into."""

else:
    CausalLM = object


class ProbeHostMixin(CausalLM):
    """Probe heads beside a causal LM. Mixed into a `PreTrainedModel`.

    `self.probes` is an `nn.ModuleDict`, so that `.to()`, `.eval()` and `.parameters()` reach the heads. A change replaces this dict
    and the tuple of active names with new ones: a thread that generates keeps the heads with which it started.
    """

    # Filled in for each subclass: the plain class.
    _causal_lm_class: type[CausalLM]

    def _install_probes(self, heads: dict[str, ProbeModel]) -> None:
        self.probes = nn.ModuleDict(heads)
        self._active_probes = tuple(heads)

    @property
    def _heads(self) -> dict[str, ProbeModel]:
        return cast("dict[str, ProbeModel]", dict(self.probes.items()))

    @property
    def active_probes(self) -> list[str]:
        """Names of the heads that run, in the order in which they were attached or activated."""
        return list(self._active_heads())

    def set_active_probes(self, names: str | Iterable[str]) -> None:
        """Choose the heads that run. With an empty list the model is the plain LM.

        Raises:
            ProbeError: no head has one of the names.
        """
        with _CHANGING:
            self._active_probes = tuple(self._active_heads(names))

    def add_probe(self, name: str, config: ProbeConfig | ProbeModel) -> ProbeModel:
        """Attach a `ProbeModel`, or a new head with fresh weights for a `ProbeConfig`, and return it.

        The head moves to the device of the model's last layer and becomes active.

        Raises:
            ProbeError: the name is taken or not allowed, or the head has another hidden size or layer count.
        """
        return self._attach({name: config})[name]

    def load_probe(
        self,
        id_or_path: str | os.PathLike,
        name: str | None = None,
        revision: str | None = None,
        *,
        subfolder: str | None = None,
        strict: bool = False,
        **options,
    ) -> str:
        """Load a head, attach it and return its name.

        Args:
            id_or_path: a head folder, a Hub id or an alias; see `resolve_head`.
            name: the head's name on the model. Defaults to that of the folder, subfolder or repository.
            revision, subfolder: those of a Hub id that names none itself.
            strict: raise instead of warn if the head was trained on another backbone; see `check_backbone`.
            options: `token`, `cache_dir`, `local_files_only`, `force_download`; see `HubOptions`.

        Raises:
            ProbeError: the head cannot be read or does not fit. The model is not changed.
        """
        source = with_subfolder(id_or_path, subfolder)
        name = default_name(source) if name is None else name
        self._attach({name: ProbeModel.load_for(source, target_of(self), HubOptions(revision, **options))}, strict)
        return name

    def delete_probe(self, name: str) -> None:
        """Detach a head.

        Raises:
            ProbeError: no head has that name.
        """
        with _CHANGING:
            self._active_heads(name)
            self._active_probes = tuple(active for active in self._active_probes if active != name)
            self.probes = nn.ModuleDict({key: head for key, head in self.probes.items() if key != name})

    def save_probe(self, dir: str | os.PathLike, name: str | None = None) -> Path:
        """Write one head with its card into the folder `dir`, and return the folder. `name` defaults to the only head.

        Raises:
            ProbeError: no head has that name, or none is named and several are attached.
        """
        return self._heads[self._single_probe(name)].save_pretrained(dir)

    def push_probe_to_hub(self, repo_id: str, name: str | None = None, **kwargs) -> CommitInfo:
        """Upload one head with its card in one commit; see `ProbeModel.push_to_hub`. `name` defaults to the only head.

        Raises:
            ProbeError: no head has that name, or the Hub refused the upload.
        """
        name = self._single_probe(name)
        return self._heads[name].push_to_hub(repo_id, name=name, **kwargs)

    @contextmanager
    def disable_probes(self):
        """Run no head inside the block. After it the same heads are active again."""
        names = self._active_probes
        self.set_active_probes([])
        try:
            yield self
        finally:
            self.set_active_probes([name for name in names if name in self.probes])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict=None,
        *args,
        save_probes: bool = True,
        **kwargs,
    ) -> None:
        """Save the backbone as the plain class does, and each head in `probes/NAME` unless `save_probes` is false.

        `from_pretrained` attaches them again.
        """
        if state_dict is not None:
            state_dict = {key: tensor for key, tensor in state_dict.items() if not key.startswith("probes.")}
        heads = self._heads if save_probes else {}
        if kwargs.get("push_to_hub") and is_main_process:
            _push_heads(kwargs.get("repo_id", Path(save_directory).name), heads, kwargs)
        for name, head in heads.items() if is_main_process else ():  # before the config that lists them
            head.save_pretrained(Path(save_directory) / PROBES_FOLDER / name)
        self._without_probes(heads).save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args, save_probes: bool = True, **kwargs):
        """Upload the backbone as the plain class does, and each head into `probes/NAME`, in a commit of its own.

        Raises:
            ProbeError: `create_pr` without `save_probes=False`, or the Hub refused a head.
        """
        heads = self._heads if save_probes else {}
        _push_heads(repo_id, heads, kwargs)
        return self._without_probes(heads).push_to_hub(repo_id, *args, **kwargs)

    def _without_probes(self, saved: Iterable[str] = ()) -> CausalLM:
        """Return a plain causal LM that shares this model's parameters and caches. Its config lists the saved heads."""
        plain: Any = copy.copy(self)
        plain.__dict__["_modules"] = {key: module for key, module in self._modules.items() if key != "probes"}
        if "_hf_hook" not in plain.__dict__:
            plain.__dict__.pop("forward", None)  # a compiled forward would run this model with its heads
        change_class(plain, self._causal_lm_class)
        plain.config = copy.copy(self.config)
        vars(plain.config).pop(SAVED_HEADS, None)
        if names := list(saved):
            setattr(plain.config, SAVED_HEADS, names)
            base = backbone_name(self)
            if base is not None and not Path(base).exists():  # the heads know the backbone by this name
                plain.config.base_model_name_or_path = base
        return plain

    def _single_probe(self, name: str | None) -> str:
        if name is None and len(self.probes) != 1:
            raise ProbeError(f"name one head: {', '.join(self.probes) or 'none is attached'}")
        return next(iter(self._active_heads(list(self.probes) if name is None else name)))

    def _attach(self, probes: Mapping[str, ProbeConfig | ProbeModel], strict: bool = False) -> dict[str, ProbeModel]:
        with _CHANGING:
            for name in probes:
                if check_name(name) in self.probes:
                    hint = f"choose another name or delete_probe({name!r})"
                    raise ProbeError(f"a head {name!r} is attached already: {hint}")
            heads = fitting_heads(self, probes, strict)
            self.probes = nn.ModuleDict({**self.probes, **heads})
            self._active_probes = (*self._active_probes, *heads)
        return heads

    def _active_heads(self, names: str | Iterable[str] | None = None) -> dict[str, ProbeModel]:
        """Return the heads of one call by name: the given ones, or the active ones."""
        heads = self._heads
        if names is None:  # `del model.probes[name]` leaves the name among the active ones
            return {name: heads[name] for name in self._active_probes if name in heads}
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in heads:
                raise ProbeError(f"no head {name!r} is attached; attached: {', '.join(heads) or 'none'}")
        return {name: heads[name] for name in names}


def fitting_heads(
    lm: nn.Module, probes: Mapping[str, ProbeConfig | ProbeModel], strict: bool = False
) -> dict[str, ProbeModel]:
    """Return heads that are ready to be attached to an LM: checked against it, and on the device of its last layer."""
    heads: dict[str, ProbeModel] = {}
    for name, probe in probes.items():
        if isinstance(probe, ProbeModel):
            check_backbone(name, probe.config, lm, strict, alias=probe.alias)
            heads[name] = probe
        elif isinstance(probe, ProbeConfig):
            heads[name] = ProbeModel(describe(lm, probe))
        else:
            hint = "load_probe takes a folder, a Hub id or an alias"
            raise ProbeError(f"add_probe takes a ProbeModel or a ProbeConfig, not {type(probe).__name__}; {hint}")
    device = find_decoder(lm).device
    return {name: head.to(device).eval() for name, head in heads.items()}


def change_class(model: nn.Module, cls: type) -> None:
    """Give a loaded model another class."""
    hook = model.__dict__.get("_hf_hook")
    if hook is None and "forward" in model.__dict__:
        raise ProbeError("model.forward was replaced: del model.forward, attach heads, then replace it again")
    if hook is None:
        model.__class__ = cls
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(model)
    del model.forward  # accelerate keeps the old class's in the instance
    model.__class__ = cls
    add_hook_to_module(model, hook)


def _push_heads(repo_id: str, heads: Mapping[str, ProbeModel], kwargs: Mapping[str, Any]) -> None:
    if heads and kwargs.get("create_pr"):
        raise ProbeError("create_pr=True needs save_probes=False: each head is a commit of its own")
    options = {key: kwargs[key] for key in ("token", "private", "revision") if key in kwargs}
    for name, head in heads.items():
        head.push_to_hub(repo_id, name=name, subfolder=f"{PROBES_FOLDER}/{name}", **options)
