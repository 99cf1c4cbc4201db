"""Outputs of the LM with the results of its heads."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, make_dataclass
from typing import Any, TypeVar

import torch
from transformers.utils import ModelOutput

from ..errors import ProbeError
from ..files import JSON
from ..heads.decision import DecidedMixin, ProbeOutput, describe_predictions, labels, probabilities
from ..heads.probe import ProbeModel
from .cache import ProbeCache


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Halt:
    """The reason why a prompt got no reply, or why its reply ended early.

    Attributes:
        head: name of the head that flagged it. `None` if a function of the user decided.
        label: the label that was found.
        score: the label's probability; for regression heads the value. `None` if it is not a number, or there is none.
        threshold: the score from which the rule halts.
        token: index of the reply's last token, from 0. `None` if the reply was not begun.
        span: of a prompt that a head with windows flagged: its first token in the window and one past the last, as in `probe_spans`.
            Else `None`.
    """

    head: str | None = None
    label: str | None = None
    score: float | None = None
    threshold: float | None = None
    token: int | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class TokenScores:
    """The scores of one token of each reply.

    Attributes:
        step: index of the token in the reply, from 0.
        outputs: by head name; logits `[rows, num_labels]`, NaN if the token does not count: then `labels` raises. A row is a
            prompt, or one of its return sequences.
        counted (`torch.BoolTensor` of shape `[rows]`): false for padding and after the end of a reply.
    """

    step: int
    outputs: dict[str, ProbeOutput]
    counted: torch.Tensor


class ProbedOutputMixin(DecidedMixin):
    """An output of the LM with the results of its heads.

    Attributes:
        probe_logits: `[prompts, num_labels]` by head name. `None` if no head ran.
        probe_spans: `[prompts, num_labels, 2]` int64 by head name, for heads with windows: the first token and one past the last of
            the window that gave each label its logit. Tokens are columns of the prompts, padding included. `None` without such
            heads.
        probe_mean_states: total and count of a `MeanStates` by head name, from which `probe_novelty` is computed.
        probe_halts: a `Halt` or `None` for each prompt, or for each row if replies could be halted. `None` if the call
            halts nothing.
        probe_token_logits: `[rows, new_tokens - 1, num_labels]` by head name, for heads that read replies. Column t scores the
            reply up to its token t, from 0. The last token has no score, because the LM never reads it. NaN at padding and from
            the end of a reply on. `None` without such heads.
        probe_state: the `ProbeCache` that goes with the LM's KV cache. `None` unless the call asked for it.
        texts: the new text of each row, without special tokens. `None` unless the call was given a tokenizer.
    """

    probe_logits: dict[str, torch.Tensor] | None
    probe_spans: dict[str, torch.Tensor] | None
    probe_mean_states: dict[str, tuple[torch.Tensor, torch.Tensor]] | None
    probe_halts: list[Halt | None] | None
    probe_token_logits: dict[str, torch.Tensor] | None
    probe_state: ProbeCache | None
    texts: list[str] | None

    def __reduce__(self) -> tuple[Any, ...]:
        _, values, *rest = super().__reduce__()  # pickle would look for the class in a module
        return _create, (type(self).__bases__[-1], values), *rest

    def remember(self, heads: Mapping[str, ProbeModel]) -> None:
        """Store the config of each head, and its `Novelty` if it has one. An output that has these keeps them."""
        if "_probe_configs" not in self.__dict__:
            self.__dict__["_probe_configs"] = {name: head.config for name, head in heads.items()}
            self.__dict__["_probe_novelties"] = {name: head.novelty for name, head in heads.items()}

    @property
    def probe_probabilities(self) -> dict[str, torch.Tensor] | None:
        """Probabilities `[prompts, num_labels]` by head name, with the saved temperature."""
        return self._probabilities(self.probe_logits)

    @property
    def probe_token_probabilities(self) -> dict[str, torch.Tensor] | None:
        """Probabilities in the shape of `probe_token_logits`, with the saved temperature."""
        return self._probabilities(self.probe_token_logits)

    def _probabilities(self, logits: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        if logits is None:
            return None
        return {name: probabilities(each, self.config_of(name)) for name, each in logits.items()}

    @property
    def probe_labels(self) -> dict[str, list[Any]] | None:
        """Labels of each prompt by head name, with the saved temperature and threshold.

        With `abstain_at` a prompt of a larger novelty has the label `None`.
        """
        if self.probe_logits is None:
            return None
        levels = self.abstain_at or {}
        novelty = (self.probe_novelty or {}) if levels else {}
        host = on_host({**self.probe_logits, **{(name,): values for name, values in novelty.items()}})
        results = {}
        for name in self.probe_logits:
            config = self.config_of(name)
            results[name] = labels(probabilities(host[name], config), config, host.get((name,)), levels.get(name))
        return results

    @property
    def probe_novelty(self) -> dict[str, torch.Tensor] | None:
        """The novelty of each prompt, `[prompts]` from 0 (like the training data) to 1 (unlike it), by head.

        0.99 is the 99th percentile of the head's validation rows. `None` if no head tells; `llama-probe calibrate` fits it.

        Raises:
            ProbeError: the output is a copy, which knows no heads.
        """
        if not self.probe_mean_states:
            return None
        if (novelties := self.__dict__.get("_probe_novelties")) is None:
            raise ProbeError("this output has lost its heads (a copy or a gather does that), and so their novelty")
        return {name: novelties[name](*means) for name, means in self.probe_mean_states.items()}

    def describe(self, rows: int) -> list[JSON]:
        """Return what the heads say of each row as JSON values.

        Args:
            rows: number of sequences. Several sequences of one prompt have the same scores of the prompt.

        Returns:
            For each row `probes`: by head name what `describe_predictions` says. Heads that read replies alone give their score
            of the reply as far as the LM has read it, or `None` if the LM has read no token of it. If the call may halt, there is
            `halted`: the fields of a `Halt`, or `None`.
        """
        records: list[JSON] = [{"probes": {}} for _ in range(rows)]
        labels, novelty, spans = self.probe_labels or {}, self.probe_novelty or {}, self.probe_spans or {}
        for name, probs in (self.probe_probabilities or {}).items():
            extras = novelty.get(name), spans.get(name)
            prompts = describe_predictions(labels[name], probs, self.config_of(name), *extras)
            for row, record in enumerate(records):
                record["probes"][name] = prompts[row * len(prompts) // rows]
        for name, logits in (self.probe_token_logits or {}).items():
            if name not in (self.probe_logits or {}):
                config = self.config_of(name)
                for record, scores in zip(records, logits, strict=True):
                    last = scores[~scores.isnan().any(dim=-1)][
                        -1:
                    ]  # [1, num_labels], or [0, num_labels] if none was read
                    record["probes"][name] = ProbeOutput.from_logits(last, config).describe()[0] if len(last) else None
        halts = self.probe_halts or []  # one a prompt or a row
        for row, record in enumerate(records if halts else ()):
            halt = halts[row * len(halts) // rows]
            record["halted"] = None if halt is None else asdict(halt)
        return records


@functools.cache
def probed_output_class(base: type[ModelOutput]) -> type[Any]:
    """Return the class of `base` outputs with the fields of `ProbedOutputMixin`."""
    fields = [(name, annotation, None) for name, annotation in ProbedOutputMixin.__annotations__.items()]
    namespace = {"__module__": __name__, "__doc__": f"{base.__name__} with results of heads."}
    return make_dataclass(f"Probed{base.__name__}", fields, bases=(ProbedOutputMixin, base), namespace=namespace)


def _create(base: type[ModelOutput], values: tuple[Any, ...]) -> ModelOutput:
    return probed_output_class(base)(*values)


def with_results(
    output: Any, results: dict[str, ProbeOutput] | None, heads: Mapping[str, ProbeModel], **fields: Any
) -> Any:
    """Return a copy of an LM's output with the results of its heads, and other fields of `ProbedOutputMixin`.

    If the output is a tuple, the logits are added as its last entry, and after them `probe_state` if there is one.
    """
    logits = None if results is None else {name: each.logits for name, each in results.items()}
    if not isinstance(output, ModelOutput):
        state = fields.get("probe_state")
        return (*output, logits, *([] if state is None else [state]))
    fields["probe_spans"] = {
        name: each.spans for name, each in (results or {}).items() if each.spans is not None
    } or None
    means = {name: each.means for name, each in (results or {}).items() if each.means is not None}
    fields["probe_mean_states"] = {name: (each.total, each.count) for name, each in means.items()} or None
    probed = probed_output_class(type(output))(**output, probe_logits=logits, **fields)
    probed.remember(heads)
    return probed


def on_host(tensors: Mapping[_Key, _Value]) -> dict[_Key, _Value]:
    """Return tensors on the CPU; values that are not tensors are returned as they are.

    Each copy from a device waits for the device. So all whole numbers of a device come in one copy, and all numbers of a float dtype.
    """
    copies: dict[Any, Any] = dict(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[Any]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            dtype = tensor.dtype if tensor.is_floating_point() else torch.long
            groups.setdefault((tensor.device, dtype), []).append(name)
    for (_, dtype), names in groups.items():
        there = [copies[name] for name in names]
        flat = torch.cat([tensor.detach().to(dtype).flatten() for tensor in there]).cpu()
        parts = flat.split([tensor.numel() for tensor in there])
        for name, tensor, part in zip(names, there, parts, strict=True):
            copies[name] = part.view(tensor.shape).to(tensor.dtype)
    return copies
