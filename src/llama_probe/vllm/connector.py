"""From prompts that are complete to their logits: vLLM's way between the scheduler's process and the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger

from ..errors import ProbeError
from .answers import answer
from .compatibility import check_config
from .scoring import Scorer, ScoringRequest
from .settings import ProbeSettings
from .state_cache import StateCache, cache_growth
from .step_scores import StepScores


logger = init_logger(f"vllm.{__name__}")  # vLLM shows what loggers of its own name say

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


@dataclass
class ScoringRequests(KVConnectorMetadata):
    """To the workers: the prompts that are complete after a step."""

    requests: list[ScoringRequest] = field(default_factory=list)


class ProbeConnector(KVConnectorBase_V1):
    """Transfers no keys or values: it is how a plugin learns which prompts are complete, and answers for them.

    One lives in the scheduler's process and one in each worker; see vLLM's base class for when its methods are called.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.settings = ProbeSettings.of(vllm_config)
        check_config(vllm_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ProbeError(f"this model has {len(groups)} kinds of caches, and states can be kept beside one alone")
        self._block_size = groups[0].kv_cache_spec.block_size
        # In the scheduler's process: requests whose prompts are not complete, and answers to the others.
        self._prompts: dict[str, Request] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        # In a worker
        self._scorer: Scorer | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # In the scheduler's process

    def on_new_request(self, request: Request) -> None:
        self._prompts[request.request_id] = request

    def on_longer_prompt(self, request: Request) -> None:
        """Forget the answer to a shorter prompt: this one comes in pieces."""
        self._answers.pop(request.request_id, None)
        self._prompts[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ScoringRequests:
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        requests = []
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self._prompts.get(request_id)
            if request is None or computed[request_id] + scheduled < request.num_prompt_tokens:
                continue
            del self._prompts[request_id]
            tokens = request.num_prompt_tokens
            blocks = self._kv_cache_manager.get_block_ids(request_id)[0][: -(-tokens // self._block_size)]
            requests.append(ScoringRequest(request_id, request.prompt_token_ids, tokens, blocks, self._heads(request)))
        return ScoringRequests(requests)

    def _heads(self, request: Request) -> list[str]:
        """Return the heads that a request asks for and those that may halt it; all if it asks for none."""
        asked = (request.kv_transfer_params or {}).get("probes")
        if not isinstance(asked, (list, tuple)):
            return list(self.settings.heads)
        guards = {rule.head for rule in self.settings.rules}
        return [name for name in self.settings.heads if name in asked or name in guards]

    def take_in(self, request_id: str, found: Mapping[str, list[float] | str]) -> None:
        """Keep what the workers found of a running request until it is finished."""
        self._answers[request_id] = answer(self.settings, found)

    def refuse_unscored(self, request_id: str) -> None:
        """Halt a request that has a token and no scores: a guard that has not read its prompt lets nothing through."""
        if self.settings.halt_on is not None and request_id not in self._answers:
            self.take_in(request_id, {})

    def get_answer(self, request_id: str) -> dict[str, Any] | None:
        """Return the answer for a running request; `None` before its prompt is complete."""
        return self._answers.get(request_id)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._prompts.pop(request.request_id, None)
        return False, self._answers.pop(request.request_id, None)

    # In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not get_pp_group().is_last_rank:
            return  # the last stage has the states of all
        caches = get_layers_from_vllm_config(self._vllm_config, StateCache).values()
        runs = get_tensor_model_parallel_rank() == 0
        if runs:
            times = cache_growth(self._kv_cache_config.kv_cache_groups[0])
            logger.info("What heads need makes the KV cache %.2f times as large", times)
            for rule in self.settings.rules:
                logger.info("halt_on: %s", rule)
        self._scorer = Scorer({cache.kind: cache for cache in caches}, self._block_size, runs)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def build_connector_worker_meta(self) -> StepScores | None:
        """Score this step's prompts. Beside a drafting model, vLLM calls `wait_for_save` too late for the step's output."""
        requests = self._get_connector_metadata().requests
        if self._scorer is None or not requests:
            return None
        scores = self._scorer.score(requests)
        return scores if self._scorer.runs else None
