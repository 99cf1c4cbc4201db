"""Outputs of the LM that carry what heads say."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import Any, ClassVar

import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..heads.configuration import ProbeConfig
from ..heads.decision import DecidedMixin, labels, probabilities
from .cache import ProbeCache
from .halting import Halt


class ProbedOutputMixin(DecidedMixin):
    """Adds what the heads say to an output of the LM.

    `probe_logits` is `None` where no head ran. `probe_halts` has one entry a prompt, the `Halt` that kept it from a reply
    or `None`; it is `None` where nothing was to be halted. Where replies could be halted, it has one entry a row.

    `probe_token_logits` has the heads that read replies, and is `None` where there is none: `[rows, new_tokens - 1,
    num_labels]` a head, column t the score of all that counts up to the t-th token of the reply, from 0. The last token is
    read by nobody and has none. From the end of a reply on, and at its padding, there is NaN.

    `probe_state` is what the heads keep of the tokens that `cache` holds, a `ProbeCache`, where it was asked for; else `None`.
    """

    _plain_class: ClassVar[type[ModelOutput]]

    def __reduce__(self):
        made, values, *rest = super().__reduce__()
        if made is not probed_output_class(self._plain_class):
            return made, values, *rest
        return _create, (self._plain_class, values), *rest  # pickle would look for the class in a module

    def remember(self, configs: dict[str, ProbeConfig]) -> None:
        """Says of which heads the logits are, by name, unless that is known."""
        self.__dict__.setdefault("_probe_configs", configs)

    @property
    def probe_probabilities(self) -> dict[str, torch.Tensor] | None:
        """`[batch, num_labels]` a head, with its saved temperature."""
        if self.probe_logits is None:
            return None
        return {name: probabilities(logits, self.config_of(name)) for name, logits in self.probe_logits.items()}

    @property
    def probe_labels(self) -> dict[str, list[Any]] | None:
        """Label names a head and row, with its saved temperature and threshold."""
        probs = self.probe_probabilities
        return None if probs is None else {name: labels(value, self.config_of(name)) for name, value in probs.items()}

    @property
    def probe_token_probabilities(self) -> dict[str, torch.Tensor] | None:
        """As `probe_token_logits`, with the head's saved temperature."""
        if self.probe_token_logits is None:
            return None
        return {name: probabilities(logits, self.config_of(name)) for name, logits in self.probe_token_logits.items()}


_LOGITS = "dict[str, torch.Tensor] | None"
# What an output of the LM gets, and the types.
PROBED_FIELDS = {
    "probe_logits": _LOGITS,
    "probe_halts": "list[Halt | None] | None",
    "probe_token_logits": _LOGITS,
    "probe_state": "ProbeCache | None",
}


@torch.compiler.assume_constant_result
def probed_output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    """`base` with `probe_logits`, a dict of `[batch, num_labels]` tensors by head name, and what `ProbedOutputMixin` adds."""
    return _make(base)


@functools.cache
def _make(base: type[ModelOutput]) -> type[ModelOutput]:
    return make_dataclass(
        f"Probed{base.__name__}",
        [(name, kind, None) for name, kind in PROBED_FIELDS.items()],
        bases=(ProbedOutputMixin, base),
        namespace={
            "__module__": __name__,
            "__doc__": f"{base.__name__} with `probe_logits`: logits by head name.",
            "_plain_class": base,
        },
    )


def _create(base: type[ModelOutput], values: tuple[Any, ...]) -> ModelOutput:
    return probed_output_class(base)(*values)


ProbedCausalLMOutputWithPast = probed_output_class(CausalLMOutputWithPast)
ProbedGenerateDecoderOnlyOutput = probed_output_class(GenerateDecoderOnlyOutput)
ProbedGenerateBeamDecoderOnlyOutput = probed_output_class(GenerateBeamDecoderOnlyOutput)


def with_probe_logits(
    output: ModelOutput,
    probe_logits: dict[str, torch.Tensor] | None,
    configs: dict[str, ProbeConfig],
    halts: Sequence[Halt | None] | None = None,
    token_logits: dict[str, torch.Tensor] | None = None,
    state: ProbeCache | None = None,
) -> ModelOutput:
    """A copy of an LM's output that carries the heads' logits and state, knows their labels, and says what was halted."""
    probed = probed_output_class(type(output))(
        **output, probe_logits=probe_logits, probe_halts=halts, probe_token_logits=token_logits, probe_state=state
    )
    probed.remember(configs)
    return probed


def with_scores(
    output: ModelOutput | tuple,
    logits: dict[str, torch.Tensor] | None,
    configs: dict[str, ProbeConfig],
    state: ProbeCache | None = None,
    state_asked: bool = False,
) -> ModelOutput | tuple:
    """What the LM's `forward` gave, with what the heads say: a tuple with the logits as its last, and the state behind them where
    that was asked for."""
    if isinstance(output, ModelOutput):
        return with_probe_logits(output, logits, configs, state=state)
    return (*output, logits, state) if state_asked else (*output, logits)
