"""Both schedulers, step by step, with the workers' part played: on the CPU, vLLM itself always takes the plain one."""

import pytest
import torch
from played_workers import BAD, CHUNK, FINE, add, make_scheduler
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from llama_probe.vllm import engine_kwargs
from llama_probe.vllm.scheduler import AsyncProbeScheduler
from llama_probe.vllm.step_scores import StepScores


@pytest.fixture(params=[False, True], ids=["plain", "async"])
def scheduler(request, tiny):
    made = make_scheduler(engine_kwargs(tiny.backbone, {"guard": tiny.heads["guard"]}, halt_on="guard"), request.param)
    yield made
    made.shutdown()


def requests(step: SchedulerOutput) -> dict:
    return {request.request_id: request for request in step.kv_connector_metadata.requests}


def answer(scheduler, step: SchedulerOutput, found: dict[str, list[float]]):
    """What the workers return of a step: a token of each request whose prompt is complete, and logits."""
    names = list(step.num_scheduled_tokens)
    tokens = [
        [7] if name in found or name not in scheduler.requests or scheduler.connector.get_answer(name) else []
        for name in names
    ]
    scored = {name: {"guard": (0, row)} for row, name in enumerate(found)}
    meta = StepScores(scored, [torch.tensor(list(found.values()))]) if found else None
    places = {name: place for place, name in enumerate(names)}
    said = KVConnectorOutput(kv_connector_worker_meta=meta)
    output = ModelRunnerOutput(names, places, tokens, kv_connector_output=said)
    batches = scheduler.update_from_output(step, output)
    return {output.request_id: output for batch in batches.values() for output in batch.outputs}


def test_a_token_without_scores_is_not_delivered(scheduler):
    request = add(scheduler, "late", 10)
    step = scheduler.schedule()
    output = ModelRunnerOutput(["late"], {"late": 0}, [[7]])
    (batch,) = scheduler.update_from_output(step, output).values()
    (given,) = batch.outputs
    assert given.new_token_ids == [] and given.kv_transfer_params["halted"]["head"] == "guard"
    assert request.status == RequestStatus.FINISHED_STOPPED


def test_prompts_are_scored_when_their_last_chunk_runs(scheduler):
    add(scheduler, "long", 40)
    first = scheduler.schedule()
    assert first.num_scheduled_tokens == {"long": CHUNK} and requests(first) == {}
    assert answer(scheduler, first, {}) == {}
    second = scheduler.schedule()
    request = requests(second)["long"]
    assert (request.token_ids, request.num_tokens, request.heads) == (list(range(4, 44)), 40, ["guard"])
    assert len(request.block_ids) == 3 and len(set(request.block_ids)) == 3
    out = answer(scheduler, second, {"long": FINE})["long"]
    assert out.new_token_ids == [7] and out.finish_reason is None
    assert out.kv_transfer_params["probes"]["guard"]["label"] == "fine"
    assert out.kv_transfer_params["halted"] is None
    third = scheduler.schedule()
    assert requests(third) == {}
    assert answer(scheduler, third, {})["long"].kv_transfer_params == out.kv_transfer_params


def test_halted_requests_end_without_a_token(scheduler):
    add(scheduler, "bad", 5)
    add(scheduler, "fine", 6)
    step = scheduler.schedule()
    assert set(requests(step)) == {"bad", "fine"}
    ahead = scheduler.schedule() if isinstance(scheduler, AsyncProbeScheduler) else None
    out = answer(scheduler, step, {"bad": BAD, "fine": FINE})
    assert (out["bad"].new_token_ids, str(out["bad"].finish_reason), out["bad"].stop_reason) == ([], "stop", "guard")
    assert out["bad"].kv_transfer_params["halted"]["label"] == "bad"
    assert out["fine"].new_token_ids == [7] and out["fine"].finish_reason is None
    if ahead is not None:  # it took part in a step that was begun before it was known
        assert set(ahead.num_scheduled_tokens) == {"bad", "fine"}
        assert set(answer(scheduler, ahead, {})) == {"fine"}
    assert set(scheduler.schedule().num_scheduled_tokens) == {"fine"}
    assert "bad" not in scheduler.requests and scheduler.connector.get_answer("bad") is None


def test_a_score_that_is_no_number_halts_its_prompt_and_no_other(scheduler):
    add(scheduler, "odd", 5)
    add(scheduler, "fine", 6)
    out = answer(scheduler, scheduler.schedule(), {"odd": [float("nan"), float("nan")], "fine": FINE})
    assert (out["odd"].new_token_ids, out["odd"].stop_reason) == ([], "guard")
    said = out["odd"].kv_transfer_params
    assert "gives no number" in said["probes"]["guard"]["error"] and said["halted"]["score"] is None
    assert out["fine"].new_token_ids == [7] and out["fine"].kv_transfer_params["halted"] is None


@pytest.mark.parametrize(
    ("changes", "have_scores"),
    [
        ({}, [False] * 4 + [True]),
        ({"stop": ["end"], "detokenize": True}, [True] * 5),  # the front end may end the reply at any of them
    ],
    ids=["last", "each"],
)
def test_who_waits_for_the_end_gets_the_scores_there(scheduler, changes, have_scores):
    add(scheduler, "whole", 5, RequestOutputKind.FINAL_ONLY, **changes)
    for number, has_scores in enumerate(have_scores):
        out = answer(scheduler, scheduler.schedule(), {} if number else {"whole": FINE})["whole"]
        assert (out.kv_transfer_params is not None) == has_scores
        assert not has_scores or out.kv_transfer_params["probes"]["guard"]["logits"] == FINE


def test_a_prompt_that_comes_in_pieces_is_scored_after_each(scheduler):
    add(scheduler, "talk", 5, resumable=True)
    out = answer(scheduler, scheduler.schedule(), {"talk": FINE})["talk"]
    assert out.kv_transfer_params["halted"] is None
    add(scheduler, "talk", 6, resumable=True)  # the next piece, which waits until the first one's reply has ended
    for _ in range(4):
        out = answer(scheduler, scheduler.schedule(), {})["talk"]
    step = scheduler.schedule()
    assert requests(step)["talk"].num_tokens == 5 + 4 + 6  # the last token of a reply is dropped
    out = answer(scheduler, step, {"talk": BAD})["talk"]
    assert (out.new_token_ids, out.stop_reason) == ([], "guard")
    assert out.kv_transfer_params["probes"]["guard"]["logits"] == BAD
    assert "talk" not in scheduler.requests and scheduler.connector.get_answer("talk") is None


def test_nothing_is_kept_of_requests_that_are_gone(scheduler):
    add(scheduler, "gone", 5)
    add(scheduler, "waiting", 5)
    step = scheduler.schedule()
    scheduler.finish_requests(["gone", "waiting"], RequestStatus.FINISHED_ABORTED)
    assert answer(scheduler, step, {"gone": BAD, "waiting": FINE}) == {}
    connector = scheduler.connector
    assert not connector._answers and not connector._prompts
