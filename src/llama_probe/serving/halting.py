"""What is halted: prompts that a head flags get no reply from the model, and replies that one flags end there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, predictions, threshold_of


if TYPE_CHECKING:
    from .reply import TokenScores


@dataclass(frozen=True)
class Halt:
    """Why a prompt got no reply, or why its reply ends where it does.

    Attributes:
        head: name of the head that flagged it; `None` where a policy of the user's did.
        label: the label that was found. score: its probability (regression: the value). threshold: from which it halts.
        token: the place in the reply, from 0, of the token that was one too many, and is the last; `None` where the
            reply was not begun.
    """

    head: str | None = None
    label: str | None = None
    score: float | None = None
    threshold: float | None = None
    token: int | None = None


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
# What was read of each reply so far -> nothing, or for each row whether its reply ends here, or a `Halt` that says why.
TokenCallback = Callable[["TokenScores"], "Sequence[Any] | None"]
HaltSpec = str | Sequence[str] | Mapping[str, Mapping[str, Any] | None] | HaltPolicy
HaltReply = str | Sequence[int] | torch.Tensor | Reprompt


@dataclass(frozen=True)
class HaltRule:
    """Halts where a head finds a label.

    Attributes:
        index: of the label. threshold: probability from which it counts (regression: the value); `None` where the head
            decides as it always does.
        patience: number of tokens in a row that must have the label, where the head reads the prompt the end of that as the first;
            1 for heads that read the prompt alone.
    """

    head: str
    config: ProbeConfig
    index: int
    threshold: float | None
    patience: int = 1

    @classmethod
    def create(
        cls,
        head: str,
        config: ProbeConfig,
        label: str | None = None,
        threshold: float | None = None,
        patience: int = 1,
    ) -> HaltRule:
        """Checks what the user said.

        Raises:
            ProbeError: the head has no such label, needs one, or the threshold or patience is not allowed.
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
            number = isinstance(threshold, Real) and not isinstance(threshold, bool)  # NumPy's too
            if not number or math.isnan(threshold) or not (regression or 0 <= threshold <= 1):
                allowed = "a number" if regression else "a number from 0 to 1"
                raise ProbeError(f"halt_on: the threshold of {head!r} is {threshold!r}; it must be {allowed}")
            threshold = float(threshold)
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ProbeError(f"halt_on: the patience of {head!r} is {patience!r}; it must be a whole number from 1")
        if patience > 1 and not config.reads_reply:
            raise ProbeError(
                f"halt_on: patience={patience} counts tokens of a reply, and {head!r} reads the prompt alone "
                f"(token_scope={config.token_scope!r}): leave patience out"
            )
        index = names.index(label)
        threshold = threshold_of(config, index) if threshold is None else threshold
        return cls(head, config, index, threshold, patience)

    def halts(self, output: ProbeOutput) -> list[Halt | None]:
        """For each row why it is halted, or `None`, with no regard to patience."""
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


def options_by_head(spec: HaltSpec) -> dict[str, dict[str, Any]]:
    """What `halt_on` says of each head that it names; a function is no such thing.

    Raises:
        ProbeError: it is in none of the forms that are allowed, or names no head.
    """
    named = [spec] if isinstance(spec, str) else spec
    if not isinstance(named, Mapping):
        named = list(named) if isinstance(named, Iterable) else [named]
        if not all(isinstance(name, str) for name in named):
            raise ProbeError(
                f"halt_on={spec!r} must be the name of a head, a list of names, a dict of names with label, threshold and "
                "patience, or a function"
            )
        named = dict.fromkeys(named)
    if not named:
        raise ProbeError("halt_on names no head; leave it out to halt nothing")
    for name, options in named.items():
        if options is not None and not isinstance(options, Mapping):
            raise ProbeError(
                f"halt_on: what is said of {name!r} is {options!r}; it must be a dict, such as {{{name!r}: "
                "{'label': ..., 'threshold': 0.6}}"
            )
    return {name: dict(options or {}) for name, options in named.items()}


