"""Halting: prompts that a head flags get no reply from the model, and may get another one in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from .configuration import ProbeConfig
from .decision import ProbeOutput, predictions
from .errors import ProbeError


if TYPE_CHECKING:
    from .generation import PrefillSession


@dataclass(frozen=True)
class Halt:
    """Why a prompt got no reply.

    Attributes:
        head: name of the head that flagged it; `None` where a policy of the user's did.
        label: the label that was found. score: its probability (regression: the value). threshold: from which it halts.
    """

    head: str | None = None
    label: str | None = None
    score: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Reprompt:
    """A prompt whose reply is given in place of a halted one; the same model writes it, once a call, without heads.

    Attributes:
        input_ids (`torch.LongTensor` of shape `[1, tokens]`): the prompt, with the chat template applied.
        kwargs: of `generate`, such as `max_new_tokens`.
    """

    input_ids: torch.Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)


# Outputs of all active heads -> for each prompt whether it is halted, or a `Halt` that says why.
HaltPolicy = Callable[[dict[str, ProbeOutput]], Sequence[Any]]
HaltSpec = str | Sequence[str] | Mapping[str, Mapping[str, Any] | None] | HaltPolicy
HaltReply = str | Sequence[int] | torch.Tensor | Reprompt


@dataclass(frozen=True)
class HaltRule:
    """Halts where a head finds a label.

    Attributes:
        index: of the label. threshold: probability from which it counts (regression: the value); `None` where the head
            decides as it always does.
    """

    head: str
    config: ProbeConfig
    index: int
    threshold: float | None

    @classmethod
    def create(
        cls, head: str, config: ProbeConfig, label: str | None = None, threshold: float | None = None
    ) -> HaltRule:
        """Checks what the user said.

        Raises:
            ProbeError: the head has no such label, needs one, or the threshold is not allowed.
        """
        names = list(config.id2label.values())
        regression = config.problem_type == "regression"
        if label is None:
            if config.num_labels > 2 or (config.num_labels == 2 and regression):
                raise ProbeError(
                    f"halt_on: say by which label of {head!r}: {{{head!r}: {{'label': ...}}}}; it has {names}"
                )
            label = names[-1]
        if label not in names:
            raise ProbeError(f"halt_on: {head!r} has no label {label!r}; it has {', '.join(names)}")
        if threshold is None and regression:
            raise ProbeError(f"halt_on: {head!r} gives values: say from which on, {{{head!r}: {{'threshold': ...}}}}")
        if threshold is not None:
            number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
            if not number or not (regression or 0 <= threshold <= 1):
                raise ProbeError(
                    f"halt_on: the threshold of {head!r} is {threshold!r}; it must be a number from 0 to 1"
                )
        index = names.index(label)
        if threshold is None and config.problem_type == "multi_label_classification":
            threshold = config.threshold[index] if isinstance(config.threshold, list) else config.threshold
            threshold = 0.5 if threshold is None else threshold
        elif threshold is None and index == 1:
            threshold = config.threshold  # as the head decides between two labels
        return cls(head, config, index, threshold)

    def halts(self, output: ProbeOutput) -> list[Halt | None]:
        """For each prompt why it is halted, or `None`."""
        probs = output.probabilities
        scores = probs[:, self.index]
        found = (
            scores >= self.threshold if self.threshold is not None else predictions(probs, self.config) == self.index
        )
        # What is no number says nothing, and a guard that says nothing has not let the prompt pass.
        found = found | scores.isnan()
        label = self.config.id2label[self.index]
        return [
            Halt(self.head, label, score, self.threshold) if hit else None
            for hit, score in zip(found.tolist(), scores.tolist(), strict=True)
        ]


class Halter:
    """What one call of `generate()` halts by.

    Args:
        spec: the name of a head, or several: its last label of two, decided as the head decides. A dict of names with
            `label` and `threshold`, each of which may be left out. Or a function of the user's own; see `HaltPolicy`.
        configs: of the active heads, by name.

    Raises:
        ProbeError: a head is not active, or what was said of it is not allowed.
    """

    def __init__(self, spec: HaltSpec, configs: Mapping[str, ProbeConfig]):
        self.policy: HaltPolicy | None = None
        self.rules: list[HaltRule] = []
        self.halts: list[Halt | None] | None = None
        if not configs:
            raise ProbeError(
                "halt_on: no head is active to halt by; load_probe(...) or set_active_probes([...]) first"
            )
        if callable(spec):
            self.policy = spec
            return
        if isinstance(spec, str):
            spec = [spec]
        if not isinstance(spec, Mapping):
            spec = dict.fromkeys(spec)
        if not spec:
            raise ProbeError("halt_on names no head; leave it out to halt nothing")
        for name, options in spec.items():
            if name not in configs:
                raise ProbeError(f"halt_on: no head {name!r} is active; active: {', '.join(configs)}")
            options = dict(options or {})
            if unknown := sorted(set(options) - {"label", "threshold"}):
                raise ProbeError(f"halt_on: {name!r} has {unknown}; allowed: label, threshold")
            self.rules.append(HaltRule.create(name, configs[name], **options))

    def decide(self, outputs: dict[str, ProbeOutput], prompts: int) -> list[Halt | None]:
        """For each prompt why it is halted, or `None`; the first rule that flags it counts.

        Raises:
            ProbeError: the policy returned something else. What the policy raises goes through: no reply is begun.
        """
        if self.policy is not None:
            found = list(self.policy(outputs))
            if len(found) != prompts:
                raise ProbeError(f"the halting policy returned {len(found)} decisions for {prompts} prompts")
            self.halts = [item if isinstance(item, Halt) else Halt() if bool(item) else None for item in found]
            return self.halts
        self.halts = [None] * prompts
        for rule in self.rules:
            self.halts = [old or new for old, new in zip(self.halts, rule.halts(outputs[rule.head]), strict=True)]
        return self.halts

    @property
    def all_halted(self) -> bool:
        """Whether no prompt is left to reply to."""
        return self.halts is not None and None not in self.halts


class AllHalted(Exception):
    """Leaves `generate()` at the end of the prefill, where no prompt is left to reply to."""


class HaltingProcessor(LogitsProcessor):
    """Ends the replies to halted prompts at once, where others of the batch go on.

    Args:
        halter: of the call. token: the end-of-sequence token, or where a model has none what the reply is filled with.
    """

    def __init__(self, halter: Halter, token: int):
        self.halter, self.token = halter, token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not any(self.halter.halts or ()):
            return scores
        rows = torch.tensor([halt is not None for halt in self.halter.halts], device=scores.device)
        rows = rows.repeat_interleave(len(scores) // len(rows))  # beams and return sequences
        scores = scores.clone()
        scores[rows] = torch.finfo(scores.dtype).min
        scores[rows, self.token] = 0.0
        return scores


def generation_setting(model: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: Mapping, name: str):
    """What a call of `generate()` uses for a setting: its argument, its config, or the model's; `None` where none says."""
    sources = (kwargs.get(name), getattr(generation_config, name, None), getattr(model.generation_config, name, None))
    return next((value for value in sources if value is not None), None)


