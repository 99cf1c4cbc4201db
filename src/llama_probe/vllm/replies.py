"""Replies that heads follow, in the scheduler's process: tokens that are held back, halts, and the result of each reply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request, RequestStatus

from ..files import JSON
from ..heads.decision import probabilities
from ..serving.halting import HaltRule, Streak
from ..serving.outputs import Halt
from .cache_plan import side_by_side
from .results import head_result, visible
from .settings import ProbeSettings
from .step_scores import StepScores


# Fields that vLLM fills in one output of a request alone; `watermarking` from 0.34 on.
_FIELDS = ("prefill_stats", "new_prompt_logprobs_tensors", "prompt_token_id_logprobs", "watermarking")
_SENT_ONCE = [name for name in _FIELDS if name in EngineCoreOutput.__struct_fields__]


class Reply:
    """One reply, and its results so far.

    Attributes:
        heads: names of the heads that the request asks for.
        slot: where the workers keep the reply's head states; `None` while there are none.
        held: tokens that were not delivered, with their logprobs if the request asks for logprobs.
        withheld: outputs since the last one that was sent.
        keeps_last: the last token ends the reply, and may be delivered without a score.
        scored: number of tokens that have scores.
        clear: number of newest tokens that no guard flags.
        flagged: by rule, the token at which its patience ended.
        last: logits after the last scored token.
        largest: by label, the largest score and its token.
        token_logits: logits after each token, if the request asks for them.
    """

    def __init__(self, request: Request, heads: list[str], rules: list[HaltRule]):
        self.request, self.heads = request, heads
        self.slot: int | None = None
        self.held: list[tuple[int, LogprobsLists | None]] = []
        self.withheld: list[EngineCoreOutput] = []
        self.keeps_last = False
        self.scored = self.clear = 0
        self.streaks = [Streak(rule.patience, rule.window) for rule in rules]
        self.flagged: dict[int, int] = {}
        self.halt: Halt | None = None
        self.last: list[float] | None = None
        self.largest: list[tuple[float, int]] = []
        keeps_all = (request.kv_transfer_params or {}).get("token_scores")
        self.token_logits: list[list[float]] | None = [] if keeps_all else None


class Replies:
    """The replies that run in an engine. The workers keep the head states of as many replies as there are slots.

    If a rule of `halt_on` follows replies, a token is delivered once it has a score: one token is held back, and `hold_back`
    more. A reply ends before the first of the flagged tokens that exhaust a rule's patience. A reply that ends by itself is
    delivered whole. Only its last token has no score, and is left out unless it ends the sequence.
    """

    def __init__(self, settings: ProbeSettings, slots: int):
        self.settings = settings
        self.configs = {name: settings.configs[name] for name in settings.reply_heads}
        self.rules = [rule for rule in settings.flags if rule.config.reads_reply]
        self._guards = [rule in settings.rules for rule in self.rules]
        self.holds_back = settings.guards_replies
        self._columns = side_by_side({name: config.num_labels for name, config in self.configs.items()})
        self.running: dict[str, Reply] = {}  # by request, the replies that some head follows
        self.free_slots = list(range(slots))
        self._siblings: dict[str, dict[int, Reply]] = {}  # by request of a client, its replies by index
        self._rows: dict[str, tuple[list[float], list[float], list[Halt | None]]] = {}  # of the newest step
        self._touched: dict[str, Reply] = {}  # in this step

    def add(self, request: Request, heads: list[str]) -> None:
        """Follow the reply to a new request, or to the next piece of its prompt, with the heads of these names."""
        if not any(name in self.configs for name in heads) or has_no_reply(request):
            return
        self.free(request.request_id)
        family, index = _family(request.request_id)
        reply = Reply(request, heads, self.rules)
        self.running[request.request_id] = self._siblings.setdefault(family, {})[index] = reply
        if self.holds_back:
            request.max_tokens += 1  # the step that reads the last token samples one more, which is dropped

    def free(self, request_id: str) -> None:
        """Give back the slot of a request that was preempted, or has ended."""
        reply = self.running.get(request_id)
        if reply is not None and reply.slot is not None:
            self.free_slots.append(reply.slot)
            reply.slot = None

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self.free(request_id)
        self.running.pop(request_id, None)
        family, _ = _family(request_id)
        if all(reply.request.is_finished() for reply in self._siblings.get(family, {}).values()):
            self._siblings.pop(family, None)

    def has_ended(self, request_id: str) -> bool:
        """Return True if some reply to the same prompt has ended."""
        siblings = self._siblings.get(_family(request_id)[0], {}).values()
        return any(reply.request.is_finished() for reply in siblings)

    def begin_step(self, step: StepScores | None) -> None:
        """Read the scores of a step."""
        self._rows, self._touched = {}, {}
        if step is None or not step.replies:
            return
        logits = step.read_replies()
        probs = {
            name: probabilities(torch.from_numpy(logits[:, self._columns[name]]), config)
            for name, config in self.configs.items()
        }
        scores = torch.cat(list(probs.values()), dim=1).tolist()
        flags = [rule.halts(probs[rule.head]) for rule in self.rules]
        for row, request_id in enumerate(step.replies):
            row_flags = [column[row] for column in flags]
            self._rows[request_id] = logits[row].tolist(), scores[row], row_flags

    def flag_prompt(self, request_id: str, probes: Mapping[str, JSON]) -> None:
        """Count a flag of the prompt as the first flagged token of a rule's patience."""
        reply = self.running.get(request_id)
        if reply is not None:
            for number, rule in enumerate(self.rules):
                flagged = rule.config.id2label[rule.index] in probes.get(rule.head, {}).get("flagged", ())
                reply.streaks[number] = Streak(rule.patience, rule.window, flagged)

    def read_score(self, request_id: str) -> str | None:
        """Add the score of a reply's newest token when the next token comes. Return the head that halts the reply."""
        reply = self.running.get(request_id)
        if reply is None:
            return None
        self._touched[request_id] = reply
        if reply.request.num_output_tokens:
            row = self._rows.get(request_id)
            if row is not None:
                self._add(reply, *row)
            elif self.holds_back:
                rule = next(rule for rule, halts in zip(self.rules, self._guards, strict=True) if halts)
                reply.halt = replace(rule.reason(math.nan), token=reply.scored)
        return reply.halt and reply.halt.head

    def end(self, request: Request) -> None:
        """Note how vLLM has ended a reply."""
        reply = self.running.get(request.request_id)
        if reply is None:
            return
        self.free(request.request_id)  # the request may wait for the next piece of its prompt
        if self.holds_back and request.num_output_tokens >= request.max_tokens:
            request.status, request.stop_reason = RequestStatus.FINISHED_LENGTH_CAPPED, None
        reply.keeps_last = request.status == RequestStatus.FINISHED_STOPPED  # by its last token

    def _add(self, reply: Reply, logits: list[float], scores: list[float], flags: Sequence[Halt | None]) -> None:
        token, reply.scored, reply.last = reply.scored, reply.scored + 1, logits
        if reply.token_logits is not None:
            reply.token_logits.append(logits)
        before = reply.largest or [(-math.inf, 0)] * len(scores)
        reply.largest = [(new, token) if new > old[0] else old for new, old in zip(scores, before, strict=True)]
        is_clear = True
        for number, (rule, streak, flag) in enumerate(zip(self.rules, reply.streaks, flags, strict=True)):
            flag, ends = rule.follow(streak, scores[self._columns[rule.head]], flag)
            is_clear = is_clear and not (flag and self._guards[number])
            if flag is not None and ends:
                reply.flagged.setdefault(number, token)
                if self._guards[number] and reply.halt is None:
                    reply.halt = replace(flag, token=token)
        reply.clear = reply.clear + 1 if is_clear else 0

    def edit(self, output: EngineCoreOutput) -> bool:
        """Put the tokens that may be delivered into an output of this step. Return False if there is nothing to deliver."""
        reply = self._touched.get(output.request_id)
        if reply is None or not self.holds_back:
            return True
        ready = max(0, len(reply.held) - self.settings.hold_back) if reply.clear > self.settings.hold_back else 0
        reply.held += [(token, output.new_logprobs) for token in output.new_token_ids]  # one, or none at the end
        if output.finished:
            ready = 0 if reply.halt is not None else max(0, len(reply.held) - (not reply.keeps_last))
        delivered, reply.held = reply.held[:ready], reply.held[ready:]
        output.new_token_ids = [token for token, _ in delivered]
        if output.new_logprobs is not None:
            output.new_logprobs = _joined([output.new_logprobs.slice_request(0, 0), *(rows for _, rows in delivered)])
        # Send no output without a token before the end: the front end would give it an empty list of logprobs, and may join
        # later outputs to that list.
        reply.withheld.append(output)
        if not (ready or output.finished):
            return False
        withheld, reply.withheld = reply.withheld, []
        output.events = [event for each in withheld for event in each.events or ()] or None
        for name in _SENT_ONCE:
            values = (getattr(each, name) for each in withheld)
            setattr(output, name, next((value for value in values if value is not None), None))
        return True

    def summaries(self, request_id: str) -> list[JSON | None] | None:
        """Return the results of a request's replies so far, by index; `None` for a reply that another engine writes.

        A reply has `{"probes": {head: ...}, "halted": fields of a `Halt`, or None}`. A head has `tokens`, the number of tokens
        that it scored. After the first token a head also has logits, label and scores after the last token, and `largest`: by
        label its `score` and `token`. A head that can flag has `flagged`, the flagged labels, and `token`, where the first label was
        flagged. If the request asks for `token_scores`, `token_logits` has a row for each token, or `None` if it is not finite.
        """
        reply = self.running.get(request_id)
        if reply is None:
            return None
        siblings = self._siblings.get(_family(request_id)[0], {})
        return [self._summary(siblings[i]) if i in siblings else None for i in range(max(siblings, default=-1) + 1)]

    def _summary(self, reply: Reply) -> JSON:
        probes = {}
        for name, columns in self._columns.items():
            if name in reply.heads:
                summary = self._of_head(reply, name, columns)
                probes[name] = visible(summary, self.settings, "tokens", "label", "flagged", "token")
        halted = reply.halt and visible(asdict(reply.halt), self.settings, "head", "label", "token")
        return {"probes": probes, "halted": halted}

    def _of_head(self, reply: Reply, name: str, columns: slice) -> JSON:
        config = self.configs[name]
        summary: JSON = {"tokens": reply.scored}
        labels = {number: config.id2label[rule.index] for number, rule in enumerate(self.rules) if rule.head == name}
        flagged = {label: reply.flagged[number] for number, label in labels.items() if number in reply.flagged}
        if reply.last is not None:
            result, output = head_result(reply.last[columns], config)
            summary |= result
            if output is not None:
                largest = [{"score": score, "token": token} for score, token in reply.largest[columns]]
                summary["largest"] = dict(zip(config.id2label.values(), largest, strict=True))
        if labels:
            summary |= {"flagged": list(flagged), "token": min(flagged.values(), default=None)}
        if reply.token_logits is not None:
            rows = (row[columns] for row in reply.token_logits)
            summary["token_logits"] = [row if all(map(math.isfinite, row)) else None for row in rows]
        return summary


