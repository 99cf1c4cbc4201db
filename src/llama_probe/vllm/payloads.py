"""Scores and halts in what vLLM's server sends, by the shape of it: choices, a response, a message; and as a header."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote


HALTED = "content_filter"
_REFUSAL = {"stop_reason": "refusal", "stop_sequence": None}
_INCOMPLETE = {"status": "incomplete", "incomplete_details": {"reason": HALTED}}
_DATA, _END = b"data: ", b"[DONE]"
_EVENTS = tuple(
    b"event: " + name for name in (b"message_start", b"message_delta", b"response.created", b"response.completed")
)
_TEXTS = "cmpl-"  # begins the ids of requests to /v1/completions
_LONGEST = 4000  # characters of a header; common proxies take headers of 8 KiB in all


@dataclass
class Scores:
    """The engine's answers about the prompts of one HTTP request.

    Attributes:
        model: name under which it is served.
        has_text: vLLM writes what it sends of a halted request, because there is a text to send.
        is_stored: the response is one to an earlier request, and has the scores in it.
        request_id: of the engine's request for the last prompt.
        copies: choices a prompt.
        prompts: `kv_transfer_params` by prompt; `None` before they are known.
        told: choices of a stream that have them.
    """

    model: str = ""
    has_text: bool = False
    is_stored: bool = False
    request_id: str = ""
    copies: int = 1
    prompts: list[dict[str, Any] | None] = field(default_factory=list)
    told: set[int] = field(default_factory=set)

    def add(self, request_id: str, copies: int) -> int:
        """Return the place of a prompt that the server hands to the engine."""
        self.request_id, self.copies = request_id, copies
        self.prompts.append(None)
        return len(self.prompts) - 1

    @property
    def are_known(self) -> bool:
        """True if the scores of some prompt are known."""
        return self.is_stored or any(self.prompts)

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest prompt that is known. A response with several turns has one prompt after the other."""
        return next((known for known in reversed(self.prompts) if known), None)

    @property
    def header(self) -> str | None:
        """The value of `x-llama-probe`, for a response to one prompt."""
        if len(self.prompts) != 1 or not self.prompts[0]:
            return None
        items = (_item(quote(name, safe=""), said) for name, said in self.prompts[0]["probes"].items())
        value = ", ".join(item for item in items if item)
        return value if 0 < len(value) <= _LONGEST else None

    def complete(self, body: bytes) -> bytes:
        """Return a complete response with scores in each of several choices, and with the halt."""
        payload = json.loads(body)
        if "choices" in payload and len(self.prompts) > 1:
            payload["kv_transfer_params"] = None
            for choice in payload["choices"]:
                choice["kv_transfer_params"] = self._of(choice["index"])
        elif payload.get("object") == "response" and _is_halted(payload.get("kv_transfer_params")):
            payload |= _INCOMPLETE
        elif payload.get("type") == "message" and _is_halted(self.last):
            payload |= _REFUSAL
        else:
            return body
        return json.dumps(payload, ensure_ascii=False).encode()

    def stream(self, body: bytes) -> bytes:
        """Return events of a stream with scores in the first of each choice, and with the halt. vLLM sends whole events."""
        return b"\n\n".join(map(self._event, body.split(b"\n\n")))

    def _event(self, event: bytes) -> bytes:
        if event.startswith(_DATA) and len(self.told) < self.copies * len(self.prompts):
            return self._chunk(event)
        if not event.startswith(_EVENTS) or not self.are_known:
            return event
        name, _, data = event.partition(_DATA)
        payload = json.loads(data)
        match payload["type"]:
            case "response.created":
                payload["response"]["kv_transfer_params"] = self.last
            case "message_start":
                payload["message"]["kv_transfer_params"] = self.last
            case "message_delta" if _is_halted(self.last):
                payload["delta"] |= _REFUSAL
            case "response.completed" if _is_halted(payload["response"].get("kv_transfer_params")):
                payload["type"], name = "response.incomplete", b"event: response.incomplete\n"
                payload["response"] |= _INCOMPLETE
        return name + _data(payload)

    def _chunk(self, event: bytes) -> bytes:
        data = event.removeprefix(_DATA)
        chunk = {} if data == _END else json.loads(data)
        if not chunk.get("choices"):  # usage, or the end
            return b"".join(_data(missing) + b"\n\n" for missing in self._missing()) + event
        index = chunk["choices"][0]["index"]
        return event if index in self.told or not self._of(index) else _data(self._with_scores(chunk))

    def _with_scores(self, chunk: dict[str, Any]) -> dict[str, Any]:
        (choice,) = chunk["choices"]
        self.told.add(choice["index"])
        known = chunk["kv_transfer_params"] = self._of(choice["index"])
        if _is_halted(known) and not self.has_text:  # this chunk is all there is of the choice
            choice.update(finish_reason=HALTED, stop_reason=known["halted"]["head"])
        return chunk

    def _missing(self) -> list[dict[str, Any]]:
        """Return chunks of choices without a token, of which `/v1/completions` says nothing."""
        if not self.request_id.startswith(_TEXTS):
            return []
        head = {"id": self.request_id.rpartition("-")[0], "object": "text_completion"}
        head |= {"created": int(time.time()), "model": self.model}
        return [
            self._with_scores({**head, "choices": [{"index": index, "text": "", "logprobs": None}]})
            for index in range(self.copies * len(self.prompts))
            if index not in self.told and _is_halted(self._of(index))
        ]

    def _of(self, index: int) -> dict[str, Any] | None:
        prompt = index // self.copies
        return self.prompts[prompt] if prompt < len(self.prompts) else None


def _is_halted(known: Mapping[str, Any] | None) -> bool:
    return bool(known and known.get("halted"))


def _data(payload: dict[str, Any]) -> bytes:
    return _DATA + json.dumps(payload, ensure_ascii=False).encode()


def _item(name: str, said: Mapping[str, Any]) -> str:
    """Return one head's part of the header, a member of a structured field. Empty if the head's scores are hidden."""
    if "error" in said:
        return f"{name};error"
    score, scores = said.get("score"), said.get("scores", {})
    if "label" not in said:  # regression
        values = list(scores.values()) if score is None else [score]
        found, is_one = [f"{value:.6g}" for value in values], len(values) == 1
        if not found:
            return ""
    else:
        is_one = not isinstance(said["label"], list)
        labels = [said["label"]] if is_one else said["label"]
        found = [quote(label, safe="") + (f";p={round(scores[label], 3):g}" if scores else "") for label in labels]
    return f"{name}={found[0]}" if is_one else f"{name}=({' '.join(found)})"
