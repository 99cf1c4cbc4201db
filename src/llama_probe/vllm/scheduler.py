"""vLLM's schedulers with two more duties: outputs carry the results of heads, and halted requests end before a flagged token."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus, StreamingUpdate

from .connector import ProbeConnector
from .replies import has_no_reply
from .step_scores import StepScores


class _Probed:
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.probes: ProbeConnector = self.connector
        self.replies = self.probes.replies

    def update_from_output(self, scheduler_output, model_runner_output):
        """Read the scores of the step first, so that they go out with the first token."""
        from_workers = model_runner_output.kv_connector_output
        scores: StepScores | None = from_workers and from_workers.kv_connector_worker_meta
        for request_id, rows in (scores.read_prompts() if scores else {}).items():
            if request_id in self.requests:  # it may have been aborted
                self.probes.add_result(request_id, rows)
        self.replies.begin_step(scores)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for batch in outputs.values():
            batch.outputs = list(filter(self._complete, batch.outputs))
        return outputs

    def _complete(self, output: EngineCoreOutput) -> bool:
        """Put results and held-back tokens into an output. Return False if it has nothing to deliver."""
        request = self.requests.get(output.request_id)
        params = request and request.sampling_params
        # vLLM puts the result into the last output of a request alone. But it may deliver any output of a stream, or of a request
        # with stop strings, and may merge outputs before, even of several replies. So all of these outputs carry the result.
        may_be_delivered = params is not None and (
            params.output_kind is not RequestOutputKind.FINAL_ONLY or bool(params.stop)
        )
        if output.kv_transfer_params is None and may_be_delivered:
            with_replies = bool(params.stop) or self.replies.has_ended(output.request_id)
            output.kv_transfer_params = self.probes.get_result(output.request_id, with_replies)
        return self.replies.edit(output)

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """Give a request the next piece of its prompt. The longer prompt is scored, and may be halted."""
        super()._update_request_as_session(session, update)
        self.probes.on_new_request(session)

    def _update_request_with_output(self, request: Request, new_token_ids: list[int], is_stale: bool = False):
        request_id = request.request_id
        if new_token_ids and not is_stale:
            self.probes.refuse_unscored(request)
        halted = (self.probes.get_result(request_id) or {}).get("halted")
        head = halted["head"] if halted else self.replies.read_score(request_id)
        if head is not None or has_no_reply(request):
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED if head is None else RequestStatus.FINISHED_STOPPED
            request.stop_reason = head
            request.resumable = False
            return [], True
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale=is_stale)
        if stopped:
            self.replies.end(request)
        return new_token_ids, stopped


class ProbeScheduler(_Probed, Scheduler):
    """Schedules one step after the other."""


class AsyncProbeScheduler(_Probed, AsyncScheduler):
    """Schedules a step while another one runs. If a halted request takes part in the next step, its token is dropped."""


def create_scheduler(vllm_config, **kwargs: Any) -> Scheduler:
    """Return the scheduler that suits the config. vLLM's `scheduler_cls` names this function."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_class = AsyncProbeScheduler if is_async else ProbeScheduler
    return scheduler_class(vllm_config=vllm_config, **kwargs)
