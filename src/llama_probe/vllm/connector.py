"""Between vLLM's scheduler and its workers: the scheduler names prompts and tokens of replies, and the workers send scores."""

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

from ..files import JSON
from .paged_states import PagedStates, cache_growth
from .replies import Replies, Reply, has_no_reply, reply_start
from .results import prompt_result
from .scoring import ReplyTokens, Scorer, ScoringRequest
from .settings import ProbeSettings
from .step_scores import StepScores


logger = init_logger(f"vllm.{__name__}")  # vLLM shows messages of loggers below its own name

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


@dataclass
class ScoringRequests(KVConnectorMetadata):
    """For the workers: the prompts that are complete after a step, and the tokens of replies that the step reads."""

    requests: list[ScoringRequest] = field(default_factory=list)
    reply_tokens: ReplyTokens = field(default_factory=dict)


class ProbeConnector(KVConnectorBase_V1):
    """Tell the workers which prompts are complete, and keep the results of these prompts. No keys or values are transferred.

    One connector lives in the scheduler's process and one in each worker. vLLM's base class says when it calls which method.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.settings = ProbeSettings.of(vllm_config)
        self.settings.check_engine(vllm_config)
        (group,) = kv_cache_config.kv_cache_groups  # beside a connector vLLM makes one group of all layers
        self._block_size = group.kv_cache_spec.block_size
        # In the scheduler's process:
        self._prompts: dict[str, Request] = {}  # requests whose prompts are not complete
        self._results: dict[str, JSON] = {}  # results of complete prompts
        self.replies = Replies(self.settings, vllm_config.scheduler_config.max_num_seqs)
        self._scorer: Scorer | None = None  # in a worker

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def _transfer_nothing(self, *args: Any, **kwargs: Any) -> None:
        """Take the place of all methods that load and save keys and values."""

    update_state_after_alloc = _transfer_nothing
    start_load_kv = wait_for_layer_load = save_kv_layer = wait_for_save = _transfer_nothing

    # In the scheduler's process

    def on_new_request(self, request: Request) -> None:
        """Expect a prompt, or the next piece of one."""
        self._results.pop(request.request_id, None)  # of a shorter prompt
        self._prompts[request.request_id] = request
        self.replies.add(request, self._heads(request))

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ScoringRequests:
        for request_id in scheduler_output.preempted_req_ids or ():
            self.replies.free(request_id)
        step = ScoringRequests()
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            reply = self.replies.running.get(request_id)
            request = self._prompts.get(request_id) or (reply and reply.request)
            if request is None:
                continue
            end = request.num_computed_tokens + scheduled
            is_begun = end > request.num_prompt_tokens
            if end >= request.num_tokens and (reply is None or reply.slot is None):
                # After a preemption the prompt and all tokens but the newest are read here, and the newest token below.
                step.requests.append(self._scoring(request, reply, end - is_begun))
            if is_begun and reply is not None and reply.slot is not None:
                block, place = divmod(end - 1, self._block_size)
                place += self._kv_cache_manager.get_blocks(request_id).blocks[0][block].block_id * self._block_size
                step.reply_tokens[request_id] = place, reply.slot
        return step

    def _scoring(self, request: Request, reply: Reply | None, num_tokens: int) -> ScoringRequest:
        """Return what the workers need to score a complete prompt. Give the reply a slot if heads follow it."""
        if reply is not None:
            reply.slot = self.replies.free_slots.pop()
        ids, num_prompt_tokens = request.prompt_token_ids, request.num_prompt_tokens
        heads = self._heads(request) if self._prompts.pop(request.request_id, None) else None
        start = reply_start(request)
        if start is not None:
            ids, num_prompt_tokens = ids and ids[:start], start
        elif heads is not None:
            heads = [name for name in heads if self.settings.configs[name].token_scope != "response"]
        blocks = self._kv_cache_manager.get_block_ids(request.request_id)[0][: -(-num_tokens // self._block_size)]
        slot = None if reply is None else reply.slot
        return ScoringRequest(request.request_id, ids, num_prompt_tokens, num_tokens, blocks, heads, slot)

    def _heads(self, request: Request) -> list[str]:
        """Return the heads that a request names, and those that may halt its reply; all heads if the request names none."""
        names = (request.kv_transfer_params or {}).get("probes")
        if not isinstance(names, (list, tuple)):
            return list(self.settings.heads)
        guards = set() if has_no_reply(request) else {rule.head for rule in self.settings.rules}
        return [name for name in self.settings.heads if name in names or name in guards]

    def add_result(self, request_id: str, rows: Mapping[str, list[float] | str]) -> None:
        """Keep the result of a prompt, made of the logits of its heads, until its request is finished."""
        self._results[request_id] = result = prompt_result(self.settings, rows)
        self.replies.flag_prompt(request_id, result["probes"])

    def refuse_unscored(self, request: Request) -> None:
        """Halt a request that has a token and no scores: a guard that has not read the prompt lets nothing through."""
        if self.settings.halt_on is not None and request.request_id not in self._results:
            self.add_result(request.request_id, dict.fromkeys(self._heads(request), "the prompt was not scored"))

    def get_result(self, request_id: str, with_replies: bool = False) -> JSON | None:
        """Return `prompt_result` of a running request, and `Replies.summaries`; `None` before the prompt is complete."""
        result = self._results.get(request_id)
        replies = self.replies.summaries(request_id) if with_replies else None
        if result is None or replies is None:
            return result
        result = {**result, "replies": replies}
        if result.get("halted") is None:
            halts = [reply["halted"] for reply in replies if reply is not None and reply["halted"]]
            if halts:
                result["halted"] = halts[0]
        return result

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, JSON | None]:
        result = self.get_result(request.request_id, with_replies=True)
        self._prompts.pop(request.request_id, None)
        self._results.pop(request.request_id, None)
        self.replies.remove(request.request_id)
        return False, result

    # In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not get_pp_group().is_last_rank:
            return  # the last stage has the states of all layers
        (cache,) = get_layers_from_vllm_config(self._vllm_config, PagedStates).values()
        if get_tensor_model_parallel_rank() == 0:
            times = cache_growth(self._kv_cache_config.kv_cache_groups[0])
            logger.info("What heads need makes the KV cache %.2f times as large", times)
        self._scorer = Scorer(cache, self._block_size)

    def build_connector_worker_meta(self) -> StepScores | None:
        """Score the prompts and tokens of this step. With a draft model, `wait_for_save` would be too late for its output."""
        step = self._get_connector_metadata()
        if self._scorer is None or not (step.requests or step.reply_tokens):
            return None
        prompts = self._scorer.score(step.requests)
        reply_logits = self._scorer.follow(step.reply_tokens) if step.reply_tokens else None
        return StepScores(prompts, list(step.reply_tokens), reply_logits)
