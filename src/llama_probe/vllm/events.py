"""Scores, halts and ends in a stream of server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from ..files import JSON
from .payloads import INCOMPLETE, REFUSAL, Scores, is_halted


_BLANK_LINE = b"\n\n"  # ends an event
_DATA = b"data: "
_UNSCORED = b"event: response."  # a stream of /v1/responses begins before the engine has read the prompt
_CHANGED_NAMES = b"message_start message_delta response.created response.completed response.incomplete"
_CHANGED = tuple(b"event: " + name for name in _CHANGED_NAMES.split())


class EventStream:
    """Put scores and halts into the events of one response, and add the end of each choice that the server leaves out.

    The first chunk of a choice gets the scores of the prompt, and the last chunk those of the reply.
    """

    def __init__(self, scores: Scores):
        self._scores = scores
        self._rest = b""  # the beginning of an event that is not complete
        self._waiting: list[bytes] = []  # events that wait for scores
        self._chunk: JSON | None = None  # the newest chunk
        self._begun: set[int] = set()  # choices whose scores were sent

    def feed(self, piece: bytes, is_last: bool) -> bytes:
        """Return the events that a piece of the response completes. With the last piece, return all that is left."""
        *events, self._rest = (self._rest + piece).split(_BLANK_LINE)
        self._waiting += events
        is_early = bool(self._waiting) and self._waiting[0].startswith(_UNSCORED)
        if is_early and not self._scores.are_known and not is_last:
            return b""
        events, self._waiting = self._waiting, []
        changed = b"".join(self._changed(event) + _BLANK_LINE for event in events)
        return changed + self._rest if is_last else changed

    def _changed(self, event: bytes) -> bytes:
        if event.startswith(_DATA):
            return self._changed_chunk(event)
        if not event.startswith(_CHANGED) or not self._scores.are_known:
            return event
        name, _, data = event.partition(_DATA)
        payload = json.loads(data)
        result = self._scores.last
        match payload["type"]:
            case "response.created" if result:
                payload["response"]["kv_transfer_params"] = result
            case "message_start":
                payload["message"]["kv_transfer_params"] = result
            case "message_delta":
                if 0 in self._scores.halted:
                    payload["delta"] |= REFUSAL
                if result and "replies" in result:
                    payload["kv_transfer_params"] = result
            case "response.completed" | "response.incomplete":  # from 0.33 on the second one at `max_output_tokens`
                if is_halted(payload["response"].get("kv_transfer_params")):
                    payload["type"] = "response.incomplete"
                    payload["response"] |= INCOMPLETE
                    name = b"event: response.incomplete\n"
        return name + _data(payload)

    def _changed_chunk(self, event: bytes) -> bytes:
        data = event.removeprefix(_DATA)
        chunk = {} if data == b"[DONE]" else json.loads(data)
        choices = chunk.get("choices")  # one, or none beside the usage
        if not choices:
            return _BLANK_LINE.join([*self._missing_ends(), event])
        self._chunk = chunk
        index = choices[0]["index"]
        is_end = choices[0].get("finish_reason") is not None
        if is_end:
            self._scores.ends.pop(index, None)
        result = self._scores.of_choice(index)
        if not result:
            return event
        if index in self._begun and not (is_end and "replies" in result):
            if "kv_transfer_params" not in chunk:
                return event
            del chunk["kv_transfer_params"]  # vLLM 0.33 says once more at the end what the first chunk has said
            return _data(chunk)
        self._begun.add(index)
        return _data({**chunk, "kv_transfer_params": result})

    def _missing_ends(self) -> Iterator[bytes]:
        """Yield the ends that were not sent: vLLM 0.32 sends none for a choice without a token and a text."""
        for index in sorted(self._scores.ends):
            chunk = self._chunk or {
                "id": self._scores.request_id.rpartition("-")[0],  # vLLM numbers the prompts of a request
                "object": "text_completion",  # a chat has sent a chunk with its role
                "created": int(time.time()),
                "model": self._scores.model,
            }
            text = {"delta": {}} if "chat" in chunk["object"] else {"text": ""}
            choice = {"index": index, **text, "logprobs": None, **self._scores.ends[index]}
            same = {name: chunk[name] for name in ("id", "object", "created", "model")}
            yield self._changed_chunk(_data({**same, "choices": [choice]}))


def _data(payload: JSON) -> bytes:
    return _DATA + json.dumps(payload, ensure_ascii=False).encode()
