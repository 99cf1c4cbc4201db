"""Score texts and chats with heads, each rendered as its head was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..backbone.kv_cache import repeat_cache
from ..backbone.passes import Pass, plan_passes
from ..data.prompts import PromptFormat, Text, pad_prompts
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from .reader import prompt_masks, read_masks


BATCH_TOKENS = 4096  # of a pass, padding included


def as_texts(inputs: Any) -> list[Text] | None:
    """Return texts, chats, or one of them as a list; None for anything else, such as token ids."""
    if hasattr(inputs, "tolist") and not isinstance(inputs, torch.Tensor):  # an array or a column of a table
        inputs = inputs.tolist()
    if isinstance(inputs, str):
        return [inputs]
    if not isinstance(inputs, (list, tuple)) or not inputs:
        return None
    first = inputs[0]
    if isinstance(first, Mapping):
        return [list(inputs)]
    is_chat = isinstance(first, (list, tuple)) and first and isinstance(first[0], Mapping)
    return list(inputs) if isinstance(first, str) or is_chat else None


def heads_by_format(configs: Mapping[str, ProbeConfig]) -> list[list[str]]:
    """Return the names of heads in groups. All heads of a group read a text as the same tokens."""
    groups: dict[tuple, list[str]] = {}
    for name, config in configs.items():
        reads = config.token_scope if config.reads_reply else None
        groups.setdefault((config.prompt_format, config.system_prompt, config.max_length, reads), []).append(name)
    return list(groups.values())


def encode(
    config: ProbeConfig, texts: list[Text], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[bool]] | None]:
    """Return the token ids of texts in a head's own format, and which tokens count if the ids do not tell."""
    encoded = PromptFormat.from_config(config, tokenizer).encode_for(config, texts)
    return encoded.prompts, encoded.masks


def pad_inputs(
    ids: list[list[int]], masks: list[list[bool]] | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and, with masks, `probe_mask`: `[rows, tokens]`, padded on the right."""
    inputs = pad_prompts(ids, tokenizer)
    if masks is not None:
        inputs["probe_mask"] = pad_sequence(list(map(torch.tensor, masks)), batch_first=True)
    return inputs


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
    if tokenizer is None:
        raise ProbeError("texts need the backbone's tokenizer: classify(texts, tokenizer=tokenizer)")
    outputs: dict[str, ProbeOutput] = {}
    for names in heads_by_format(configs):
        ids, masks = encode(configs[names[0]], texts, tokenizer)
        inputs = pad_inputs(ids, masks, tokenizer)
        group = {name: configs[name] for name in names}
        for each in [Pass(list(range(len(ids))))] if output_attentions else _passes(model, group, ids, inputs):
            rows, width = each.rows, max(len(ids[row]) for row in each.rows)
            batch = {name: tensor[rows, :width].to(model.device) for name, tensor in inputs.items()}
            cache = None if each.prefix is None else repeat_cache(each.prefix, len(rows))
            part = model.classify(**batch, cache=cache, probes=names, output_attentions=output_attentions)
            if output_attentions:
                outputs |= part
                continue
            for name, output in part.items():
                if name not in outputs:
                    blank = output.logits.new_empty(len(ids), configs[name].num_labels)
                    outputs[name] = ProbeOutput.from_logits(blank, configs[name])
                    if output.means is not None:
                        outputs[name].means = output.means.blank(len(ids))
                outputs[name].logits[rows] = output.logits
                if (means := outputs[name].means) is not None:
                    means.put(rows, output.means)
    return {name: outputs[name] for name in configs}


def _passes(
    model: Any, configs: Mapping[str, ProbeConfig], ids: list[list[int]], inputs: dict[str, torch.Tensor]
) -> list[Pass]:
    prompt = (inputs["input_ids"], None, inputs["attention_mask"], inputs.get("probe_mask"))
    read = torch.stack(list(read_masks(configs, prompt_masks(configs, *prompt)).values())).any(dim=0)
    return plan_passes(model, ids, read.int().argmax(dim=1).tolist(), BATCH_TOKENS)
