"""Halting: rules that end a reply, or begin none, what takes the place of the reply, and what a streamer shows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeGuard

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, predictions, probabilities, threshold_of
from .outputs import Halt, TokenScores, on_host


# One entry a prompt or a row: true or a `Halt` with the reason to halt, false or None to continue.
Decisions = Sequence[Any]
HaltPolicy = Callable[[dict[str, ProbeOutput]], Decisions]
Judge = Callable[[list[str]], Decisions]
PromptTexts = Callable[[str, list[int]], list[str]]  # from a head's name and row numbers
TokenCallback = Callable[[TokenScores], Decisions | None]
HaltSpec = str | Sequence[str] | Mapping[str, Mapping[str, Any] | None] | HaltPolicy

HaltReply = str | Sequence[int] | torch.Tensor

_OPTIONS = ("label", "threshold", "patience", "window", "unsure", "ask")


def reply_tokens(reply: HaltReply | None, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """Return a `halt_reply` as token ids `[tokens]`."""
    if isinstance(reply, str):
        if tokenizer is None:
            raise ProbeError("a text as halt_reply needs tokenizer=; or pass token ids")
        reply = tokenizer(reply, add_special_tokens=False)["input_ids"]
    try:
        (ids,) = torch.atleast_2d(torch.as_tensor([] if reply is None else reply))
        if ids.is_floating_point() and not torch.equal(ids, ids.long()):
            raise ValueError("a fraction is no token id")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ProbeError("halt_reply must be a text, or the token ids of one reply") from error
    return ids.long()


class Streak:
    """Applies patience and window of a halting rule to the tokens of one reply, one after another.

    Args:
        patience, window: as of `HaltRule`.
        flags_prompt: the rule flags the prompt too, which counts as the first flagged token.
    """

    def __init__(self, patience: int = 1, window: int = 1, flags_prompt: bool = False):
        self._scores = deque([0.0] * window, maxlen=window)
        self._means = deque([math.inf] * flags_prompt, maxlen=patience)

    def add(self, score: float) -> tuple[float, float]:
        """Take in the score of one more token.

        Returns:
            The mean score of the window that ends with the token, and the least such mean of the last `patience` tokens: a rule
            ends the reply where it reaches the threshold. Minus infinity while there are fewer tokens.
        """
        self._scores.append(score)
        mean = sum(self._scores) / len(self._scores)
        self._means.append(mean)
        return mean, min(self._means) if len(self._means) == self._means.maxlen else -math.inf


@dataclass(frozen=True)
class HaltRule:
    """Halts if a head finds a label.

    Attributes:
        index: of the label.
        threshold: halts from this probability on, or from this value of a regression head. `None`: if the head itself decides on
            the label.
        patience: number of tokens in a row that must have the label. If the head reads prompts too, the prompt counts as the first.
        window: a reply token is judged by the mean probability of the label over the last `window` tokens, from the threshold or
            0.5 on. Missing tokens at the beginning of a reply count as 0: the scores of the first tokens vary most, and must not
            end a reply alone.
        unsure: (low, high); `ask` decides on prompts with low <= score < high.
        ask: a function, such as another model, that gets the texts of these prompts and returns one decision for each.
    """

    head: str
    config: ProbeConfig
    index: int
    threshold: float | None
    patience: int = 1
    window: int = 1
    unsure: tuple[float, float] | None = None
    ask: Judge | None = None

    @classmethod
    def create_all(
        cls,
        head: str,
        config: ProbeConfig,
        label: str | None = None,
        threshold: float | str | None = None,
        **options: Any,
    ) -> list[HaltRule]:
        """Return the rules for one head in `halt_on`: one for `label`, else one for each label that the head flags.

        A threshold may be a name in the head's `thresholds`.

        Raises:
            ProbeError: an option is wrong, or does not go with the head.
        """
        names = list(config.id2label.values())
        labels = _labels_to_halt(head, config, label)
        _check_counts(head, config, options)
        _check_band(head, config, options.get("unsure"), options.get("ask"))
        rules = []
        for each in labels:
            index = names.index(each)
            rules.append(cls(head, config, index, _limit(head, config, index, threshold), **options))
        return rules

    def __str__(self) -> str:
        score = "value" if self.config.problem_type == "regression" else "probability"
        limit = "where the head gives it" if self.threshold is None else f"from a {score} of {self.threshold:.3g} on"
        return f"{self.head} halts on {self.config.id2label[self.index]!r} {limit}"

    def halts(self, probs: torch.Tensor) -> list[Halt | None]:
        """Return for each row of probabilities, `[rows, num_labels]`, the reason to flag it or `None`. Patience plays no part."""
        scores = probs[:, self.index]
        limit = self.threshold
        flagged = predictions(probs, self.config) == self.index if limit is None else scores >= limit
        flagged = flagged | scores.isnan()  # a guard that cannot read its input halts
        pairs = zip(flagged.tolist(), scores.tolist(), strict=True)
        return [self.reason(score) if flag else None for flag, score in pairs]

    def ends(self, flag: Halt | None) -> bool:
        """Return True if a flag of the prompt halts by itself: without a score it does so whatever the patience is."""
        return flag is not None and (flag.score is None or self.patience == 1)

    def follow(
        self, streak: Streak, probs: Sequence[float] | torch.Tensor, flag: Halt | None
    ) -> tuple[Halt | None, bool]:
        """Judge one more token of a reply.

        Args:
            streak: of this rule for the reply.
            probs (`[num_labels]`): probabilities after the token.
            flag: what `halts` says of these alone.

        Returns:
            The reason to halt by the mean of the window, or `None`; and True if the patience is exhausted, or the mean is not a
            number.
        """
        limit = 0.5 if self.threshold is None else self.threshold
        if self.window == 1:
            _, least = streak.add(-math.inf if flag is None else math.inf)
        else:
            mean, least = streak.add(float(probs[self.index]))
            flag = self.reason(mean) if math.isnan(mean) or mean >= limit else None
        return flag, flag is not None and (flag.score is None or least >= limit)

    def is_unsure(self, score: float) -> bool:
        """Return True if `ask` decides on a prompt with this score."""
        return self.unsure is not None and self.unsure[0] <= score < self.unsure[1]

    def reason(self, score: float) -> Halt:
        """Return the `Halt` of a row with this score."""
        return Halt(self.head, self.config.id2label[self.index], None if math.isnan(score) else score, self.threshold)


def options_by_head(spec: HaltSpec) -> dict[str, dict[str, Any]]:
    """Return the options by head name of a `halt_on` that is not a function."""
    named = [spec] if isinstance(spec, str) else spec
    if not isinstance(named, Mapping):
        if not isinstance(named, Iterable) or not all(isinstance(name, str) for name in named):
            raise ProbeError(f"halt_on={spec!r} must be a head's name, a list or dict of names, or a function")
        named = dict.fromkeys(named)
    if not named:
        raise ProbeError("halt_on names no head; leave it out to halt nothing")
    for name, options in named.items():
        if options is not None and not isinstance(options, Mapping):
            raise ProbeError(f"halt_on: the options of {name!r} are {options!r}; they must be a dict")
        if unknown := sorted(set(options or ()) - set(_OPTIONS)):
            raise ProbeError(f"halt_on: {name!r} has {unknown}; allowed: {', '.join(_OPTIONS)}")
    return {name: dict(options or {}) for name, options in named.items()}


def _labels_to_halt(head: str, config: ProbeConfig, label: str | None) -> list[str]:
    """Return the `label` of a rule, else those that the head flags; for a regression head its only value."""
    names = list(config.id2label.values())
    is_regression = config.problem_type == "regression"
    flagged = names if is_regression else config.flagged or []
    if label is not None:
        if label not in names:
            raise ProbeError(f"halt_on: {head!r} has no label {label!r}; it has {', '.join(names)}")
        is_single = config.problem_type == "single_label_classification"
        if config.token_scope == "tool" and is_single and label not in flagged:
            raise ProbeError(f"halt_on: {head!r} does not flag {label!r}, so prompts without a result may have it")
        return [label]
    if not flagged or (is_regression and len(flagged) > 1):
        way = f"{{{head!r}: {{'label': {names[0]!r}}}}} or --halt-on {head}:{names[0]}"
        raise ProbeError(f"halt_on: {head!r} flags no label; name it, {way}; labels: {', '.join(names)}")
    return flagged


def _check_counts(head: str, config: ProbeConfig, options: Mapping[str, Any]) -> None:
    for name in ("patience", "window"):
        value = options.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ProbeError(f"halt_on: the {name} of {head!r} is {value!r}; it must be a whole number from 1")
        if value > 1 and not config.reads_reply:
            raise ProbeError(f"halt_on: {name}={value} counts reply tokens, and {head!r} reads the prompt alone")


def _check_band(head: str, config: ProbeConfig, unsure: Any, ask: Any) -> None:
    if unsure is None and ask is None:
        return
    is_pair = isinstance(unsure, (list, tuple)) and len(unsure) == 2 and all(map(_is_number, unsure))
    if not callable(ask) or not is_pair or unsure[0] >= unsure[1]:
        raise ProbeError(f"halt_on: {head!r} needs unsure=(low, high), not {unsure!r}, and a function ask=")
    if config.token_scope == "response":
        raise ProbeError(f"halt_on: unsure is for heads that read the prompt; {head!r} reads replies alone")


def _limit(head: str, config: ProbeConfig, index: int, threshold: float | str | None) -> float | None:
    """Return the threshold of a rule for one label, given as a number, by name or not at all."""
    is_regression = config.problem_type == "regression"
    if threshold is None and not is_regression:
        return threshold_of(config, index)
    known = config.thresholds if config.thresholds and index == config.flagged_index else {}
    limit = known.get(threshold, threshold) if isinstance(threshold, str) else threshold
    low, high = (-math.inf, math.inf) if is_regression else (0, 1)
    if not _is_number(limit) or not low <= float(limit) <= high:
        named = f"from 0 to 1, or for {config.id2label[index]!r} one of: {', '.join(known) or 'none'}"
        allowed = "a number" if is_regression else named
        raise ProbeError(f"halt_on: the threshold of {head!r} is {limit!r}; it must be {allowed}")
    return float(limit)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


class Halter:
    """The halting decisions of one call of `generate()`.

    Args:
        spec: the name of a head, or several names: each label that the head flags halts. Or a dict of names with options, which
            are `label`, `threshold`, `unsure` with `ask`, and for heads that read replies `patience` and `window`. Or a
            function of the scores of the prompts. `None` halts nothing.
        on_token: called with the `TokenScores` after each token of the replies.

    Attributes:
        is_active: something may be halted.
        follows: replies may be halted, so there is a decision after each of their tokens.
        halts: a `Halt` or None for each prompt; for each row if replies may be halted. Empty before the prefill ends.
    """

    def __init__(
        self, spec: HaltSpec | None, configs: Mapping[str, ProbeConfig], on_token: TokenCallback | None = None
    ):
        self.policy = spec if callable(spec) else None
        self.on_token = on_token
        self.rules: list[HaltRule] = []
        self.halts: list[Halt | None] = []
        self.is_active = spec is not None or on_token is not None
        if self.is_active and not configs:
            raise ProbeError("halt_on: no head is active; load_probe(...) or set_active_probes([...]) first")
        if on_token is not None and not any(config.reads_reply for config in configs.values()):
            raise ProbeError("on_probe_token: no active head reads replies (token_scope='response' or 'all')")
        if self.policy is not None and all(config.token_scope == "response" for config in configs.values()):
            raise ProbeError("halt_on: a function needs a head that reads the prompt; on_probe_token= sees replies")
        named = {} if spec is None or callable(spec) else options_by_head(spec)
        for name, options in named.items():
            if name not in configs:
                raise ProbeError(f"halt_on: no head {name!r} is active; active: {', '.join(configs)}")
            self.rules += HaltRule.create_all(name, configs[name], **options)
        self.follows = on_token is not None or any(rule.config.reads_reply for rule in self.rules)
        self._streaks: list[list[Streak]] = []  # of each rule, by row

    def decide(
        self, outputs: dict[str, ProbeOutput], prompts: int, texts: PromptTexts | None = None, copies: int = 1
    ) -> list[Halt | None]:
        """Decide on the prompts. The first rule that flags a prompt counts. If a function of the user raises, no reply begins.

        Args:
            texts: gives the texts that a head read in some rows, for rules that ask.
            copies: number of replies to each prompt.
        """
        halts: list[Halt | None] = [None] * prompts
        if self.policy is not None:
            halts = _decisions("the halting policy", self.policy(outputs), prompts)
        copies = copies if self.follows else 1
        spans = {rule.head: outputs[rule.head].spans for rule in self.rules if rule.head in outputs}
        # As floats, so that they come from the device in the copy of the logits. They are exact: prompts are shorter than 2^24 tokens.
        floats = {(name,): each.float() for name, each in spans.items() if each is not None}
        host: dict[Any, torch.Tensor] = on_host({**self._logits(outputs), **floats})
        for rule in self.rules:
            flags: list[Halt | None] = [None] * prompts
            if rule.head in host:
                flags = _flags_of(rule, probabilities(host[rule.head], rule.config), texts)
            if (rule.head,) in host:
                flags = with_spans(flags, host[(rule.head,)][:, rule.index])
            streaks = (Streak(rule.patience, rule.window, flag is not None) for flag in flags for _ in range(copies))
            self._streaks.append(list(streaks))
            halts = [halt or (flag if rule.ends(flag) else None) for halt, flag in zip(halts, flags, strict=True)]
        self.halts = [halt for halt in halts for _ in range(copies)]
        return self.halts

    def _logits(self, outputs: dict[str, ProbeOutput]) -> dict[str, torch.Tensor]:
        return {rule.head: outputs[rule.head].logits for rule in self.rules if rule.head in outputs}

    def follow(self, scores: TokenScores) -> list[bool]:
        """Decide on one more token of each reply. If a function of the user raises, no further token is written.

        Returns:
            For each row, true if a rule flags the token. The reply is halted once the patience is exhausted.
        """
        # All of one dtype, so that they come from the device in one copy.
        host = on_host({"": scores.counted.float(), **self._logits(scores.outputs)})
        counted = host[""]  # no head has an empty name
        # Tokens that do not count change nothing.
        rows = [row for row, is_counted in enumerate(counted.tolist()) if is_counted]
        flags: list[tuple[int, Halt | None, bool]] = []  # row, reason, and if it ends the reply
        if self.on_token is not None and (decisions := self.on_token(scores)) is not None:
            decided = _decisions("on_probe_token", decisions, len(self.halts))
            flags += [(row, decided[row], True) for row in rows]
        for rule, streaks in zip(self.rules, self._streaks, strict=True):
            if rule.config.reads_reply:
                probs = probabilities(host[rule.head], rule.config)
                halts = rule.halts(probs)
                flags += [(row, *rule.follow(streaks[row], probs[row], halts[row])) for row in rows]
        self.halts = list(self.halts)
        for row, halt, ends in flags:
            if ends and halt is not None and self.halts[row] is None:
                self.halts[row] = replace(halt, token=scores.step)
        flagged = {row for row, halt, _ in flags if halt is not None}
        return [row in flagged for row in range(len(self.halts))]


def _decisions(function: str, returned: Any, rows: int) -> list[Halt | None]:
    """Return the decisions of a function of the user as one `Halt` or `None` a row."""
    items: Any = returned.tolist() if hasattr(returned, "tolist") else returned
    is_list = isinstance(items, (list, tuple)) and len(items) == rows
    if not is_list or not all(isinstance(item, Halt) or item in (None, False, True) for item in items):
        raise ProbeError(f"{function} returned {str(returned)[:60]}, not a list of {rows}: true, false or a Halt")
    return [item if isinstance(item, Halt) else Halt() if item else None for item in items]


def with_spans(flags: list[Halt | None], spans: torch.Tensor) -> list[Halt | None]:
    """Return reasons to halt with the windows that gave them, `[rows, 2]`. A reason that names no head has no window."""
    rows: list[Halt | None] = []
    for flag, (first, end) in zip(flags, spans.long().tolist(), strict=True):
        if flag is not None and flag.head is not None:
            flag = replace(flag, span=(first, end))
        rows.append(flag)
    return rows


def _flags_of(rule: HaltRule, probs: torch.Tensor, texts: PromptTexts | None) -> list[Halt | None]:
    """Return why a rule halts each prompt, or `None`. In its band the function that it asks decides."""
    halts = rule.halts(probs)
    if rule.ask is None or texts is None:
        return halts
    scores = probs[:, rule.index].tolist()
    if rows := [row for row, score in enumerate(scores) if rule.is_unsure(score)]:
        answers = _decisions(f"ask of {rule.head!r}", rule.ask(texts(rule.head, rows)), len(rows))
        for row, halt in zip(rows, answers, strict=True):
            halts[row] = rule.reason(scores[row]) if halt == Halt() else halt
    return halts


class HoldBackStreamer(BaseStreamer):
    """Holds back each token of a reply until heads have scored it and some tokens after it without a flag.

        streamer = HoldBackStreamer(TextStreamer(tokenizer, skip_prompt=True), tokens=8)
        model.generate(**inputs, streamer=streamer, halt_on={"guard": {"threshold": 0.5}})

    A token is shown once the heads have scored it and the next `tokens`, and `halt_on` flagged none of them. A flag that does not
    halt yet (`patience`) holds the tokens before it back until `tokens` later ones are clear. A halt drops the held tokens: a
    flagged token and the `tokens` before it are never shown. The `halt_reply` of the call is shown in their place. A reply that
    ends by itself is shown whole; its last token is the only one without a score.

    A streamer serves one row at a time, as the streamers of transformers do, and one call after another.

    Args:
        streamer: any streamer of transformers, such as `TextStreamer` or `TextIteratorStreamer`.
        tokens: number of further tokens that must be clear. With 0 a token is shown as soon as it is clear.

    Raises:
        ProbeError: `tokens` is below 0.
    """

    def __init__(self, streamer: BaseStreamer, tokens: int = 8):
        if tokens < 0:
            raise ProbeError(f"tokens={tokens} must be a whole number from 0")
        self.streamer, self.tokens = streamer, tokens
        self._reset()

    def _reset(self) -> None:
        self._held: deque[torch.Tensor] = deque()
        self._clear = 0
        self._prompt_seen = self._halted = False

    def put(self, value: torch.Tensor) -> None:
        """Show the prompt at once, and hold the tokens of the reply."""
        if not self._prompt_seen:
            self._prompt_seen = True
            self.streamer.put(value)
        elif not self._halted:
            self._held.append(value)

    def scored(self, flagged: bool) -> None:
        """Record the flag of the token that was put last. Called by `generate`."""
        self._clear = 0 if flagged else self._clear + 1
        if self._clear > self.tokens:
            self._show(self.tokens)

    def _show(self, keep: int = 0) -> None:
        while len(self._held) > keep:
            self.streamer.put(self._held.popleft())

    def halt(self, reply: torch.Tensor) -> None:
        """Drop the held tokens, show `reply` and end; later tokens are dropped. Called by `generate`."""
        self._held = deque(token[None] for token in reply.cpu())
        self._show()
        self.streamer.end()
        self._halted = True

    def abort(self) -> None:
        """Drop the held tokens and end after an error. Called by `generate`."""
        self._held.clear()
        self.end()

    def end(self) -> None:
        """Show the held tokens and end."""
        try:
            if not self._halted:
                self._show()
                self.streamer.end()
        finally:  # held tokens of this reply must not be shown with the next
            self._reset()
