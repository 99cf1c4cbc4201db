"""Outputs of the LM with the results of its heads, and the records in them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, ClassVar, TypeVar

import torch
from transformers.utils import ModelOutput

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.decision import DecidedMixin, ProbeOutput, labels, probabilities
from ..heads.novelty import Novelty
from .cache import ProbeCache


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Halt:
    """The reason why a prompt got no reply, or why its reply ended early.

    Attributes:
        head: name of the head that flagged it. `None` if a function of the user decided.
        label: the label that was found.
        score: the label's probability; for regression heads the value.
        threshold: the score from which the rule halts.
        token: index of the reply's last token, from 0. `None` if the reply was not begun.
    """

    head: str | None = None
    label: str | None = None
    score: float | None = None
    threshold: float | None = None
    token: int | None = None


@dataclass(frozen=True)
class TokenScores:
    """The scores of one token of each reply.

    Attributes:
        step: index of the token in the reply, from 0.
        outputs: by head name; logits `[rows, num_labels]`, NaN if the token does not count. A row is a prompt, or one of
            its return sequences.
        counted (`torch.BoolTensor` of shape `[rows]`): false for padding and after the end of a reply.
    """

    step: int
    outputs: dict[str, ProbeOutput]
    counted: torch.Tensor


class ProbedOutputMixin(DecidedMixin[dict[str, float]]):
    """An output of the LM with the results of its heads.

    Attributes:
        probe_logits: `[prompts, num_labels]` by head name. `None` if no head ran.
        probe_mean_states: what `probe_novelty` is computed from, by name: total and count of a `MeanStates`.
        probe_halts: a `Halt` or `None` for each prompt, or for each row if replies could be halted. `None` if the call
            halts nothing.
        probe_token_logits: `[rows, new_tokens - 1, num_labels]` by name, for heads that read replies. Column t scores the
            reply up to its token t, from 0. The LM never reads the last token, which has no score. NaN at padding and from
            the end of a reply. `None` without such heads.
        probe_state: the `ProbeCache` that goes with the LM's KV cache. `None` unless the call asked for it.
        texts: the new text of each row, without special tokens. `None` unless the call was given a tokenizer.
    """

    _plain_class: ClassVar[type[ModelOutput]]
    probe_logits: dict[str, torch.Tensor] | None
    probe_mean_states: dict[str, tuple[torch.Tensor, torch.Tensor]] | None
    probe_token_logits: dict[str, torch.Tensor] | None

    def __reduce__(self):
        made, values, *rest = super().__reduce__()
        if made is not probed_output_class(self._plain_class):
            return made, values, *rest
        return _create, (self._plain_class, values), *rest  # pickle would look for the class in a module

    def remember(self, configs: dict[str, ProbeConfig], novelties: dict[str, Novelty]) -> None:
        """Store the configs of the heads by name, and the `Novelty` of those that have one, if the output has none."""
        self.__dict__.setdefault("_probe_configs", configs)
        self.__dict__.setdefault("_probe_novelties", novelties)

    @property
    def probe_probabilities(self) -> dict[str, torch.Tensor] | None:
        """Probabilities `[prompts, num_labels]` by head name, with the saved temperature."""
        return self._probabilities(self.probe_logits)

    @property
    def probe_labels(self) -> dict[str, list[Any]] | None:
        """Labels of each prompt by head name, with the saved temperature and threshold.

        With `abstain_at` a prompt of a larger novelty has the label `None`.
        """
        if self.probe_logits is None:
            return None
        levels = self.abstain_at or {}
        novelty = (self.probe_novelty or {}) if levels else {}
        host = on_host(
            {(name, "logits"): logits for name, logits in self.probe_logits.items()}
            | {(name, "novelty"): values for name, values in novelty.items()}
        )
        configs = {name: self.config_of(name) for name in self.probe_logits}
        return {
            name: labels(
                probabilities(host[name, "logits"], config), config, host.get((name, "novelty")), levels.get(name)
            )
            for name, config in configs.items()
        }

    @property
    def probe_novelty(self) -> dict[str, torch.Tensor] | None:
        """The novelty of each prompt, `[prompts]` from 0 (like the training data) to 1 (unlike it), by head.

        0.99 is the 99th percentile of the head's validation rows. `None` if no head tells; `llama-probe calibrate` fits it.

        Raises:
            ProbeError: the output is a copy, which knows no heads.
        """
        if not self.probe_mean_states:
            return None
        novelties = self.__dict__.get("_probe_novelties")
        if not novelties:
            raise ProbeError("this output has lost its heads (a copy or a gather does that), and so their novelty")
        return {name: novelties[name](*means) for name, means in self.probe_mean_states.items()}

    @property
    def probe_token_probabilities(self) -> dict[str, torch.Tensor] | None:
        """Probabilities in the shape of `probe_token_logits`, with the saved temperature."""
        return self._probabilities(self.probe_token_logits)

    def _probabilities(self, logits: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        if logits is None:
            return None
        return {name: probabilities(each, self.config_of(name)) for name, each in logits.items()}


# Fields that an output of the LM gets, with their types.
PROBED_FIELDS = {
    "probe_logits": "dict[str, torch.Tensor] | None",
    "probe_mean_states": "dict[str, tuple[torch.Tensor, torch.Tensor]] | None",
    "probe_halts": "list[Halt | None] | None",
    "probe_token_logits": "dict[str, torch.Tensor] | None",
    "probe_state": "ProbeCache | None",
    "texts": "list[str] | None",
}


def probed_output_class(base: type[ModelOutput]) -> type[Any]:
    """Return the class of `base` outputs with the fields of `ProbedOutputMixin`."""
    return _make(base)


@functools.cache
def _make(base: type[ModelOutput]) -> type[Any]:
    return make_dataclass(
        f"Probed{base.__name__}",
        [(name, kind, None) for name, kind in PROBED_FIELDS.items()],
        bases=(ProbedOutputMixin, base),
        namespace={"__module__": __name__, "__doc__": f"{base.__name__} with results of heads.", "_plain_class": base},
    )


def _create(base: type[ModelOutput], values: tuple[Any, ...]) -> ModelOutput:
    return probed_output_class(base)(*values)


def with_results(
    output: ModelOutput,
    results: dict[str, ProbeOutput] | None,
    configs: dict[str, ProbeConfig],
    halts: Sequence[Halt | None] | None = None,
    token_logits: dict[str, torch.Tensor] | None = None,
    state: ProbeCache | None = None,
    texts: list[str] | None = None,
) -> ModelOutput:
    """Return a copy of an LM's output with the results of its heads."""
    means = {name: each.means for name, each in (results or {}).items() if each.means is not None}
    probed = probed_output_class(type(output))(
        **output,
        probe_logits=_logits(results),
        probe_mean_states={name: (each.total, each.count) for name, each in means.items()} or None,
        probe_halts=halts,
        probe_token_logits=token_logits,
        probe_state=state,
        texts=texts,
    )
    probed.remember(configs, {name: each.of for name, each in means.items()})
    return probed


