"""Heads on a language model: attached by name, switched on and off, saved and removed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers.utils import logging

from .capture import Decoder, find_decoder
from .configuration import ProbeConfig
from .errors import ProbeError
from .files import save_head
from .probe import ProbeModel
from .resolve import check_name, read_heads, resolve_head


logger = logging.get_logger(__name__)


class ProbeHostMixin:
    """Keeps probe heads beside a causal LM. Mixed into a `PreTrainedModel`.

    The heads live in `self.probes`, an `nn.ModuleDict`, so that `.to()`, `.eval()` and `.parameters()` reach them.
    Both it and the tuple of active names are replaced rather than changed, so that a thread that generates keeps the
    heads that it started with.
    """

    def _install_probes(self) -> None:
        self.probes = nn.ModuleDict()
        self._active_probes: tuple[str, ...] = ()

    @property
    def _decoder(self) -> Decoder:
        return find_decoder(self)

    @property
    def active_probes(self) -> list[str]:
        """Names of the heads that run, in the order in which they were attached or activated."""
        return list(self._active_probes)

    def set_active_probes(self, names: str | Iterable[str]) -> None:
        """Chooses the heads that run. An empty list turns the model into the plain LM until the next call.

        Raises:
            ProbeError: a name that is not attached; the message lists those that are.
        """
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            self._require_probe(name)
        self._active_probes = tuple(dict.fromkeys(names))

    def add_probe(self, name: str, probe: ProbeConfig | ProbeModel) -> ProbeModel:
        """Attaches a head: a trained `ProbeModel`, or a `ProbeConfig` for a new one with fresh weights.

        The head moves to the device of the model's last state, becomes active, and is returned.

        Raises:
            ProbeError: the name is taken or not allowed, or the head was made for another hidden size or layer count.
        """
        self._attach({name: probe})
        return self.probes[name]

    def load_probe(self, source: str | os.PathLike, name: str | None = None, strict: bool = False) -> str:
        """Reads a head and attaches it.

        Args:
            source: a head folder or a bundled alias.
            name: the head's name here; the alias or the folder's name where left out.
            strict: raise, rather than warn, where the head names another base model.

        Returns:
            The head's name.

        Raises:
            ProbeError: the head cannot be read or does not fit; the model is then as it was.
        """
        name = resolve_head(source).resolve().name if name is None else name
        if check_name(name) in self.probes:
            raise ProbeError(
                f"a head {name!r} is attached already; pass another name, or delete_probe({name!r}) first"
            )
        self._attach(read_heads({name: source}), strict=strict)
        return name

    def delete_probe(self, name: str) -> None:
        """Detaches a head.

        Raises:
            ProbeError: no head has that name.
        """
        self._require_probe(name)
        self._active_probes = tuple(active for active in self._active_probes if active != name)
        self.probes = nn.ModuleDict({key: head for key, head in self.probes.items() if key != name})

    def save_probe(self, folder: str | os.PathLike, name: str | None = None) -> Path:
        """Writes one head into a folder; `name` may be left out where one head is attached.

        Raises:
            ProbeError: no head has that name, or several are attached and none is named.
        """
        if name is None:
            if len(self.probes) != 1:
                raise ProbeError(f"name the head to save: {', '.join(self.probes) or 'none is attached'}")
            name = next(iter(self.probes))
        self._require_probe(name)
        return save_head(self.probes[name], folder)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves the backbone exactly as the plain class does. Heads are saved by `save_probe`."""
        self._without_probes().save_pretrained(save_directory, *args, **kwargs)

    def _without_probes(self) -> nn.Module:
        """A plain causal LM that shares this model's parameters, config and caches, and knows nothing of heads."""
        plain = copy.copy(self)
        plain.__dict__["_modules"] = {key: module for key, module in self._modules.items() if key != "probes"}
        plain.__class__ = self._causal_lm_class
        return plain

    def _require_probe(self, name: str) -> None:
        if name not in self.probes:
            raise ProbeError(f"no head {name!r} is attached; attached: {', '.join(self.probes) or 'none'}")

    def _attach(self, probes: dict[str, ProbeConfig | ProbeModel], strict: bool = False) -> None:
        # Everything that can fail comes first: either all heads are attached or none.
        decoder = self._decoder
        heads: dict[str, ProbeModel] = {}
        for name, probe in probes.items():
            if check_name(name) in self.probes:
                raise ProbeError(
                    f"a head {name!r} is attached already; choose another name or delete_probe({name!r}) first"
                )
            config = probe.config if isinstance(probe, ProbeModel) else probe
            matched = decoder.match(config)
            _check_base_model(name, config, decoder, strict)
            heads[name] = probe if isinstance(probe, ProbeModel) else ProbeModel(matched)
        device = decoder.device
        for head in heads.values():
            head.to(device).eval()
        self.probes = nn.ModuleDict({**self.probes, **heads})
        self._active_probes = (*self._active_probes, *heads)

    def _active_heads(self) -> dict[str, ProbeModel]:
        heads = self.probes
        return {name: heads[name] for name in self._active_probes if name in heads}


def _check_base_model(name: str, config: ProbeConfig, decoder: Decoder, strict: bool) -> None:
    trained_on, here = config.base_model_name_or_path, decoder.name_or_path
    # Copies of one model lie under many paths; the last part of the name is what they share.
    if not trained_on or not here or Path(trained_on).name.lower() == Path(here).name.lower():
        return
    message = f"head {name!r} was trained on {trained_on}, this backbone is {here}: its scores may mean nothing here"
    if strict:
        raise ProbeError(message)
    logger.warning(message)
