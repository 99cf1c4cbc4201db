"""The weight that a head gave to each token and layer of a text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from ..data.prompts import PromptFormat, Text
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import in_words
from ..heads.scope import token_mask
from ..serving.texts import format_to_score


_CONTINUATION = "◦"  # in place of a token that only continues the character before it
_MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
_HIDING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of characters that hide or move text
_JOINERS = "\u200c\u200d"  # part of words and of emoji
_MAX_TOKENS_A_CHARACTER = 8


@dataclass(frozen=True, eq=False)
class Reading:
    """The result of a head for one text, and what it looked at.

    Attributes:
        head, config: name and config of the head.
        text: the text without the chat template.
        tokens: text of each token of the prompt, chat template included; `""` for a token that only continues a character.
        template: True for a special token, and for a token that the chat template adds.
        counted: True for a token that the head reads. Its `token_scope` may leave out the constant prefix.
        weights (`[layers_read, tokens]`): weight of each token in a layer; each row sums to 1.
        layer_weights (`[layers_read]`): weight of each layer; sums to 1.
        prediction: what the head says of the text; see `describe_predictions`.
    """

    head: str
    config: ProbeConfig
    text: str
    tokens: list[str]
    template: list[bool]
    counted: list[bool]
    weights: np.ndarray
    layer_weights: np.ndarray
    prediction: JSON

    @property
    def token_weights(self) -> np.ndarray:
        """Weight of each token over all layers, `[tokens]`: `sum_l layer_weight_l * weight_l`; sums to 1."""
        return self.layer_weights @ self.weights

    @property
    def in_words(self) -> str:
        """The label with its probability; for regression the value."""
        return in_words(self.prediction, ".0%")

    def shown(self, position: int, width: int) -> str:
        """Return a token on one line, without the spaces around it, in at most `width` characters."""
        token = self.tokens[position]
        return cut(printable(token.strip(" ")) or "␣" * len(token) or _CONTINUATION, width)


def read_weights(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[Text]
) -> list[Reading]:
    """Run a model with one active head over texts or lists of chat messages, one at a time; return what the head looked at.

    Raises:
        ProbeError: not exactly one head is active, or the head type gives no weights.
    """
    if len(model.active_probes) != 1:
        active = ", ".join(model.active_probes) or "none"
        raise ProbeError(f"weights need one active head, not {active}: set_active_probes([name])")
    (head,) = model.active_probes
    config = model.probes[head].config
    prompt_format = format_to_score(config, tokenizer)
    readings = []
    for text, ids in zip(texts, prompt_format.encode(texts), strict=True):
        input_ids = torch.tensor([ids], device=model.device)
        output = model.classify(input_ids, output_attentions=True)[head]
        if output.token_weights is None or output.layer_weights is None:
            raise ProbeError(f"head={head!r} has no weights to show: its head type {config.probe_type!r} gives none")
        readings.append(
            Reading(
                head=head,
                config=config,
                text=text if isinstance(text, str) else str(text[-1].get("content")),
                tokens=token_texts(tokenizer, ids),
                template=_template_mask(prompt_format, ids),
                counted=token_mask(config, input_ids, None)[0].tolist(),
                weights=output.token_weights[0].float().cpu().numpy(),
                layer_weights=output.layer_weights[0].float().cpu().numpy(),
                prediction=output.describe()[0],
            )
        )
    return readings


def token_texts(tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    r"""Return the text of each token, with its spaces.

    If a character takes several tokens, the first token has the character as its text, and the next tokens have `""`. Bytes
    that make no character are `"\ufffd"`.
    """
    texts: list[str] = []
    while len(texts) < len(ids):
        rest = ids[len(texts) : len(texts) + _MAX_TOKENS_A_CHARACTER]
        counts = range(1, len(rest) + 1)
        taken = next((count for count in counts if "\ufffd" not in _decode(tokenizer, rest[:count])), 1)
        texts += [_decode(tokenizer, rest[:taken]), *[""] * (taken - 1)]
    return texts


def _template_mask(prompt_format: PromptFormat, ids: Sequence[int]) -> list[bool]:
    """Mark the tokens that the template puts around the text or between its turns."""
    tokenizer = prompt_format.tokenizer
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    mask = [index in special for index in ids]
    before, after = len(prompt_format.prefix_ids), len(prompt_format.suffix_ids)
    if tuple(ids[:before]) == prompt_format.prefix_ids:
        mask[:before] = [True] * before
    if after and tuple(ids[-after:]) == prompt_format.suffix_ids:
        mask[-after:] = [True] * after
    return mask


def _decode(tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # SentencePiece decoders drop the first space.
    marked = str(tokenizer.convert_ids_to_tokens(int(ids[0]))).startswith("\u2581")
    return f" {text}" if marked and not text.startswith(" ") else text


def printable(text: str) -> str:
    r"""Replace characters that hide or move text: a mark for line breaks and tabs, an escape such as `\u202e` for others."""

    def shown(character: str) -> str:
        if character in _MARKS:
            return _MARKS[character]
        hides = unicodedata.category(character) in _HIDING and character not in _JOINERS
        return f"\\u{ord(character):04x}" if hides else character

    return "".join(map(shown, text))


def cut(text: str, width: int) -> str:
    """Return a text in at most `width` characters, of which the last is `…` if the text is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"
