"""A scheduler of either form, and workers that are played: on the CPU, vLLM itself always takes the plain form."""

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from llama_probe.vllm.scheduler import AsyncProbeScheduler, ProbeScheduler, create_scheduler
from llama_probe.vllm.step_scores import StepScores


BLOCK, CHUNK = 16, 24
FINE, BAD = [9.0, -9.0], [-9.0, 9.0]
FIRST = 100  # the token that is written first; each next one is one more
END = 2


def make_scheduler(kwargs: dict, is_async: bool, blocks: int = 30, caches_prefixes: bool = False):
    """A scheduler of an engine with these arguments, and prompts in chunks."""
    kwargs |= {"max_num_batched_tokens": CHUNK, "max_model_len": 128, "enable_prefix_caching": caches_prefixes}
    init_none_hash(sha256)
    config = EngineArgs(**kwargs).create_engine_config()
    config.scheduler_config.async_scheduling = is_async
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    made = create_scheduler(
        config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )
    assert type(made) is (AsyncProbeScheduler if is_async else ProbeScheduler)
    return made


@dataclass
class Script:
    """What workers say: logits of the prompt, tokens of a reply that are flagged or have no number, and its end.

    The index of the prompt is -1.
    """

    flags: Collection[int] = ()
    prompt: list[float] | None = None
    no_number: Collection[int] = ()
    unscored: Collection[int] = ()
    end: int | None = None

    def logits(self, token: int) -> list[float]:
        return [float("nan")] * 2 if token in self.no_number else BAD if token in self.flags else FINE

    def token(self, index: int) -> int:
        return END if index == self.end else FIRST + index


class Player:
    """Plays the workers of a scheduler with one head, `watch`.

    Attributes:
        delivered: outputs by request.
        scored: by step the prompts that were complete, by request.
        scheduled: number of steps by request. steps: of all.
        columns: of logprobs, in all requests of a step.
    """

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.scripts: dict[str, Script] = {}
        self.lengths: dict[str, int] = {}
        self.delivered: dict[str, list] = defaultdict(list)
        self.scored: list[dict] = []
        self.scheduled: Counter[str] = Counter()
        self.queue, self.steps, self.columns = [], 0, 4

    def add(
        self, name, script: Script, length=5, kind=RequestOutputKind.DELTA, resumable=False, asked=None, **changes
    ):
        """Add a request with a prompt of some length."""
        self.scripts[name], self.lengths[name] = script, length
        extra = {"extra_args": {"kv_transfer_params": asked}} if asked else {}
        params = SamplingParams(**{"max_tokens": 5, "output_kind": kind, **changes, **extra})
        params._eos_token_id = END
        hasher = get_request_block_hasher(BLOCK, sha256)
        request = Request(name, list(range(4, 4 + length)), params, None, resumable=resumable, block_hasher=hasher)
        self.scheduler.add_request(request)

    def play(self, script: Script, length: int = 5, **options) -> list[EngineCoreOutput]:
        """Run one more request, called `a`, and all others until they end. Return its outputs."""
        if not options.get("resumable"):
            self.delivered.pop("a", None)
        self.add("a", script, length, **options)
        self.run()
        self.check_clean()
        return self.delivered["a"]

    def step(self) -> None:
        """Schedule a step, and answer the oldest one: in the async form one is always under way."""
        if self.scheduler.has_requests():
            self.queue.append(self.scheduler.schedule())
            self.scheduled.update(self.queue[-1].num_scheduled_tokens.keys())
            self.steps += 1
        if len(self.queue) > isinstance(self.scheduler, AsyncProbeScheduler) or not self.scheduler.has_requests():
            self.answer()

    def run(self) -> None:
        """Go on until all requests have ended."""
        while self.scheduler.has_unfinished_requests() or self.queue:
            self.step()
            assert self.steps < 2000, "requests do not end"

    def answer(self) -> None:
        """Return the results of the oldest step."""
        if not self.queue:
            return
        step = self.queue.pop(0)
        meta, cached = step.kv_connector_metadata, step.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.scored.append(begun := {request.request_id: request for request in meta.requests})
        read, running = meta.reply_tokens, self.scheduler.requests
        assert len({slot for _, slot in read.values()}) == len(read)
        ends = {name: computed[name] + count for name, count in step.num_scheduled_tokens.items()}
        is_read = {name: name not in running or end >= running[name].num_tokens for name, end in ends.items()}
        tokens = [[self.scripts[name].token(end - self.lengths[name])] * is_read[name] for name, end in ends.items()]
        rows = {}
        for name, (place, _) in read.items():
            index = ends[name] - 1 - self.lengths[name]
            assert index >= 0 and place % BLOCK == (ends[name] - 1) % BLOCK
            if index not in self.scripts[name].unscored:
                rows[name] = self.scripts[name].logits(index)
        prompts = {}
        for name, request in begun.items():
            if request.heads is not None and -1 not in self.scripts[name].unscored:
                logits = self.scripts[name].prompt
                prompts[name] = {} if logits is None else {"watch": torch.tensor(logits)}
        scores = StepScores(prompts, list(rows), torch.tensor(list(rows.values())) if rows else None)
        from_workers = KVConnectorOutput(kv_connector_worker_meta=scores if prompts or rows else None)
        ids = np.array([sampled or [0] for sampled in tokens]).reshape(-1, 1)
        logprobs = LogprobsLists(np.repeat(ids, self.columns, axis=1), ids / 1000.0 * np.ones(self.columns), ids[:, 0])
        places = {name: place for place, name in enumerate(ends)}
        # From 0.34 on the order of the ids tells the places.
        by_id = {"req_id_to_index": places} if "req_id_to_index" in ModelRunnerOutput.__annotations__ else {}
        output = ModelRunnerOutput(
            list(ends), sampled_token_ids=tokens, logprobs=logprobs, kv_connector_output=from_workers, **by_id
        )
        for batch in self.scheduler.update_from_output(step, output).values():
            for each in batch.outputs:
                self.delivered[each.request_id].append(each)

    def tokens(self, name: str) -> list[int]:
        """All tokens that were delivered of a request."""
        return [token for output in self.delivered[name] for token in output.new_token_ids]

    def check_clean(self) -> None:
        """Raise if something is kept of requests that are gone."""
        probes = self.scheduler.probes
        assert not (probes._results or probes._prompts or probes.replies.running or probes.replies._siblings)
        assert sorted(probes.replies.free_slots) == list(range(self.scheduler.max_num_running_reqs))
