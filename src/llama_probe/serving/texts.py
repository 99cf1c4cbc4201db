"""Score texts and chats with heads, each rendered as its head was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..backbone.decoder import find_decoder
from ..backbone.kv_cache import repeat_cache
from ..backbone.passes import Pass
from ..data.batches import collate, follow_progress, plan_reading
from ..data.prompts import PromptFormat, Text
from ..data.turn_markers import marker_mask
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput
from ..heads.novelty import MeanStates
from ..heads.scope import tokens_read
from .passages import check_finds_passages, check_knows_characters, locate
from .reader import prompt_masks


logger = logging.get_logger(__name__)

_INPUTS = ("input_ids", "attention_mask", "probe_mask")
# The end of a prompt that asks for a reply without thoughts. It is not part of a turn's marker.
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


def length_limit(config: ProbeConfig, max_length: int | None = None) -> int | None:
    """Return the number of tokens to which the texts that a head scores are cut; `None` for no limit.

    A head with windows reads a text whole. Any other head has learned from texts of at most `config.max_length` tokens.

    Args:
        max_length: the user's limit, which counts for all heads.
    """
    if max_length is not None:
        return max_length
    return None if config.window else config.max_length


def format_to_score(
    config: ProbeConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> PromptFormat:
    """Return the format in which a head scores texts: that of its training rows, cut to `length_limit`."""
    return PromptFormat.from_config(config.replace(max_length=length_limit(config, max_length)), tokenizer)


def heads_by_format(configs: Mapping[str, ProbeConfig], max_length: int | None = None) -> list[list[str]]:
    """Return the names of heads in groups. All heads of a group read a text as the same tokens, cut to `length_limit`."""
    groups: dict[tuple, list[str]] = {}
    for name, config in configs.items():
        reads = config.token_scope if config.reads_reply or config.token_scope == "tool" else None
        limit = length_limit(config, max_length)
        groups.setdefault((config.prompt_format, config.system_prompt, limit, reads), []).append(name)
    return list(groups.values())


def warn_beyond_backbone(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    """Warn if prompts, as token ids, are longer than the backbone was trained to read."""
    most = getattr(find_decoder(model).model.config, "max_position_embeddings", None)
    longer = 0 if most is None else sum(len(ids) > most for ids in prompts)
    if longer:
        logger.warning(
            f"{longer} of {len(prompts)} texts have more tokens than the backbone was trained to read "
            f"(max_position_embeddings={most}): their scores are less reliable; max_length cuts them"
        )


def classify_texts(
    model: Any,
    configs: Mapping[str, ProbeConfig],
    texts: list[Text],
    tokenizer: PreTrainedTokenizerBase | None,
    output_attentions: bool = False,
    max_length: int | None = None,
    levels: Mapping[str, float] = {},
    passages: bool = False,
) -> dict[str, ProbeOutput]:
    """Score texts or chats with heads of a model. Heads of one format share the passes.

    The backbone runs once over a start that many texts share and none of these heads reads.

    Args:
        configs: configs of the heads, by name.
        output_attentions: return weights too (see `classify`). All texts are then in one batch.
        max_length: the user's limit; see `length_limit`.
        levels: novelty above which a head gives no label, by name.
        passages: also find the passages of flagged labels; see `locate`.

    Returns:
        By head name the output for all texts, in their order.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
    if tokenizer is None:
        raise ProbeError("texts need the backbone's tokenizer: classify(texts, tokenizer=tokenizer)")
    if passages:
        check_finds_passages(configs)
        check_knows_characters(tokenizer)
    device = find_decoder(model).input_device
    outputs: dict[str, ProbeOutput] = {}
    for names in heads_by_format(configs, max_length):
        group = {name: configs[name] for name in names}
        config = configs[names[0]]
        prompts = format_to_score(config, tokenizer, max_length)
        dataset = prompts.encode_for(config, texts)
        warn_beyond_backbone(model, dataset.prompts)
        passes = [Pass(list(range(len(texts))))]
        if not output_attentions:
            passes = plan_reading(model, dataset, partial(_tokens_that_some_head_reads, group))
        parts = []
        order: list[int] = []
        lengths = list(map(len, dataset.prompts))
        for each in follow_progress(passes, lengths, "reading", delay=3, is_hidden=len(passes) == 1):
            batch = collate([dataset[row] for row in each.rows])
            inputs = {name: batch[name].to(device) for name in _INPUTS if name in batch}
            cache = None if each.prefix is None else repeat_cache(each.prefix, len(each.rows))
            parts.append(model.classify(**inputs, cache=cache, probes=names, output_attentions=output_attentions))
            order += each.rows
        if output_attentions:
            outputs |= parts[0]
        else:
            places = torch.tensor(order).argsort()
            outputs |= {name: join_outputs([part[name] for part in parts], places, configs[name]) for name in names}
        for name in names:
            outputs[name].abstain_at = levels.get(name)
            if passages:
                outputs[name].passages = _find_passages(prompts, texts, dataset.prompts, outputs[name])
    return {name: outputs[name] for name in configs}


def _tokens_that_some_head_reads(
    configs: Mapping[str, ProbeConfig], batch: dict[str, torch.Tensor], first_row: int
) -> torch.Tensor:
    masks, _ = prompt_masks(configs, batch, first_row=first_row)
    return torch.stack([tokens_read(configs[name], mask) for name, mask in masks.items()]).any(dim=0)


def join_outputs(parts: list[ProbeOutput], order: torch.Tensor, config: ProbeConfig) -> ProbeOutput:
    """Join outputs, and return their rows in a new order: row i is row `order[i]` of the joined outputs."""
    order = order.to(parts[0].logits.device)
    output = ProbeOutput.from_logits(torch.cat([part.logits for part in parts])[order], config)
    means = [part.means for part in parts if part.means is not None]
    if means:
        output.means = MeanStates.joined(means, order)
    spans = [part.spans for part in parts if part.spans is not None]
    if spans:
        output.spans = torch.cat(spans)[order]
    passages = [row for part in parts for row in part.passages or []]
    if passages:
        output.passages = [passages[row] for row in order.tolist()]
    return output


def _find_passages(
    prompts: PromptFormat, texts: Sequence[Text], ids: Sequence[Sequence[int]], output: ProbeOutput
) -> list[list[JSON]]:
    """Return for each text the passages of its flagged labels. A text whose scores are not numbers has no label."""
    rows = output.logits.isfinite().all(dim=-1).nonzero().flatten()
    readable = join_outputs([output], rows, output.config_of())
    readable.abstain_at = output.abstain_at
    passages: list[list[JSON]] = [[] for _ in texts]
    for row, spans in zip(rows.tolist(), readable.found_spans or [], strict=True):
        if spans:
            passages[row] = locate(prompts, texts[row], ids[row], spans)
    return passages


def texts_read(
    config: ProbeConfig, input_ids: torch.Tensor, mask: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return the texts of the tokens that count, `[batch, tokens]` on the CPU, without what the template has written."""
    if config.turn_markers is not None:
        mask = mask & ~marker_mask(config.turn_markers, input_ids)
    counted = [ids[kept].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
    texts = tokenizer.batch_decode(counted, skip_special_tokens=True)
    return [_NO_THOUGHTS.sub("", text).strip() for text in texts]
