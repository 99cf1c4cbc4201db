"""The heads' settings for all processes of an engine, carried in vLLM's `additional_config`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig, read_config
from ..heads.probe import ProbeModel
from ..serving.halting import Halter, HaltRule
from .compatibility import KEY


if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LAYERS = "layers"


@dataclass(frozen=True)
class ProbeSettings:
    """The heads' settings, in plain JSON types.

    Attributes:
        heads: folders by name; every process of the engine must be able to read them.
        halt_on: options by name of the heads that may halt a request; see `Halter`. `None` halts nothing.
        allow_untested_vllm: go on with a version of vLLM that was not tested.
        hide_scores: answer with labels alone.
        halt_reply: text that the server sends to a halted request.
    """

    heads: dict[str, str]
    halt_on: dict[str, dict[str, Any]] | None = None
    allow_untested_vllm: bool = False
    hide_scores: bool = False
    halt_reply: str | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> ProbeSettings:
        """Return the settings that `engine_kwargs` has put into an engine's config."""
        additional = vllm_config.additional_config
        if not isinstance(additional, dict) or KEY not in additional:
            raise ProbeError(
                "this engine has no heads: make its arguments with llama_probe.vllm.engine_kwargs(model, probe=...), or serve "
                "with python -m llama_probe.vllm MODEL --probe HEAD"
            )
        return cls(**{name: value for name, value in additional[KEY].items() if name != _LAYERS})

    def to_dict(self) -> dict[str, Any]:
        """With the layers: vLLM tells compiled models apart by what their configs say, and not by what lies in folders."""
        return {**asdict(self), _LAYERS: self.layers}

    @cached_property
    def configs(self) -> dict[str, ProbeConfig]:
        """The configs of the heads, by name."""
        return {name: read_config(folder) for name, folder in self.heads.items()}

    @cached_property
    def layers(self) -> list[int]:
        """State indices that some head reads, ascending."""
        return sorted({layer for config in self.configs.values() for layer in config.layer_indices})

    @cached_property
    def rules(self) -> list[HaltRule]:
        """The rules by which requests are halted."""
        return [] if self.halt_on is None else Halter(self.halt_on, self.configs).rules

    @cached_property
    def flags(self) -> list[HaltRule]:
        """The rules by which labels are flagged, by head and label: those of `halt_on`, else the heads' own thresholds.

        A head flags what its config names (`flagged`), a multi-label head that names none any label. `halt_on` adds what it
        names, and takes the place of what a head of exclusive labels flags.
        """
        flags: list[HaltRule] = []
        for name, config in self.configs.items():
            rules = {rule.index: rule for rule in self.rules if rule.head == name}
            if config.problem_type == "multi_label_classification":
                labels = config.flagged_labels or list(config.id2label.values())
            else:
                labels = [] if rules else config.flagged_labels
            own = (HaltRule.create(name, config, label) for label in labels)
            rules = {rule.index: rule for rule in own} | rules
            flags += [rules[index] for index in sorted(rules)]
        return flags

    def read_heads(self) -> dict[str, ProbeModel]:
        """Load the heads, by name, in eval mode."""
        return {name: ProbeModel.from_pretrained(folder) for name, folder in self.heads.items()}
