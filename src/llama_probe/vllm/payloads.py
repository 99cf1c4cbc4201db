"""Scores and halts in what vLLM's server sends, by the shape of it: choices, a response, a message; and as a header."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..files import JSON


if TYPE_CHECKING:
    from .label_routes import LabelRequest

HALTED = "content_filter"
_REFUSAL = {"stop_reason": "refusal", "stop_sequence": None}
_INCOMPLETE = {"status": "incomplete", "incomplete_details": {"reason": HALTED}}
_DATA, _END = b"data: ", b"[DONE]"
_EVENTS = tuple(
    b"event: " + name for name in (b"message_start", b"message_delta", b"response.created", b"response.completed")
)
Answers = dict[str, asyncio.Future[bool | None]]  # of a judge, by text: `True` halts
_LONGEST = 4000  # characters of a header; common proxies take headers of 8 KiB in all


@dataclass
class Scores:
    """The engine's answers about the prompts of one HTTP request.

    Attributes:
        labels: the request if it asks for labels alone.
        is_stored: the response is one to an earlier request, and has the scores in it.
        copies: choices a prompt.
        prompts: `kv_transfer_params` by prompt; `None` before they are known.
        answers: of the judge.
        halted: choices that were.
        sent: choices of a stream that have scores.
    """

    labels: LabelRequest | None = None
    is_stored: bool = False
    copies: int = 1
    prompts: list[JSON | None] = field(default_factory=list)
    answers: Answers = field(default_factory=dict)
    halted: set[int] = field(default_factory=set)
    sent: set[int] = field(default_factory=set)

    def add(self, copies: int) -> int:
        """Return the place of a prompt that the server hands to the engine."""
        self.copies = copies
        self.prompts.append(None)
        return len(self.prompts) - 1

    @property
    def are_known(self) -> bool:
        """True if the scores of some prompt are known."""
        return self.is_stored or any(self.prompts)

    @property
    def last(self) -> JSON | None:
        """The newest prompt that is known. A response with several turns has one prompt after the other."""
        return next((known for known in reversed(self.prompts) if known), None)

    @property
    def header(self) -> str | None:
        """The value of `x-llama-probe`, for a response to one prompt."""
        if len(self.prompts) != 1 or not self.prompts[0]:
            return None
        items = (_item(quote(name, safe=""), probe) for name, probe in self.prompts[0]["probes"].items())
        value = ", ".join(item for item in items if item)
        return value if 0 < len(value) <= _LONGEST else None

    def complete(self, body: bytes) -> tuple[int, bytes]:
        """Return status and body of a complete response, with scores in each of several choices, and with the halt."""
        status, payload = 200, json.loads(body)
        if payload is None:  # the client has gone
            return status, body
        if self.labels is not None:
            status, payload = self.labels.response(payload, self.prompts)
        elif "choices" in payload:
            several = len(self.prompts) > 1
            payload["kv_transfer_params"] = None if several else self.last
            for choice in payload["choices"]:
                choice |= {"kv_transfer_params": self._of(choice["index"])} if several else {}
                if choice["index"] in self.halted:
                    choice["finish_reason"] = HALTED  # a tool call before it has replaced the reason
        elif payload.get("object") == "response" and _is_halted(payload.get("kv_transfer_params")):
            payload |= _INCOMPLETE
        elif payload.get("type") == "message" and 0 in self.halted:
            payload |= _REFUSAL
        return status, json.dumps(payload, ensure_ascii=False).encode()

    def stream(self, body: bytes) -> bytes:
        """Return events of a stream with scores in the first of each choice, and with the halt. vLLM sends whole events."""
        return b"\n\n".join(map(self._event, body.split(b"\n\n")))

    def _event(self, event: bytes) -> bytes:
        if event.startswith(_DATA):
            return self._chunk(event)
        if not event.startswith(_EVENTS) or not self.are_known:
            return event
        name, _, data = event.partition(_DATA)
        payload = json.loads(data)
        match payload["type"]:
            case "response.created" if self.last:
                payload["response"]["kv_transfer_params"] = self.last
            case "message_start":
                payload["message"]["kv_transfer_params"] = self.last
            case "message_delta":
                payload["delta"] |= _REFUSAL if 0 in self.halted else {}
                if self.last and "replies" in self.last:
                    payload["kv_transfer_params"] = self.last
            case "response.completed" if _is_halted(payload["response"].get("kv_transfer_params")):
                payload["type"], name = "response.incomplete", b"event: response.incomplete\n"
                payload["response"] |= _INCOMPLETE
        return name + _data(payload)

    def _chunk(self, event: bytes) -> bytes:
        data = event.removeprefix(_DATA)
        chunk = {} if data == _END else json.loads(data)
        for choice in chunk.get("choices", ()):  # one, or none beside the usage
            index, ends = choice["index"], choice.get("finish_reason") is not None
            known = self._of(index)
            if known and (index not in self.sent or (ends and "replies" in known)):
                self.sent.add(index)
                return _data({**chunk, "kv_transfer_params": known})
        return event

    def _of(self, index: int) -> JSON | None:
        prompt = index // self.copies
        return self.prompts[prompt] if prompt < len(self.prompts) else None


def prompt_halt(known: JSON) -> JSON | None:
    """Return why a prompt was halted, by what the engine says of it; `None` if it was not, though its reply may be."""
    halted = known.get("halted")
    return halted if halted and halted.get("token") is None else None


def reply_of(known: JSON, index: int) -> JSON | None:
    """Return what the engine says of the reply of an index; `None` if another one has written it. See `Replies.summaries`."""
    replies = known.get("replies") or []
    return replies[index] if index < len(replies) else None


def _is_halted(known: JSON | None) -> bool:
    return bool(known and known.get("halted"))


def _data(payload: JSON) -> bytes:
    return _DATA + json.dumps(payload, ensure_ascii=False).encode()


def _item(name: str, probe: JSON) -> str:
    """Return one head's part of the header, a member of a structured field. Empty if the head's scores are hidden."""
    if "error" in probe:
        return f"{name};error"
    score, scores = probe.get("score"), probe.get("scores", {})
    if "label" not in probe:  # regression
        values = list(scores.values()) if score is None else [score]
        texts, is_one = [f"{value:.6g}" for value in values], len(values) == 1
        if not texts:
            return ""
    else:
        is_one = not isinstance(probe["label"], list)
        labels = [probe["label"]] if is_one else probe["label"]
        texts = [quote(label, safe="") + (f";p={round(scores[label], 3):g}" if scores else "") for label in labels]
    return f"{name}={texts[0]}" if is_one else f"{name}=({' '.join(texts)})"