class HaltingRun:
    """One call of `generate()` that may halt.

    Args:
        model: the probed model. halter, session: of the call.
        reply: what halted prompts get; see `HaltReply`.
        generation_config, kwargs: of the call.

    Raises:
        ProbeError: the reply is not allowed.
    """

    def __init__(
        self, model, halter: Halter, session: PrefillSession, reply: HaltReply | None, generation_config, kwargs
    ):
        self.model, self.halter, self.session = model, halter, session
        self.generation_config, self.kwargs = generation_config, kwargs
        self.reply = _reply(reply, kwargs.get("tokenizer"))
        session.on_complete = self._decide

    def _decide(self, outputs: dict[str, ProbeOutput]) -> None:
        self.halter.decide(outputs, self.session.prompts)
        if self.halter.all_halted:
            raise AllHalted

    def generate(self, generate: Callable, inputs: torch.Tensor | None, *args) -> ModelOutput:
        """Calls the plain `generate`, and puts the replies of halted prompts into what it returns."""
        end, pad = self._token("eos_token_id"), self._token("pad_token_id")
        pad = end if pad is None else pad
        pad = 0 if pad is None else pad
        processor = HaltingProcessor(self.halter, pad if end is None else end)
        kwargs = dict(self.kwargs)
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), processor])
        prompt = inputs if inputs is not None and inputs.dim() == 2 else kwargs.get("input_ids")
        streamer = kwargs.get("streamer")
        try:
            output = generate(inputs, self.generation_config, *args, **kwargs)
        except AllHalted:
            output = self._empty_output(prompt)
        except BaseException:
            if self.halter.halts is None and streamer is not None:
                streamer.end()  # the policy failed: whoever waits for the stream is told that there will be none
            raise
        halts = self.halter.halts
        if any(halts):
            reply = self._reply_tokens(generate)
            length = 0 if prompt is None else prompt.shape[1]
            output.sequences = with_replies(output.sequences, halts, length, reply, pad)
            if self.halter.all_halted and streamer is not None:
                for token in reply.cpu():
                    streamer.put(token[None])
                streamer.end()
        return output

    def _setting(self, name: str):
        return generation_setting(self.model, self.generation_config, self.kwargs, name)

    def _token(self, name: str) -> int | None:
        value = self._setting(name)
        if isinstance(value, torch.Tensor):
            value = value.flatten().tolist()
        return (value[0] if value else None) if isinstance(value, (list, tuple)) else value

    def _empty_output(self, prompt: torch.Tensor | None) -> ModelOutput:
        """What the plain `generate` would have returned of the prompts alone."""
        if prompt is None:  # embeddings: the plain output holds new tokens only
            prompt = torch.zeros(self.session.prompts, 0, dtype=torch.long, device=self.model.device)
        sequences = prompt.repeat_interleave(self._setting("num_return_sequences") or 1, dim=0)
        beams = (self._setting("num_beams") or 1) > 1
        return (GenerateBeamDecoderOnlyOutput if beams else GenerateDecoderOnlyOutput)(sequences=sequences)

    def _reply_tokens(self, generate: Callable) -> torch.Tensor:
        if not isinstance(self.reply, Reprompt):
            return self.reply
        ids = self.reply.input_ids.to(self.model.device)
        written = generate(ids, attention_mask=torch.ones_like(ids), **self.reply.kwargs)
        sequences = written if isinstance(written, torch.Tensor) else written.sequences
        return sequences[0, ids.shape[1] :]


