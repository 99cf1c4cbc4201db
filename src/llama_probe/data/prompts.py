"""How a text becomes the prompt that the LM sees, the same at training and at serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..backbone.fingerprint import template_hash
from ..errors import ProbeError
from ..heads.configuration import HALF_PAIR, PROMPT_FORMATS, ProbeConfig


logger = logging.get_logger(__name__)

Text = str | list[dict[str, str]]

# Texts that share neither their first nor their last token; what all their prompts share is the template's own.
_DIFFERENT_TEXTS = ("Alpha beta", "7 + 12 = x", "(why?)", "été\u4f60", "- no.")


class EncodedTexts(NamedTuple):
    """What a head reads.

    Attributes:
        ids: token ids of each text.
        masks: which of them count, where `token_mask` cannot tell it from the ids.
        reply_lengths: tokens of the reply that each text ends with, for heads that read replies.
    """

    ids: list[list[int]]
    masks: list[list[bool]] | None = None
    reply_lengths: list[int] | None = None


@dataclass(frozen=True)
class PromptFormat:
    """Renders texts with the tokenizer's chat template, or as they are, and cuts them to a length.

    Attributes:
        tokenizer: of the backbone.
        kind: `"chat"` or `"raw"`.
        system_prompt: a system turn of one's own; `None` leaves it to the template. Chat only.
        max_length: tokens at most; the text is cut at its end, the template's last tokens stay. `None` for no limit.
        prefix_ids, suffix_ids: the constant token ids before and after every text.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: str = "chat"
    system_prompt: str | None = None
    max_length: int | None = None
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()

    @classmethod
    def create(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        kind: str = "chat",
        system_prompt: str | None = None,
        max_length: int | None = None,
    ) -> PromptFormat:
        """Finds the constant prefix and suffix of the format.

        Raises:
            ProbeError: an unknown kind, a tokenizer without a chat template, or a `max_length` with no room for a text.
        """
        if kind not in PROMPT_FORMATS:
            raise ProbeError(f"prompt_format={kind!r} is not allowed; allowed: {', '.join(PROMPT_FORMATS)}")
        if kind == "chat" and not tokenizer.chat_template:
            raise ProbeError("the tokenizer has no chat template; use prompt_format='raw'")
        if kind == "raw" and system_prompt is not None:
            raise ProbeError("system_prompt needs prompt_format='chat'")
        prefix, suffix = constant_parts(cls(tokenizer, kind, system_prompt)._ids)
        if max_length is not None and max_length <= len(prefix) + len(suffix):
            raise ProbeError(
                f"max_length={max_length} leaves no room for a text: the prompt's constant parts have "
                f"{len(prefix) + len(suffix)} tokens"
            )
        return cls(tokenizer, kind, system_prompt, max_length, tuple(prefix), tuple(suffix))

    @classmethod
    def from_config(cls, config: ProbeConfig, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """The format that a head was trained with; warns where the tokenizer's chat template is another one."""
        if config.prompt_format == "chat" and config.chat_template_hash not in (None, template_hash(tokenizer)):
            logger.warning(
                "The tokenizer's chat template is not the one that the head was trained with; its scores may be less reliable."
            )
        return cls.create(tokenizer, config.prompt_format, config.system_prompt, config.max_length)

    def config_fields(self) -> dict[str, Any]:
        """What a `ProbeConfig` records of the format."""
        return {
            "prompt_format": self.kind,
            "system_prompt": self.system_prompt,
            "max_length": self.max_length,
            "prefix_ids": list(self.prefix_ids),
            "chat_template_hash": template_hash(self.tokenizer) if self.kind == "chat" else None,
        }

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids of each prompt. Says how many were cut, where any was.

        Args:
            texts: texts, or lists of chat messages (`{"role": ..., "content": ...}`) that end with the user's.

        Raises:
            ProbeError: it is one text, or one chat, rather than a list of them; or one cannot be rendered.
        """
        _check_several(texts)
        prompts, cut = [], 0
        for text in texts:
            ids = self._ids(text)
            if self.max_length is not None and len(ids) > self.max_length:
                cut += 1
                ids = [*ids[: self.max_length - len(self.suffix_ids)], *self.suffix_ids]
            prompts.append(ids)
        if cut:
            logger.warning(f"{cut} of {len(prompts)} prompts were cut to max_length={self.max_length} tokens")
        return prompts

    def encode_replies(self, texts: Sequence[Text]) -> tuple[list[list[int]], list[list[bool]]]:
        """Token ids of prompts with their replies, as `generate()` has met them when a reply is complete.

        These are the prompt's, with the generation prompt at its end, and then the reply's without an end of turn. Where
        `max_length` is too short, the prompt's text is cut to no less than half of the room, and then the reply.

        Args:
            texts: lists of chat messages that end with the assistant's; with `kind="raw"` one of the user and one of the
                assistant, whose contents follow one another.

        Returns:
            The ids, and for each whether it is the reply's.

        Raises:
            ProbeError: a text does not end with a reply, or with one that is empty; or there is one alone, not in a list.
        """
        _check_several(texts)
        encoded, masks, cut = [], [], 0
        for text in texts:
            before, content = split_reply(text)
            prompt = self._ids(before[-1]["content"] if self.kind == "raw" else before)
            reply = self._tokens(content, add_special_tokens=False)
            if self.max_length is not None and len(prompt) + len(reply) > self.max_length:
                cut += 1
                constant = len(self.prefix_ids) + len(self.suffix_ids)
                room = max(self.max_length - len(reply), (self.max_length + constant) // 2)
                if len(prompt) > room:
                    prompt = [*prompt[: room - len(self.suffix_ids)], *self.suffix_ids]
                reply = reply[: self.max_length - len(prompt)]
            encoded.append([*prompt, *reply])
            masks.append([False] * len(prompt) + [True] * len(reply))
        if cut:
            logger.warning(f"{cut} of {len(encoded)} rows were cut to max_length={self.max_length} tokens")
        return encoded, masks

    def encode_for(self, config: ProbeConfig, texts: Sequence[Text]) -> EncodedTexts:
        """What a head reads of texts; see `encode` and `encode_replies`."""
        if not config.reads_reply:
            return EncodedTexts(self.encode(texts))
        encoded, masks = self.encode_replies(texts)
        lengths = [sum(mask) for mask in masks]
        return EncodedTexts(encoded, masks if config.token_scope == "response" else None, lengths)

    def batch(self, texts: Sequence[Text], padding_side: str = "left") -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` of shape `[batch, tokens]`, ready for `generate(**batch)`.

        Raises:
            ProbeError: there is no text, or see `encode`.
        """
        encoded = self.encode(texts)
        if not encoded:
            raise ProbeError("there is no prompt to make a batch of: give at least one")
        return pad_prompts(encoded, self.tokenizer, padding_side)

    def _ids(self, text: Text) -> list[int]:
        _check_text(text)
        if self.kind == "raw":
            if not isinstance(text, str):
                raise ProbeError("prompt_format='raw' takes texts, not chat messages")
            ids = self._tokens(text)
            bos = self.tokenizer.bos_token_id
            # A text that spells out its BOS token would get a second one from the tokenizer.
            return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and fails as it likes at turns that it does not know
            raise ProbeError(
                f"the chat template of the tokenizer cannot write {str(messages)[:60]!r}: {error}"
            ) from error
        # The template has written every special token already.
        return self._tokens(rendered, add_special_tokens=False)

    def _tokens(self, text: str, **kwargs) -> list[int]:
        if half := HALF_PAIR.search(text):
            raise ProbeError(
                f"{text[:60]!r} is no text: {half.group()!r} is half of a character. Was it read as UTF-8, and is it?"
            )
        return self.tokenizer(text, **kwargs)["input_ids"]


def _check_several(texts: Sequence[Text]) -> None:
    """Raises `ProbeError` for a single text, turn or chat: it would be taken for several, its characters, keys or turns."""
    if isinstance(texts, (str, Mapping)) or (
        isinstance(texts, Sequence) and len(texts) > 0 and isinstance(texts[0], Mapping)
    ):
        raise ProbeError(
            f"here is one prompt where a list of prompts is wanted: put it in brackets, [...]; it is {str(texts)[:40]!r}"
        )


def _check_text(text: Text) -> None:
    """Raises `ProbeError` for what is neither a text nor chat messages. What a turn may say is the template's affair."""
    if isinstance(text, str):
        return
    turns = text if isinstance(text, Sequence) else []
    if not turns or not all(map(_has_role, turns)):
        raise ProbeError(
            "a prompt is a text, or a list of chat messages, [{'role': 'user', 'content': ...}, ...]; "
            f"there is {str(text)[:40]!r} ({type(text).__name__})"
        )


def exchange(prompt: Text, reply: str) -> list[dict[str, str]]:
    """A prompt - a text, or chat messages - with the reply to it, as chat messages."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*before, {"role": "assistant", "content": reply}]


def split_reply(text: Text) -> tuple[list[dict[str, str]], str]:
    """The messages before an assistant's turn, and what it says.

    Raises:
        ProbeError: the text does not end with such a turn, or says nothing.
    """
    _check_text(text)
    messages = [] if isinstance(text, str) else list(text)
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not str(messages[-1]["content"]).strip():
        raise ProbeError(
            "a head that reads replies needs rows with a prompt and a reply: name the column of the prompts (prompt_column, "
            "--prompt-column) beside that of the replies, or give chat messages that end with an assistant's turn; "
            f"there is {str(text)[:60]!r}"
        )
    return messages[:-1], messages[-1]["content"]


def is_text(value: Any) -> bool:
    """Whether it is a text, or a list of chat messages."""
    if isinstance(value, str):
        return HALF_PAIR.search(value) is None
    return isinstance(value, list) and len(value) > 0 and all(map(_is_turn, value))


def _is_turn(turn: Any) -> bool:
    """Whether it has a role, and says something or calls a tool: a template may know how to write that."""
    return (
        _has_role(turn)
        and (turn.get("content") is not None or bool(turn.get("tool_calls")))
        and (not isinstance(turn.get("content"), str) or is_text(turn["content"]))
    )


def _has_role(turn: Any) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("role"), str)


def check_alike(configs: Mapping[str, ProbeConfig], replies: bool = False) -> None:
    """Raises `ProbeError` where heads cannot read the same prompts in one pass.

    Args:
        configs: of the heads, by name. replies: whether the texts hold the replies too, for heads that read these.
    """

    def reading(config: ProbeConfig) -> dict[str, Any]:
        found = {name: getattr(config, name) for name in ("prompt_format", "system_prompt", "max_length")}
        # The scope of heads that read prompts is their own affair; a reply is a part of what is rendered.
        scope = {"token_scope": config.token_scope if config.reads_reply else "of the prompt"} if replies else {}
        return found | scope

    (first, one), *others = ((name, reading(config)) for name, config in configs.items())
    for name, other in others:
        if different := [key for key in one if one[key] != other[key]]:
            key = different[0]
            raise ProbeError(
                f"heads {first!r} and {name!r} cannot share a pass: {key} is {one[key]!r} and {other[key]!r}. Score them one "
                "after the other"
            )


def pad_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of shape `[batch, tokens]`.

    Raises:
        ProbeError: `padding_side` is none.
    """
    if padding_side not in ("left", "right"):
        raise ProbeError(f"padding_side={padding_side!r} is not allowed; allowed: left, right")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), pad)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, ids in enumerate(prompts):
        columns = slice(width - len(ids), width) if padding_side == "left" else slice(0, len(ids))
        input_ids[row, columns] = torch.tensor(ids)
        attention_mask[row, columns] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def constant_parts(render: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """The token ids before and after every text, for a function from a text to the ids of its prompt."""
    examples = [render(text) for text in _DIFFERENT_TEXTS]
    prefix = common_start(examples)
    return prefix, common_start([ids[: len(prefix) - 1 if prefix else None : -1] for ids in examples])[::-1]


def common_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """What all sequences begin with."""
    start = []
    for items in zip(*sequences, strict=False):
        if len(set(items)) > 1:
            break
        start.append(items[0])
    return start
