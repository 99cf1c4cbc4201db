"""Heads in a worker process that follow replies: one token a request and step, all requests at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from ..heads.probe import ProbeModel
from .scoring import Scorer
from .state_cache import FEATURES, STATES


@dataclass
class ReplyTokens:
    """The tokens of replies that a step reads, one a request.

    Attributes:
        request_ids: of the engine.
        places: where each token lies in the cache: its block's number times the tokens of a block, and its place in the block.
        slots: of the requests' states.
    """

    request_ids: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def add(self, request_id: str, place: int, slot: int) -> None:
        self.request_ids.append(request_id)
        self.places.append(place)
        self.slots.append(slot)


class Follower:
    """Runs heads on the tokens of replies. The number of operations does not depend on the number of replies.

    Args:
        scorer: of the prompts; it has the heads, and begins the states of replies.
    """

    def __init__(self, scorer: Scorer):
        self.caches, self.plan, self.runs, self.states = scorer.caches, scorer.plan, scorer.runs, scorer.states
        self.heads = scorer.followers
        self._kinds = {STATES if name in self.plan.whole else FEATURES for name in self.heads}
        self._places = {layer: place for place, layer in enumerate(self.plan.layers)}

    @torch.no_grad()
    def follow(self, tokens: ReplyTokens) -> list[torch.Tensor]:
        """Return the scores of replies up to these tokens, `[replies, num_labels]` a head; none if this rank runs no heads."""
        device = next(iter(self.caches.values())).kv_cache.device
        places, slots = async_tensor_h2d([tokens.places, tokens.slots], device)
        # [states, replies, width]
        cached = {kind: cache.read_tokens(places) for kind, cache in self.caches.items() if kind in self._kinds}
        return [self._step(name, head, cached, slots) for name, head in self.heads.items()] if self.runs else []

    def _step(
        self, name: str, head: ProbeModel, cached: Mapping[str, torch.Tensor], slots: torch.Tensor
    ) -> torch.Tensor:
        layers = head.layer_indices
        if name in self.plan.whole:
            x = cached[STATES]
            if len(layers) < len(x):
                places = [self._places[layer] for layer in layers]
                x = torch.stack([x[place] for place in places])  # a list as index would come from pageable memory
        else:
            x = cached[FEATURES][0][:, self.plan.columns[name]].unflatten(-1, (len(layers), -1)).transpose(0, 1)
        state = head.init_state(self.states.get(name, slots), keep=True)
        head.step(state, layers, head.prepare(x.unsqueeze(2)))  # [S, replies, 1, width]
        self.states.put(name, slots, state.joined())
        return head.finish(state).logits
