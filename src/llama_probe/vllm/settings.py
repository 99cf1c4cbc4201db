"""The heads' settings for all processes of an engine, carried in vLLM's `additional_config`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import ProbeError
from ..files import JSON
from ..heads import import_head_types
from ..heads.configuration import ProbeConfig, read_config, shared_layers
from ..serving.halting import Halter, HaltRule
from .compatibility import KEY, check_config


if TYPE_CHECKING:
    from vllm.config import VllmConfig

NO_FUNCTIONS = "halt_on takes no functions here, where another process decides: name heads and thresholds"


@dataclass(frozen=True)
class ProbeSettings:
    """The heads' settings, in plain JSON types. See `engine_kwargs` for those that are not listed here.

    Attributes:
        heads: the head folders by name. Every process of the engine reads them.
        hide_scores: answer with labels alone.
        halt_reply: text that the server sends for a halted request.
        unsure: (low, high) of heads in `halt_on`, by name: the server's judge decides on prompts with low <= score < high.
        judge: fields of `Judge`. Only the server asks it.
    """

    heads: dict[str, str]
    halt_on: dict[str, JSON] | None = None
    monitor: dict[str, JSON] | None = None
    hold_back: int = 0
    hide_scores: bool = False
    halt_reply: str | None = None
    unsure: dict[str, tuple[float, float]] | None = None
    judge: JSON | None = None
    import_files: list[str] | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> ProbeSettings:
        """Return the settings that `engine_kwargs` has put into an engine's config. Import the files that register types."""
        additional = vllm_config.additional_config
        if not isinstance(additional, dict) or KEY not in additional:
            raise ProbeError("this engine has no heads: make its arguments with engine_kwargs(model, probe=...)")
        settings = cls(**additional[KEY])
        for path in settings.import_files or ():
            import_head_types(path)
        return settings

    @cached_property
    def configs(self) -> dict[str, ProbeConfig]:
        return {name: read_config(folder) for name, folder in self.heads.items()}

    @cached_property
    def layers(self) -> list[int]:
        """Indices of the states that some head reads, ascending."""
        return shared_layers(self.configs.values())

    @cached_property
    def reply_heads(self) -> list[str]:
        return [name for name, config in self.configs.items() if config.reads_reply]

    @cached_property
    def rules(self) -> list[HaltRule]:
        """The rules by which requests are halted."""
        bands = self.unsure or {}
        return [replace(rule, unsure=bands.get(rule.head)) for rule in Halter(self.halt_on, self.configs).rules]

    @property
    def guards_replies(self) -> bool:
        """True if some head may halt replies."""
        return any(rule.config.reads_reply for rule in self.rules)

    @cached_property
    def flags(self) -> list[HaltRule]:
        """The rules by which labels are flagged, in the order of heads and labels.

        A head flags the labels in its config's `flagged`. A multi-label head without `flagged` flags all of its labels. Rules of
        `halt_on` and `monitor` come on top for a multi-label head, or replace the rule of their label. For another head they replace
        all rules.
        """
        named = list(self.rules)
        try:
            named += Halter(self.monitor, self.configs).rules
        except ProbeError as error:
            raise ProbeError(str(error).replace("halt_on", "monitor").replace("--halt-on", "--monitor")) from None
        flags: list[HaltRule] = []
        for name, config in self.configs.items():
            rules = {rule.index: rule for rule in named if rule.head == name}
            if config.problem_type == "multi_label_classification":
                labels = config.flagged or list(config.id2label.values())
            else:
                labels = [] if rules else config.flagged or []
            saved = (rule for label in labels for rule in HaltRule.create_all(name, config, label))
            rules = {rule.index: rule for rule in saved} | rules
            flags += [rules[index] for index in sorted(rules)]
        return flags

    def check(self, speculates: bool) -> None:
        """Raise `ProbeError` if the rules do not go with the heads, each other, or an engine that drafts tokens."""
        if both := sorted(set(self.halt_on or ()) & set(self.monitor or ())):
            raise ProbeError(f"halt_on and monitor both name {', '.join(both)}: a head does one or the other")
        if any(rule.ask is not None for rule in self.flags):
            raise ProbeError(NO_FUNCTIONS)
        for rule in self.rules:
            if rule.unsure is not None and (rule.config.token_scope == "response" or rule.patience > 1):
                raise ProbeError(f"unsure: {rule.head!r} reads replies alone or has patience; judges are for prompts")
        if self.hold_back and not self.guards_replies:
            raise ProbeError(f"hold_back={self.hold_back} needs a head in halt_on that follows replies")
        if speculates and (names := ", ".join(self.reply_heads)):
            raise ProbeError(f"speculative_config does not go with heads that follow replies: {names}")

    def check_engine(self, config: VllmConfig) -> None:
        """Raise `ProbeError` if a complete config does not go with these heads, or lacks a part of what they need."""
        check_config(config)
        self.check(config.speculative_config is not None)
        # vLLM sends sampling masks and experts of tokens by themselves, so they cannot be held back with the tokens.
        if self.guards_replies and (config.model_config.return_sampling_mask or config.aux_output_config.enabled):
            names = ", ".join(self.reply_heads)
            raise ProbeError(f"return_sampling_mask does not go with heads that follow replies: {names}")