def has_no_reply(request: Request) -> bool:
    """Return True for a request that asks for labels of its prompt alone."""
    return (request.kv_transfer_params or {}).get("reply") is False


def reply_start(request: Request) -> int | None:
    """Return where a reply begins in the prompt of a request for labels alone; `None` if it holds no reply."""
    return (request.kv_transfer_params or {}).get("reply_start") if has_no_reply(request) else None


def _family(request_id: str) -> tuple[str, int]:
    """Return the id of a client's request, and the index of a reply. vLLM calls the request of each reply `INDEX_ID`."""
    index, _, family = request_id.partition("_")
    return (family, int(index)) if family and index.isdecimal() and len(index) < 5 else (request_id, 0)


def _joined(parts: list[LogprobsLists]) -> LogprobsLists:
    """Join the logprobs of several tokens. vLLM's front end takes as many columns as it needs.

    Some rows may be wider than others, because another request of the step asked for more logprobs.
    """
    width = max(part.logprobs.shape[1] for part in parts)
    *wide, ranks = (list(column) for column in zip(*(part[:3] for part in parts), strict=True))
    padded = [[np.pad(rows, ((0, 0), (0, width - rows.shape[1])), "edge") for rows in column] for column in wide]
    return LogprobsLists(*map(np.concatenate, (*padded, ranks)))
