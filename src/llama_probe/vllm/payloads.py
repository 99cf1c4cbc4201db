"""Scores and halts in what vLLM's server sends, by the shape of it: choices, a response, a message; and as a header."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from urllib.parse import quote

from ..files import JSON
from .label_routes import LabelRequest


HALTED = "content_filter"
REFUSAL = {"stop_reason": "refusal", "stop_sequence": None}
INCOMPLETE = {"status": "incomplete", "incomplete_details": {"reason": HALTED}}
Decisions = dict[str, asyncio.Future[bool | None]]  # of a judge, by text: `True` halts
_LONGEST = 4000  # characters of a header; common proxies take headers of 8 KiB in all


@dataclass
class Scores:
    """The engine's results of the prompts of one HTTP request.

    Attributes:
        model: the name of the model in the request.
        labels: the request, if it asks for labels alone.
        is_stored: the response is one to an earlier request, and holds the scores.
        copies: number of replies to each prompt. A choice is one of all replies to all prompts, in order.
        prompts: `kv_transfer_params` of each prompt; `None` before they are known.
        halted: choices that were halted.
        ends: `finish_reason` and `stop_reason` of each choice that has ended, until a stream has sent them.
        request_id: that of the newest prompt.
    """

    model: str | None = None
    labels: LabelRequest | None = None
    is_stored: bool = False
    copies: int = 1
    prompts: list[JSON | None] = field(default_factory=list)
    decisions: Decisions = field(default_factory=dict)
    halted: set[int] = field(default_factory=set)
    ends: dict[int, JSON] = field(default_factory=dict)
    request_id: str = ""

    def add(self, request_id: str, copies: int) -> int:
        """Add a prompt that the server hands to the engine. Return its place among the prompts."""
        self.request_id = request_id
        self.copies = copies
        self.prompts.append(None)
        return len(self.prompts) - 1

    @property
    def are_known(self) -> bool:
        """True if the scores of some prompt are known."""
        return self.is_stored or any(self.prompts)

    @property
    def last(self) -> JSON | None:
        """The newest result. A response with several turns has one prompt after the other."""
        return next((result for result in reversed(self.prompts) if result), None)

    @property
    def header(self) -> str | None:
        """The value of `x-llama-probe`, for a response to one prompt."""
        if len(self.prompts) != 1 or not self.prompts[0]:
            return None
        items = (_item(quote(name, safe=""), probe) for name, probe in self.prompts[0]["probes"].items())
        value = ", ".join(item for item in items if item)
        return value if 0 < len(value) <= _LONGEST else None

    def of_choice(self, index: int) -> JSON | None:
        """Return the result of the prompt of a choice."""
        prompt = index // self.copies
        return self.prompts[prompt] if prompt < len(self.prompts) else None

    def complete(self, body: bytes) -> tuple[int, bytes]:
        """Return status and body of a complete response with scores and halts in it."""
        status, payload = 200, json.loads(body)
        if payload is None:  # the client is gone
            return status, body
        if self.labels is not None:
            status, payload = self.labels.response(payload, self.prompts)
        elif "choices" in payload:
            several = len(self.prompts) > 1
            payload["kv_transfer_params"] = None if several else self.last
            for choice in payload["choices"]:
                if several:
                    choice["kv_transfer_params"] = self.of_choice(choice["index"])
                if choice["index"] in self.halted:
                    choice["finish_reason"] = HALTED  # a tool call before the halt has replaced the reason
        elif payload.get("object") == "response" and is_halted(payload.get("kv_transfer_params")):
            payload |= INCOMPLETE
        elif payload.get("type") == "message" and 0 in self.halted:
            payload |= REFUSAL
        return status, json.dumps(payload, ensure_ascii=False).encode()


def prompt_halt(result: JSON) -> JSON | None:
    """Return why a prompt was halted; `None` if it was not, even if a reply to it was."""
    halted = result.get("halted")
    return halted if halted and halted.get("token") is None else None


def is_halted(result: JSON | None) -> bool:
    """Return True if a prompt, or a reply to it, was halted."""
    return bool(result and result.get("halted"))


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
