"""Guards of prompts in both schedulers, with the workers' part played: on the CPU, vLLM itself always takes the plain one."""

import math

import pytest
from played_workers import BAD, CHUNK, FINE, FIRST, Player, Script, make_scheduler
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus

from llama_probe.vllm import engine_kwargs


@pytest.fixture(params=[False, True], ids=["plain", "async"])
def player(request, tiny):
    made = make_scheduler(engine_kwargs(tiny.backbone, {"guard": tiny.heads["guard"]}, halt_on="guard"), request.param)
    yield Player(made, "guard")
    made.shutdown()


def check_halted(player: Player, name: str) -> dict:
    """Raise unless a request got nothing. Return what it was told of its prompt."""
    (output,) = player.delivered[name]
    assert (output.new_token_ids, str(output.finish_reason), output.stop_reason) == ([], "stop", "guard")
    assert output.kv_transfer_params["halted"]["head"] == "guard"
    assert name not in player.scheduler.requests
    return output.kv_transfer_params


def test_prompts_are_scored_when_their_last_chunk_runs(player):
    player.add("long", Script(prompt=FINE), 40)
    player.run()
    assert [list(scored) for scored in player.scored[:2]] == [[], ["long"]] and not any(player.scored[2:])
    request = player.scored[1]["long"]
    assert CHUNK < 40 and (request.token_ids, request.num_tokens, request.heads) == (list(range(4, 44)), 40, ["guard"])
    assert len(request.block_ids) == 3 and len(set(request.block_ids)) == 3
    assert player.tokens("long") == [FIRST + i for i in range(5)]
    for output in player.delivered["long"]:
        assert output.kv_transfer_params["probes"]["guard"]["label"] == "fine"
        assert output.kv_transfer_params["halted"] is None


@pytest.mark.parametrize("script", [Script(prompt=BAD), Script(prompt=[math.nan] * 2), Script(unscored=[-1])], ids=str)
def test_what_is_flagged_or_has_no_score_ends_without_a_token_and_no_other(player, script):
    player.add("bad", script)
    player.add("fine", Script(prompt=FINE), 6)
    player.run()
    said = check_halted(player, "bad")
    if script.prompt is not BAD:
        assert said["halted"]["score"] is None and ("error" in said["probes"].get("guard", {})) == bool(script.prompt)
    assert len(player.tokens("fine")) == 5 and player.delivered["fine"][-1].kv_transfer_params["halted"] is None
    assert player.scheduled["bad"] <= 2, "in the async form it takes part in a step that began before it was known"
    player.check_clean()


@pytest.mark.parametrize(
    ("changes", "have_scores"),
    [
        ({}, [False] * 4 + [True]),
        ({"stop": ["end"], "detokenize": True}, [True] * 5),  # the front end may end the reply at any of them
    ],
    ids=["last", "each"],
)
def test_who_waits_for_the_end_gets_the_scores_there(player, changes, have_scores):
    player.add("whole", Script(prompt=FINE), kind=RequestOutputKind.FINAL_ONLY, **changes)
    player.run()
    known = [output.kv_transfer_params for output in player.delivered["whole"]]
    assert [params is not None for params in known] == have_scores
    assert known[-1]["probes"]["guard"]["logits"] == FINE


def test_a_prompt_that_comes_in_pieces_is_scored_after_each(player):
    player.add("talk", Script(prompt=FINE), resumable=True)
    while not player.delivered["talk"]:
        player.step()
    assert player.delivered["talk"][0].kv_transfer_params["halted"] is None
    player.add("talk", Script(prompt=BAD), 6, resumable=True)  # it waits until the reply to the first piece has ended
    player.run()
    assert [scored["talk"].num_tokens for scored in player.scored if scored] == [5, 5 + 4 + 6], (
        "less a reply's last token"
    )
    *_, last = player.delivered["talk"]
    assert (last.new_token_ids, last.stop_reason) == ([], "guard")
    assert last.kv_transfer_params["probes"]["guard"]["logits"] == BAD
    player.check_clean()


def test_nothing_is_kept_of_requests_that_are_gone(player):
    for name in ("gone", "waiting"):
        player.add(name, Script(prompt=BAD))
    player.queue.append(player.scheduler.schedule())
    player.scheduler.finish_requests(["gone", "waiting"], RequestStatus.FINISHED_ABORTED)
    player.answer()
    assert not any(player.delivered.values())
    player.check_clean()
