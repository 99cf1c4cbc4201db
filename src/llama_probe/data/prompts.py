"""Turn texts into the prompts that the LM reads, the same in training and in serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeGuard

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.utils import logging

from ..backbone.fingerprint import template_hash
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.rules import HALF_PAIR, PROMPT_FORMATS
from ..heads.turns import TurnMarker, turn_mask
from .turn_markers import DIFFERENT_TEXTS, Chat, as_tool_result, common_end, common_start, learn_turn_markers


logger = logging.get_logger(__name__)

Text = str | Chat
# The number of a turn of a text (0 of a text that is no chat), a character of its content, and the character behind the last one.
Place = tuple[int, int, int]
_MARGIN = 64  # tokens
_MARK = "\ue000"  # stands for a request: a character for private use, which templates copy


class PromptDataset(Dataset):
    """Token ids and labels of rows, for heads with the backbone in the loop.

    Items have `input_ids` and, if the data set has them, `labels`, `probe_mask` and `request_mask`.

    Args:
        prompts: token ids of each row.
        labels (`[rows, ...]`): labels as in `LabelledTexts`.
        masks: True for each token of a row that counts. Defaults to the tokens of the head's scope.
        reply_lengths: number of tokens of the reply at the end of each row, for heads that read replies.
        requests: True for each token of a row that gives the row its label, for heads with windows; see
            `PromptFormat.request_masks`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        labels: np.ndarray | None = None,
        masks: list[list[bool]] | None = None,
        reply_lengths: list[int] | None = None,
        requests: list[list[bool]] | None = None,
    ):
        self.prompts = prompts
        self.labels = labels
        self.masks = masks
        self.reply_lengths = reply_lengths
        self.requests = requests
        self.columns = {"input_ids": prompts, "labels": labels, "probe_mask": masks, "request_mask": requests}

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> dict:
        return {name: values[row] for name, values in self.columns.items() if values is not None}


