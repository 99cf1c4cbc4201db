"""Heads split into linear maps of hidden states and a rest, for a server that keeps few numbers of every token."""

from __future__ import annotations

import copy

import torch

from .gate import GateAggregator
from .low_rank import LowRankAggregator
from .probe import ProbeModel


def split_head(head: ProbeModel) -> tuple[torch.Tensor, ProbeModel] | None:
    """Return maps of normalised states, `[layers_read, rank, D]`, and a head that reads what they give, without novelty.

    `None` if the head type needs whole states, or if the head reads states as they are: their products do not fit half precision.
    """
    stage, plain = head.token_stage, {"normalize": "none", "novelty": None}
    if head.config.normalize == "none" or not isinstance(stage, (LowRankAggregator, GateAggregator)):
        return None
    with torch.no_grad():
        if isinstance(stage, LowRankAggregator):
            maps, reader = stage.projection(slice(None)).detach(), copy.deepcopy(head)
            reader.config, reader.novelty = head.config.replace(**plain), None
            reader.token_stage.projects = False
            return maps, reader
        # All that the layer stage and the classifier see of a sum of states are its products with their own weights.
        seen = torch.cat([head.layer_stage.weight, head.classifier.weight])  # [1 + labels, D]
        maps = torch.cat([stage.weight.unsqueeze(1), seen.expand(stage.num_slots, -1, -1)], dim=1)
        reader = ProbeModel(head.config.replace(hidden_size=maps.shape[1], **plain)).eval()
        units = torch.eye(maps.shape[1])
        parts = (reader.token_stage.weight, reader.layer_stage.weight, reader.classifier.weight)
        for part, value in zip(parts, units.split([1, 1, len(units) - 2]), strict=True):
            part.copy_(value)
        reader.classifier.bias.copy_(head.classifier.bias)
        return maps, reader.to(head.device)