def _reply(reply: HaltReply | None, tokenizer) -> torch.Tensor | Reprompt:
    """Token ids, or a prompt for them."""
    if isinstance(reply, Reprompt):
        if reply.input_ids.dim() != 2 or len(reply.input_ids) != 1:
            raise ProbeError(
                f"Reprompt.input_ids has the shape {tuple(reply.input_ids.shape)}; it must be [1, tokens]"
            )
        return reply
    if isinstance(reply, str):
        if tokenizer is None:
            raise ProbeError("a text as halt_reply needs tokenizer=; or pass token ids")
        reply = tokenizer(reply, add_special_tokens=False)["input_ids"]
    try:
        ids = torch.as_tensor([] if reply is None else reply, dtype=torch.long)
    except (TypeError, ValueError, RuntimeError):
        raise ProbeError(
            f"halt_reply is a {type(reply).__name__}; it must be token ids, a text or a Reprompt"
        ) from None
    if ids.dim() != 1:
        raise ProbeError(f"halt_reply has the shape {tuple(ids.shape)}; it must be [tokens]")
    return ids


def with_replies(
    sequences: torch.Tensor, halts: Sequence[Halt | None], prompt_length: int, reply: torch.Tensor, pad: int
) -> torch.Tensor:
    """Puts `reply` in the place of what halted prompts got.

    Args:
        sequences (`[rows, tokens]`): rows are prompts, or return sequences of each prompt.
        prompt_length: tokens of `sequences` that are the prompt's; 0 where prompts were given as embeddings.
        reply (`[tokens]`): may be empty.
        pad: what stands behind the shorter replies.

    Returns:
        `[rows, as many tokens as the longest row has]`.
    """
    rows = torch.tensor([halt is not None for halt in halts], device=sequences.device)
    rows = rows.repeat_interleave(len(sequences) // len(rows))
    others = 0 if bool(rows.all()) else sequences.shape[1] - prompt_length
    width = prompt_length + max(others, len(reply))
    grown = sequences.new_full((len(sequences), width), pad)
    kept = min(width, sequences.shape[1])
    grown[:, :kept] = sequences[:, :kept]
    grown[rows, prompt_length:] = pad
    grown[rows, prompt_length : prompt_length + len(reply)] = reply.to(sequences)
    return grown
