"""Find the characters of a user's text that a span of tokens stands for: the passages that a head with windows flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..data.prompts import PromptFormat, Text, as_chat
from ..data.turn_markers import Chat
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig


# These characters are for private use, and templates copy them.
_MARKS = "\ue000{}\ue001"


def check_finds_passages(configs: Mapping[str, ProbeConfig]) -> None:
    """Raise `ProbeError` unless heads, by name, judge windows, which tell where in a text a label was found."""
    for name, config in configs.items():
        if not config.window:
            raise ProbeError(
                f"{name!r} judges no windows, so it cannot say where in a text a label is: choose one that does"
            )


def check_knows_characters(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ProbeError` unless a tokenizer tells the characters of its tokens."""
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ProbeError(f"passages need a fast tokenizer, which knows the characters of its tokens, not a {kind}")


def locate(prompts: PromptFormat, text: Text, ids: Sequence[int], spans: Mapping[str, Sequence[int]]) -> list[JSON]:
    """Return the characters of a text that spans of its tokens stand for.

    A span that begins or ends in what the chat template writes is cut to the message. Of a span over several messages, the message
    with most of its characters counts. White space around a passage is left out.

    Args:
        prompts: the format of the text. Its tokenizer must be a fast one.
        ids: the token ids of the text, from `prompts.encode`.
        spans: first token and one past the last, by label.

    Returns:
        For each label `label`; `start` and `end`: the first character and one past the last, of a text or of the content of a message;
        `message`, the number of this message from 0, of a chat; and `text`, these characters. If a span has no token of a message, or
        the template writes a content in other characters, `start` and `end` are `None`, and `text` is as the template writes it.

    Raises:
        ProbeError: the tokenizer is not a fast one, or `ids` are not those of the text.
    """
    check_knows_characters(prompts.tokenizer)
    is_raw = prompts.kind == "raw"
    messages = as_chat(text) if is_raw else prompts.messages(text)
    rendered = str(text) if is_raw else prompts.render(messages)
    added = len(messages) - len(as_chat(text))  # a system turn, or the call of a tool
    contents = _find_contents(prompts, messages, rendered)[added:]
    offsets = _offsets(prompts, rendered, ids)
    passages = []
    for label, (first, end) in spans.items():
        characters = [(start, stop) for start, stop in offsets[first:end] if start < stop]
        start = min((start for start, _ in characters), default=0)
        stop = max((stop for _, stop in characters), default=0)
        passage = _cut_to_message(rendered, contents, start, stop)
        if isinstance(text, str):
            del passage["message"]
        passages.append({"label": label, **passage})
    return passages


class _Content(NamedTuple):
    """The content of a message in a rendered prompt: its first character and one past the last, and what was cut before it."""

    first: int
    end: int
    missing: int

    def overlap(self, start: int, stop: int) -> int:
        return min(self.end, stop) - max(self.first, start)


def _cut_to_message(rendered: str, contents: list[_Content | None], start: int, stop: int) -> JSON:
    """Return the passage at characters `start` to before `stop` of a rendered prompt; see `locate`."""
    overlaps = [0 if content is None else content.overlap(start, stop) for content in contents]
    message = overlaps.index(max(overlaps))
    content = contents[message]
    if content is None or overlaps[message] <= 0:
        return {"start": None, "end": None, "message": None, "text": rendered[start:stop].strip()}
    start = max(start, content.first)
    text = rendered[start : min(stop, content.end)]
    start += len(text) - len(text.lstrip()) + content.missing - content.first
    text = text.strip()
    return {"start": start, "end": start + len(text), "message": message, "text": text}


def _find_contents(prompts: PromptFormat, messages: Chat, rendered: str) -> list[_Content | None]:
    """Return the place of each message's content in a rendered prompt; None where the template writes other characters.

    A copy of the messages with marks for contents shows what the template writes before each content.
    """
    if prompts.kind == "raw":
        return [_Content(0, len(rendered), 0)]
    is_marked = [isinstance(message.get("content"), str) for message in messages]
    marked = [
        {**message, "content": _MARKS.format(number)} if is_text else message
        for number, (message, is_text) in enumerate(zip(messages, is_marked, strict=True))
    ]
    rest = prompts.render(marked)
    contents: list[_Content | None] = []
    seen = 0
    for number, message in enumerate(messages):
        before, mark, behind = rest.partition(_MARKS.format(number))
        found = None
        if is_marked[number] and mark:
            rest = behind
            found = _find_content(rendered, before, message["content"], seen)
        if found is not None:
            seen = found.end
        contents.append(found)
    return contents


def _find_content(rendered: str, before: str, content: str, seen: int) -> _Content | None:
    """Return the place of a content behind `before`, whole or without the white space around it, after `seen` characters."""
    for written in (content, content.strip()):
        place = rendered.find(before + written, seen)
        if place >= 0:
            first = place + len(before)
            return _Content(first, first + len(written), content.find(written))
    return None


def _offsets(prompts: PromptFormat, rendered: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return the characters of each token of a prompt, which may have been cut: first and one past the last."""
    encoded = prompts.tokenizer(
        rendered, add_special_tokens=prompts.kind == "raw", return_offsets_mapping=True, verbose=False
    )
    whole, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    ids = list(ids)
    kept = len(ids) if len(ids) == len(whole) else len(ids) - len(prompts.suffix_ids)
    for first in range(len(whole) - kept + 1):
        if whole[first : first + kept] == ids[:kept]:
            return offsets[first : first + kept] + [(0, 0)] * (len(ids) - kept)
    raise ProbeError(f"the {len(ids)} token ids are not those of the text in this prompt format")
