"""Score texts and chats with heads, each rendered as its head was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..backbone.decoder import find_decoder
from ..backbone.kv_cache import repeat_cache
from ..backbone.passes import Pass, plan_passes
from ..data.prompts import PromptFormat, Text, pad_prompts
from ..data.turn_markers import marker_mask
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from ..heads.novelty import MeanStates
from ..heads.scope import tokens_read
from .reader import prompt_masks


_TEXTS = 1024  # at once, since all are padded to the longest
# Ends a prompt whose reply is to come without thoughts. It is no turn's marker: only some prompts of a template have it.
_NO_THOUGHTS = re.compile(r"(<think>\s*)?</think>\s*$")


def as_texts(inputs: Any) -> list[Text] | None:
    """Return texts, chats, or one of them as a list; None for anything else, such as token ids."""
    if hasattr(inputs, "tolist") and not isinstance(inputs, torch.Tensor):  # an array or a column of a table
        inputs = inputs.tolist()
    if isinstance(inputs, str):
        return [inputs]
    if not isinstance(inputs, Sequence) or not inputs:
        return None
    inputs = list(inputs)  # it may be a column of `datasets`
    first = inputs[0]
    if isinstance(first, Mapping):
        return [inputs]
    is_chat = isinstance(first, (list, tuple)) and first and isinstance(first[0], Mapping)
    return inputs if isinstance(first, str) or is_chat else None


def heads_by_format(configs: Mapping[str, ProbeConfig]) -> list[list[str]]:
    """Return the names of heads in groups. All heads of a group read a text as the same tokens."""
    groups: dict[tuple, list[str]] = {}
    for name, config in configs.items():
        reads = config.token_scope if config.reads_reply or config.token_scope == "tool" else None
        groups.setdefault((config.prompt_format, config.system_prompt, config.max_length, reads), []).append(name)
    return list(groups.values())


def classify_texts(
    model: Any,
    configs: Mapping[str, ProbeConfig],
    texts: list[Text],
    tokenizer: PreTrainedTokenizerBase | None,
    output_attentions: bool = False,
) -> dict[str, ProbeOutput]:
    """Score texts or chats with heads of a model, whose configs are by name. Heads of one format share a pass.

    The backbone runs once over a start that many texts share and none of these heads reads. With `output_attentions` (see
    `classify`) all texts are in one batch.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
    if tokenizer is None:
        raise ProbeError("texts need the backbone's tokenizer: classify(texts, tokenizer=tokenizer)")
    outputs: dict[str, ProbeOutput] = {}
    device, most = find_decoder(model).input_device, len(texts) if output_attentions else _TEXTS
    for names in heads_by_format(configs):
        config, order, parts = configs[names[0]], [], []
        prompt_format = PromptFormat.from_config(config, tokenizer)
        for first in range(0, len(texts), most):
            encoded = prompt_format.encode_for(config, texts[first : first + most])
            ids, inputs = encoded.prompts, pad_prompts(encoded.prompts, tokenizer)
            if encoded.masks is not None:  # the ids do not tell which tokens count
                inputs["probe_mask"] = pad_sequence(list(map(torch.tensor, encoded.masks)), batch_first=True)
            passes = [Pass(list(range(len(ids))))]
            if not output_attentions:
                masks, _ = prompt_masks({name: configs[name] for name in names}, inputs, first_row=first)
                read = [tokens_read(configs[name], mask) for name, mask in masks.items()]
                passes = plan_passes(model, ids, torch.stack(read).any(dim=0).int().argmax(dim=1).tolist())
            for each in passes:
                rows, width = each.rows, max(len(ids[row]) for row in each.rows)
                batch = {name: tensor[rows, :width].to(device) for name, tensor in inputs.items()}
                cache = None if each.prefix is None else repeat_cache(each.prefix, len(rows))
                parts.append(model.classify(**batch, cache=cache, probes=names, output_attentions=output_attentions))
                order += [first + row for row in rows]
        if output_attentions:
            outputs |= parts[0]
        else:
            places = torch.tensor(order).argsort()
            outputs |= {name: join_outputs([part[name] for part in parts], places, configs[name]) for name in names}
    return {name: outputs[name] for name in configs}


def join_outputs(parts: list[ProbeOutput], order: torch.Tensor, config: ProbeConfig) -> ProbeOutput:
    """Return the rows of several outputs, in the order of their indices in these."""
    order = order.to(parts[0].logits.device)
    output = ProbeOutput.from_logits(torch.cat([part.logits for part in parts])[order], config)
    if means := [part.means for part in parts if part.means is not None]:
        output.means = MeanStates.joined(means, order)
    return output


def texts_read(
    config: ProbeConfig, input_ids: torch.Tensor, mask: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return the texts of the tokens that count, `[batch, tokens]` on the CPU, without what the template has written."""
    if config.turn_markers is not None:
        mask = mask & ~marker_mask(config.turn_markers, input_ids)
    counted = [ids[kept].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
    texts = tokenizer.batch_decode(counted, skip_special_tokens=True)
    return [_NO_THOUGHTS.sub("", text).strip() for text in texts]
