"""The config of a probe head, as `probe_config.json` holds it. Part of the runtime that an exported repository carries.

The runtime reads prompts with heads that lie in the repository: `forward`, `generate`, `classify`, and `halt_on` before the first
token. The rest is in the package, `pip install llama_probe`, which loads the same repository. SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


TURN_SCOPES = ("last_user", "user", "turns")
# Fields that say nothing about scores, and are not part of the config's digest.
_NOT_SCORED = {"config_sha256", "llama_probe_version", "transformers_version"} | {
    f"base_model_{name}" for name in ("name_or_path", "revision", "type", "class", "dtype", "quantization")
}
_HEAD_TYPES: dict[str, type] = {}


class ProbeError(ValueError):
    """Something a user can mend."""


def needs_package(what: str) -> ImportError:
    """Return the error for what this runtime does not do."""
    return ImportError(f"{what} needs the package: pip install llama_probe")


def register_probe_type(name: str):
    """Return a class decorator that makes a head type available as `probe_type=name`."""

    def register(cls):
        _HEAD_TYPES[name] = cls
        return cls

    return register


def get_probe_type(name: str) -> type:
    """Return the class of a head type."""
    if name not in _HEAD_TYPES:
        raise needs_package(f"a head of the type {name!r}")
    return _HEAD_TYPES[name]


@dataclass
class ProbeConfig:
    """The fields of a head's config that its scores depend on. They are explained in `llama_probe.ProbeConfig`."""

    probe_type: str
    id2label: dict[int, str]
    hidden_size: int
    num_hidden_layers: int
    num_labels: int = 2
    problem_type: str = "single_label_classification"
    pool: str = "mean"
    num_attention_heads: int = 2
    downcast: int = 32
    normalize: str = "layernorm"
    layers: str | list[int] = "all"
    token_scope: str = "prompt"
    window: int = 0
    causal: bool = False
    prefix_ids: list[int] = field(default_factory=list)
    turn_markers: dict[str, dict[str, Any]] | None = None
    prompt_format: str = "unknown"
    system_prompt: str | None = None
    max_length: int | None = None
    flagged: list[str] | None = None
    threshold: float | list[float] | None = None
    thresholds: dict[str, float] | None = None
    temperature: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None

    @classmethod
    def from_json(cls, text: str) -> ProbeConfig:
        """Read a config that the package has saved.

        Raises:
            ProbeError: it was changed after it was saved. ImportError: the head follows replies or tools.
        """
        values = json.loads(text)
        scored = {key: value for key, value in values.items() if key not in _NOT_SCORED}
        digest = hashlib.sha256(json.dumps(scored, sort_keys=True).encode()).hexdigest()
        if values.get("config_sha256") not in (None, digest):
            raise ProbeError("probe_config.json was changed after it was saved: fetch it again")
        names = {item.name for item in dataclasses.fields(cls)}
        config = cls(**{key: value for key, value in values.items() if key in names})
        config.id2label = {int(index): name for index, name in config.id2label.items()}
        if config.token_scope in ("response", "all", "tool"):
            raise needs_package(f"a head that follows replies or tools (token_scope={config.token_scope!r})")
        return config

    @property
    def flagged_index(self) -> int | None:
        """Index of the flagged one of two labels; None for other heads, and for a head that flags none."""
        two, names = self.num_labels == 2, list(self.id2label.values())
        single = self.problem_type == "single_label_classification"
        return names.index(self.flagged[0]) if self.flagged and two and single else None

    @property
    def sizes(self) -> tuple[int, int]:
        """Sizes of the backbone: `hidden_size` and `num_hidden_layers`."""
        return self.hidden_size, self.num_hidden_layers

    @property
    def layer_indices(self) -> list[int]:
        """Indices of the hidden states that the head reads, ascending."""
        named = list(range(self.num_hidden_layers + 1)) if self.layers == "all" else list(self.layers)
        return named[-1:] if get_probe_type(self.probe_type).reads == "last" else named

    def threshold_of(self, index: int) -> float | None:
        """Return the probability from which a label is given; None if the largest probability decides."""
        if self.problem_type == "multi_label_classification":
            threshold = 0.5 if self.threshold is None else self.threshold
            return threshold[index] if isinstance(threshold, list) else threshold
        return self.threshold if index == self.flagged_index else None