def _logits(results: dict[str, ProbeOutput] | None) -> dict[str, torch.Tensor] | None:
    return None if results is None else {name: each.logits for name, each in results.items()}


def with_scores(
    output: ModelOutput | tuple,
    results: dict[str, ProbeOutput] | None,
    configs: dict[str, ProbeConfig],
    state: ProbeCache | None = None,
) -> ModelOutput | tuple:
    """Return the output of `forward` with the results of its heads. A tuple gets the logits as its last entry, or a state."""
    if isinstance(output, ModelOutput):
        return with_results(output, results, configs, state=state)
    return (*output, _logits(results), *([] if state is None else [state]))


def on_host(tensors: Mapping[_Key, _Value]) -> dict[_Key, _Value]:
    """Return tensors on the CPU. Those of one device and one kind of number come in one copy: each waits for the device.

    Values that are no tensors stay.
    """
    copies: dict[Any, Any] = dict(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[Any]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            kind = tensor.dtype if tensor.is_floating_point() else torch.long
            groups.setdefault((tensor.device, kind), []).append(name)
    for (_, kind), names in groups.items():
        there = [copies[name] for name in names]
        flat = torch.cat([tensor.detach().to(kind).flatten() for tensor in there]).cpu()
        parts = flat.split([tensor.numel() for tensor in there])
        for name, tensor, part in zip(names, there, parts, strict=True):
            copies[name] = part.view(tensor.shape).to(tensor.dtype)
    return copies
