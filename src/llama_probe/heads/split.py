"""Split a head into linear maps of hidden states and a smaller head, for a server that keeps few numbers of each token."""

from __future__ import annotations

import copy

import torch

from .gate import GateAggregator
from .low_rank import LowRankAggregator
from .probe import ProbeModel


def split_head(head: ProbeModel) -> tuple[torch.Tensor, ProbeModel] | None:
    """Return maps of normalised states, `[layers_read, rank, D]`, and a head without novelty that reads the mapped states.

    Return `None` if the head type needs whole states, or if the head does not normalise states: their products do not fit half
    precision.
    """
    stage = head.token_stage
    plain = {"normalize": "none", "novelty": None}
    if head.config.normalize == "none" or not isinstance(stage, (LowRankAggregator, GateAggregator)):
        return None
    with torch.no_grad():
        if isinstance(stage, LowRankAggregator):
            maps = stage.projection(slice(None)).detach()
            reader = copy.deepcopy(head)
            reader.config = head.config.replace(**plain)
            reader.novelty = None
            reader.token_stage.projects = False
            return maps, reader
        # The layer stage and the classifier only read the products of a sum of states with their own weights.
        seen = torch.cat([head.layer_stage.weight, head.classifier.weight])  # [1 + labels, D]
        maps = torch.cat([stage.weight.unsqueeze(1), seen.expand(stage.num_slots, -1, -1)], dim=1)
        reader = ProbeModel(head.config.replace(hidden_size=maps.shape[1], **plain)).eval()
        units = torch.eye(maps.shape[1])
        parts = (reader.token_stage.weight, reader.layer_stage.weight, reader.classifier.weight)
        for part, value in zip(parts, units.split([1, 1, len(units) - 2]), strict=True):
            part.copy_(value)
        reader.classifier.bias.copy_(head.classifier.bias)
        return maps, reader.to(head.device)