class Halter:
    """What one call of `generate()` halts by.

    Args:
        spec: the name of a head, or several: its last label of two, decided as the head decides. A dict of names with
            `label`, `threshold` and, for heads that read replies, `patience`, each of which may be left out. Or a function
            of the user's own, which sees the prompt's scores; see `HaltPolicy`. `None` halts nothing.
        configs: of the active heads, by name.
        on_token: called after each token of the replies; see `TokenCallback`.

    Attributes:
        halts: one entry a prompt, and from the first token of the replies on one a row; `None` before the prompt was read.
        follows: whether something is decided token by token.

    Raises:
        ProbeError: a head is not active, or what was said of it is not allowed.
    """

    def __init__(
        self, spec: HaltSpec | None, configs: Mapping[str, ProbeConfig], on_token: TokenCallback | None = None
    ):
        self.policy: HaltPolicy | None = None
        self.on_token = on_token
        self.rules: list[HaltRule] = []
        self.halts: list[Halt | None] | None = None
        self._streaks: dict[str, list[int]] = {}
        if not configs:
            raise ProbeError(
                "halt_on: no head is active to halt by; load_probe(...) or set_active_probes([...]) first"
            )
        if on_token is not None and not any(config.reads_reply for config in configs.values()):
            raise ProbeError(
                "on_probe_token: no active head reads replies; attach one with token_scope='response' or 'all'"
            )
        if on_token is not None and not callable(on_token):
            raise ProbeError(
                f"on_probe_token is a {type(on_token).__name__}; it must be a function that takes the TokenScores of a step. Rules "
                "go to halt_on="
            )
        if spec is None:
            return
        if callable(spec):
            if all(config.token_scope == "response" for config in configs.values()):
                raise ProbeError(
                    "halt_on: a function decides by what heads say of the prompt, and no active head reads it; "
                    "on_probe_token= takes a function that sees each token of the reply"
                )
            self.policy = spec
            return
        for name, options in options_by_head(spec).items():
            if name not in configs:
                raise ProbeError(f"halt_on: no head {name!r} is active; active: {', '.join(configs)}")
            if unknown := sorted(set(options) - {"label", "threshold", "patience"}):
                raise ProbeError(f"halt_on: {name!r} has {unknown}; allowed: label, threshold, patience")
            self.rules.append(HaltRule.create(name, configs[name], **options))

    def decide(self, outputs: dict[str, ProbeOutput], prompts: int) -> list[Halt | None]:
        """For each prompt why it is halted, or `None`; the first rule that flags it counts.

        Raises:
            ProbeError: the policy returned something else. What the policy raises goes through: no reply is begun.
        """
        if self.policy is not None:
            self.halts = _decisions("the halting policy", self.policy(outputs), prompts, "prompts")
            return self.halts
        self.halts = [None] * prompts
        for rule in self.rules:
            if rule.head in outputs:
                found = self._patient(rule, rule.halts(outputs[rule.head]))
                self.halts = [old or new for old, new in zip(self.halts, found, strict=True)]
        return self.halts

    @property
    def follows(self) -> bool:
        return self.on_token is not None or any(rule.config.reads_reply for rule in self.rules)

    def follow(self, scores: TokenScores) -> list[bool]:
        """Decides after one more token of each reply; `halts` then has one entry a row.

        Returns:
            For each row whether a rule flags the token, which halts it where patience is at its end.

        Raises:
            ProbeError: the callback returned something else. What it raises goes through: no further token is written.
        """
        counted = scores.counted.tolist()
        self.expand(len(counted))
        flagged = [False] * len(counted)
        found: list[list[Halt | None]] = []
        if self.on_token is not None and (said := self.on_token(scores)) is not None:
            found.append(_decisions("on_probe_token", said, len(counted), "rows"))
        for rule in self.rules:
            if rule.config.reads_reply:
                hits = rule.halts(scores.outputs[rule.head])
                flagged = [
                    old or (hit is not None and on) for old, hit, on in zip(flagged, hits, counted, strict=True)
                ]
                found.append(self._patient(rule, hits, counted))
        for halts in found:
            for row, halt in enumerate(halts):
                if halt is not None and counted[row] and self.halts[row] is None:
                    self.halts[row], flagged[row] = replace(halt, token=scores.step), True
        return flagged

    def expand(self, rows: int) -> None:
        """One entry of `halts` a row, where each prompt has several."""
        repeats = rows // len(self.halts)
        self.halts = [halt for halt in self.halts for _ in range(repeats)]
        self._streaks = {head: [n for n in counts for _ in range(repeats)] for head, counts in self._streaks.items()}

    def _patient(self, rule: HaltRule, found: list[Halt | None], counted: Sequence[bool] | None = None):
        """`found` without what does not yet last as long as the rule's patience. What does not count changes nothing."""
        streaks = self._streaks.setdefault(rule.head, [0] * len(found))
        for row, halt in enumerate(found):
            if counted is None or counted[row]:
                streaks[row] = 0 if halt is None else streaks[row] + 1
        return [halt if streak >= rule.patience else None for halt, streak in zip(found, streaks, strict=True)]

    @property
    def all_halted(self) -> bool:
        """Whether no prompt is left to reply to."""
        return self.halts is not None and None not in self.halts


def _decisions(who: str, said: Any, count: int, what: str) -> list[Halt | None]:
    """What a function of the user's own has decided: true, false or a `Halt` for each of so many prompts or rows."""
    wanted = f"it must return a list with true, false or a Halt for each of the {what}"
    if not isinstance(said, Iterable) or isinstance(said, (str, bytes, Mapping, Set)):
        raise ProbeError(f"{who} returned a {type(said).__name__}; {wanted}")
    found = list(said)
    if len(found) != count:
        raise ProbeError(f"{who} returned {len(found)} decisions for {count} {what}")
    for item in found:
        # Names of labels and scores would all be true, and keys of a dict or numbers of prompts anything.
        number = item.item() if getattr(item, "shape", None) in ((), (1,)) else item
        if isinstance(number, Sized) or (isinstance(number, Real) and number not in (0, 1)):
            raise ProbeError(f"{who} returned a list with {item!r} in it; {wanted}")
    return [item if isinstance(item, Halt) else Halt() if bool(item) else None for item in found]