@dataclass
class PromptFormat:
    """Renders texts with the tokenizer's chat template, or as they are, and cuts them to a length.

    Attributes:
        kind: `"chat"` or `"raw"`.
        system_prompt: text of a system turn. With None the template decides. Chat only.
        max_length: largest number of tokens, None for no limit. A long text loses its end, before the template's last tokens.
            If the turns before the last turn of the user (the tool) take more than half of the room, they lose their beginning.
        turn_markers: tokens that open the turns of a chat; see `ProbeConfig.turn_markers`. Learned from the template by default.
        text_role: the role of a text: `"user"`, or for heads that read tool results `"tool"`, after a call of the tool.
        prefix_ids, suffix_ids: constant token ids before and after every text.

    Raises:
        ProbeError: there is no chat template, it marks no tool results for a head that reads them, or `max_length` leaves
            no room for a text.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    kind: str = "chat"
    system_prompt: str | None = None
    max_length: int | None = None
    turn_markers: dict[str, TurnMarker] | None = None
    text_role: str = "user"
    prefix_ids: tuple[int, ...] = field(init=False, default=())
    suffix_ids: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self):
        if self.kind == "chat" and not self.tokenizer.chat_template:
            raise ProbeError("the tokenizer has no chat template; use prompt_format='raw'")
        if self.kind == "raw" and self.system_prompt is not None:
            raise ProbeError("system_prompt needs prompt_format='chat'")
        if self.turn_markers is None and self.kind == "chat":
            self.turn_markers = _learned_markers(self.tokenizer, str(self.tokenizer.chat_template))
        if self.text_role == "tool" and "tool" not in (self.turn_markers or ()):
            raise ProbeError("token_scope='tool' needs a chat template that marks tool results, and this one does not")
        examples = list(map(self._encode_one, DIFFERENT_TEXTS))
        self.prefix_ids = prefix = tuple(common_start(examples))
        self.suffix_ids = suffix = tuple(common_end(ids[len(prefix) :] for ids in examples))
        constant = len(prefix) + len(suffix)
        if self.max_length is not None and self.max_length <= constant:
            raise ProbeError(f"max_length={self.max_length} leaves no room for a text beside {constant} tokens")

    @classmethod
    def from_config(cls, config: ProbeConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> PromptFormat:
        """Create the format that a head was trained with. Warn if the format is unknown, or the chat template is another one."""
        kind = config.prompt_format
        markers = config.turn_markers
        if kind not in PROMPT_FORMATS:
            kind = "chat" if tokenizer.chat_template else "raw"
            logger.warning_once(
                f"The head was trained on rows that its user tokenised: its prompt_format is unknown, and {kind!r} is used."
            )
        elif kind == "chat" and config.chat_template_hash not in (None, template_hash(tokenizer)):
            logger.warning("The head was trained with another chat template; its scores may be less reliable.")
            markers = None
        role = "tool" if config.token_scope == "tool" else "user"
        return cls(tokenizer, kind, config.system_prompt, config.max_length, markers, role)

    def config_fields(self) -> JSON:
        """Return the format as fields of a `ProbeConfig`."""
        return {
            "prompt_format": self.kind,
            "system_prompt": self.system_prompt,
            "max_length": self.max_length,
            "prefix_ids": list(self.prefix_ids),
            "turn_markers": self.turn_markers,
            "chat_template_hash": template_hash(self.tokenizer) if self.kind == "chat" else None,
        }

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Return the token ids of each prompt. Warn if prompts were cut.

        Args:
            texts: texts, or lists of chat messages (`{"role": ..., "content": ...}`) that end with a turn of the user.
        """
        _check_list(texts)
        prompts = list(map(self._encode_start, texts))
        is_long = [self.max_length is not None and len(ids) > self.max_length for ids in prompts]
        self._report_cut(is_long)
        return [
            [*ids[self._kept(ids)], *self.suffix_ids] if long else ids
            for ids, long in zip(prompts, is_long, strict=True)
        ]

    def encode_replies(self, texts: Sequence[Text]) -> tuple[list[list[int]], list[list[bool]]]:
        """Return the token ids of prompts with replies as `generate()` has read them, and the masks of the replies.

        A prompt ends with the generation prompt, and a reply has no end of turn. If both do not fit into `max_length`, the
        prompt's text is cut to no less than half of the room, then the reply.

        Args:
            texts: lists of chat messages that end with a turn of the assistant. With `kind="raw"` a message of the user and a
                message of the assistant, whose contents are joined.
        """
        _check_list(texts)
        encoded: list[list[int]] = []
        masks: list[list[bool]] = []
        is_long: list[bool] = []
        for text in texts:
            before, content = split_reply(text)
            prompt = self._encode_one(before[-1]["content"] if self.kind == "raw" else before)
            reply = self._tokenize(content, add_special_tokens=False)
            is_long.append(self.max_length is not None and len(prompt) + len(reply) > self.max_length)
            if is_long[-1]:
                constant = len(self.prefix_ids) + len(self.suffix_ids)
                room = max(self.max_length - len(reply), (self.max_length + constant) // 2)
                if len(prompt) > room:
                    prompt = [*prompt[: room - len(self.suffix_ids)], *self.suffix_ids]
                reply = reply[: self.max_length - len(prompt)]
            encoded.append([*prompt, *reply])
            masks.append([False] * len(prompt) + [True] * len(reply))
        self._report_cut(is_long)
        return encoded, masks

    def request_masks(
        self, texts: Sequence[Text], places: Sequence[Place | None], prompts: Sequence[Sequence[int]]
    ) -> list[list[bool] | None]:
        """Return which tokens of each prompt have characters of the request; None where that is not known.

        It is not known without a place, with a slow tokenizer, or if the chat template writes the text in another way. No token
        is of the request if the request was cut off.

        Args:
            places: the place of the request in each text.
            prompts: the token ids of the texts, from `encode`.
        """
        masks: list[list[bool] | None] = []
        for text, place, prompt in zip(texts, places, prompts, strict=True):
            found = None
            if place is not None and self.tokenizer.is_fast:
                found = self._find_request(text, place)
            masks.append(None if found is None else self._request_mask(*found, prompt))
        return masks

    def encode_for(
        self,
        config: ProbeConfig,
        texts: Sequence[Text],
        labels: np.ndarray | None = None,
        places: Sequence[Place | None] | None = None,
    ) -> PromptDataset:
        """Return a data set of the texts as a head reads them: prompts, or prompts with their replies.

        Args:
            places: the places of what gives the texts their labels, to learn from. A text that has lost this part because it was
                cut gets the label that is not flagged.
        """
        if not config.reads_reply:
            prompts = self.encode(texts)
            requests = None
            if places is not None:
                found = self.request_masks(texts, places, prompts)
                lost = [row for row, mask in enumerate(found) if mask is not None and not any(mask)]
                labels = _without_requests(labels, lost, config)
                if config.window:
                    requests = [mask or [False] * len(ids) for mask, ids in zip(found, prompts, strict=True)]
            return PromptDataset(prompts, labels, requests=requests)
        ids, masks = self.encode_replies(texts)
        reply_lengths = list(map(sum, masks))
        return PromptDataset(ids, labels, masks if config.token_scope == "response" else None, reply_lengths)

    def batch(self, texts: Sequence[Text], padding_side: str = "left") -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` `[B, T]`, ready for `generate(**batch)`."""
        return pad_prompts(self.encode(texts), self.tokenizer, padding_side)

    def _encode_start(self, text: Text) -> list[int]:
        """Return the ids of a text. Of a very long text only a start is tokenised, because tokenizers need much memory."""
        if self.max_length is None or not isinstance(text, str) or len(text) <= self.max_length:
            return self._encode_one(text)
        # A cut changes the ids near it. The margin keeps these ids out of the result.
        ids = self._encode_one(text[: (self.max_length + _MARGIN) * self._longest_token])
        # One token may stand for any number of unknown characters.
        enough = len(self.prefix_ids) + self.max_length + _MARGIN
        return ids if len(ids) > enough else self._encode_one(text)

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def _encode_one(self, text: Text) -> list[int]:
        _check_text(text)
        if self.kind == "raw":
            if not isinstance(text, str):
                raise ProbeError("prompt_format='raw' takes texts, not chat messages")
            ids = self._tokenize(text)
            return ids[1:] if self._has_second_bos(ids) else ids
        return self._encode_chat(self.messages(text))

    def messages(self, text: Text) -> Chat:
        """Return a text or chat as messages for the chat template, with the system prompt, and with the call of a tool's result."""
        is_result = isinstance(text, str) and self.text_role == "tool"
        messages = as_tool_result(text) if is_result else as_chat(text)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def _has_second_bos(self, ids: list[int]) -> bool:
        """Return True for a text that spells out its BOS token, which gets a second one from the tokenizer."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and ids[:2] == [bos, bos]

    def _find_request(self, text: Text, place: Place) -> tuple[str, int, int] | None:
        """Return a prompt as the tokenizer reads it, the first character of the request in it, and the character behind it."""
        turn, first, end = place
        if self.kind == "raw":
            return text, first, end
        messages = self.messages(text)
        turn += len(messages) - len(as_chat(text))  # behind a system turn or the call of a tool
        content = messages[turn]["content"]
        prompt = self.render(messages)
        messages[turn] = {**messages[turn], "content": content[:first] + _MARK + content[end:]}
        before, *behind = self.render(messages).split(_MARK)
        if len(behind) != 1 or not prompt.startswith(before) or not prompt.endswith(behind[0]):
            return None
        first = len(before)
        end = len(prompt) - len(behind[0])
        return (prompt, first, end) if first < end else None

    def _request_mask(self, text: str, first: int, end: int, prompt: Sequence[int]) -> list[bool] | None:
        """Return which tokens of a prompt have characters from `first` to before `end` of its text."""
        encoded = self.tokenizer(
            text, add_special_tokens=self.kind == "raw", return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"]
        mask = [max(start, first) < min(stop, end) for start, stop in encoded["offset_mapping"]]
        if self.kind == "raw" and self._has_second_bos(ids):
            ids = ids[1:]
            mask = mask[1:]
        if self.max_length is not None and len(ids) > self.max_length:
            kept = self._kept(ids)
            ids = [*ids[kept], *self.suffix_ids]
            mask = mask[kept] + [False] * len(self.suffix_ids)
        return mask if ids == list(prompt) else None

    def _encode_chat(
        self, messages: Chat, generation_prompt: bool = True, documents: list[dict[str, str]] | None = None
    ) -> list[int]:
        # The template has written every special token.
        return self._tokenize(self.render(messages, generation_prompt, documents), add_special_tokens=False)

    def render(
        self, messages: Chat, generation_prompt: bool = True, documents: list[dict[str, str]] | None = None
    ) -> str:
        """Return chat messages, and documents, as the template writes them."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, documents=documents
            )
        except Exception as error:  # A template is a program and can raise anything.
            raise ProbeError(f"the chat template cannot render {str(messages)[:60]!r}: {error}") from error

    def _tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def _kept(self, ids: list[int]) -> slice:
        """Return the ids of a long prompt that stay before the constant suffix."""
        room = self.max_length - len(self.suffix_ids)
        first = 0
        if self.turn_markers is not None:
            scope = "tool" if self.text_role == "tool" else "last_user"
            turns = turn_mask(scope, self.turn_markers, torch.tensor([ids]))[0].int()
            begins = (turns.diff(prepend=turns.new_zeros(1)) > 0).nonzero().flatten().tolist()
            last_turn = max(begins, default=0)
            first = max(0, last_turn - max(room // 2, len(self.prefix_ids)))
        return slice(first, min(first + room, len(ids) - len(self.suffix_ids)))

    def _report_cut(self, is_long: Sequence[bool]) -> None:
        if any(is_long):
            cut = f"{sum(is_long)} of {len(is_long)} prompts were cut to max_length={self.max_length} tokens"
            logger.warning(f"{cut}: what comes behind is not read")


def _without_requests(labels: np.ndarray | None, lost: Sequence[int], config: ProbeConfig) -> np.ndarray | None:
    """Return labels in which the rows that have lost their request have no flagged label."""
    if labels is None or not lost or not (labels.ndim == 2 or config.flagged):
        return labels
    labels = labels.copy()
    if labels.ndim == 2:
        labels[lost] *= 0  # a label that is not known stays NaN
    else:
        labels[lost] = next(index for index, name in config.id2label.items() if name not in config.flagged)
    logger.warning(f"{len(lost)} texts have lost their request to max_length: they are learned as texts without one")
    return labels


@lru_cache(maxsize=4)
def _learned_markers(
    tokenizer: transformers.PreTrainedTokenizerBase, chat_template: str
) -> dict[str, TurnMarker] | None:
    """Learn the turn markers of a tokenizer's chat template once, because some hundred chats are rendered.

    The template is a part of the key of the cache, because a tokenizer may get another template.
    """
    return learn_turn_markers(PromptFormat(tokenizer, turn_markers={})._encode_chat)


def _check_list(texts: Sequence[Text]) -> None:
    """Raise `ProbeError` for a single text, turn or chat, which would pass for a list of texts."""
    is_chat = isinstance(texts, Sequence) and len(texts) > 0 and isinstance(texts[0], Mapping)
    if isinstance(texts, (str, Mapping)) or is_chat:
        raise ProbeError(f"texts must be a list of prompts, not one prompt: [{str(texts)[:40]!r}]")


def _check_text(text: Text) -> None:
    if not is_text(text):
        raise ProbeError(f"a prompt must be a text or a list of chat messages, not {ascii(text)[:60]}")


def as_chat(text: Text) -> Chat:
    """Return a text or chat messages as chat messages."""
    return [{"role": "user", "content": text}] if isinstance(text, str) else list(text)


def exchange(prompt: Text, reply: str) -> Chat:
    """Return a prompt and the reply to it as chat messages."""
    return [*as_chat(prompt), {"role": "assistant", "content": reply}]


def has_reply(text: Text) -> bool:
    """Return True for chat messages that end with a text of the assistant."""
    *before, last = as_chat(text)
    content = last.get("content")  # None if the turn calls a tool
    return bool(before) and last["role"] == "assistant" and isinstance(content, str) and bool(content.strip())


def split_reply(text: Text) -> tuple[Chat, str]:
    """Return the messages before the assistant's last turn, and the content of that turn."""
    _check_text(text)
    if not has_reply(text):
        raise ProbeError(f"a head of replies needs a prompt and a reply (--prompt-column), not {str(text)[:60]!r}")
    *before, last = as_chat(text)
    return before, last["content"]


def is_text(value: object) -> TypeGuard[Text]:
    """Return True for a text in Unicode, or for a list of chat messages that each have a content or call a tool."""
    if isinstance(value, str):
        return HALF_PAIR.search(value) is None
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_turn, value))


def _is_turn(turn: object) -> bool:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    return is_text(content) if isinstance(content, str) else content is not None or bool(turn.get("tool_calls"))


def check_alike(configs: Mapping[str, ProbeConfig]) -> None:
    """Raise `ProbeError` unless heads, by name, read prompts that are rendered alike."""
    for key in ("prompt_format", "system_prompt"):
        values = {name: getattr(config, key) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{value!r} of {name}" for name, value in values.items())
            raise ProbeError(f"heads cannot share a pass, because their {key} differs: {shown}")


def pad_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: transformers.PreTrainedTokenizerBase, padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` `[B, T]` of prompts, padded on the left or right."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = [torch.tensor(row, dtype=torch.long) for row in prompts]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=padding_side),
        "attention_mask": pad_sequence(list(map(torch.ones_like, ids)), batch_first=True, padding_side=padding_side),
    }
