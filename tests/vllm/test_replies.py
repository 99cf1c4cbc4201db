"""Replies that a guard follows, in both forms of the scheduler, with workers that are played: what a client gets of them."""

import random

import pytest
from conftest import make_probe
from played_workers import BAD, END, FINE, FIRST, Player, Script, make_scheduler
from tiny_engine import HIDDEN
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus

from llama_probe.vllm import engine_kwargs


@pytest.fixture(params=[False, True], ids=["plain", "async"])
def start(request, tiny, tmp_path):
    """A function that starts a scheduler whose one head, a guard of replies, is called `watch`."""
    started = []

    def make(
        scope="response",
        halts=True,
        patience=1,
        blocks=30,
        prefixes=False,
        hide=False,
        window=1,
        **options,
    ) -> Player:
        head = make_probe(hidden_size=HIDDEN, probe_type="gate", id2label={0: "fine", 1: "bad"}, token_scope=scope)
        head.save_pretrained(tmp_path / scope)
        rules = {"watch": {"label": "bad", "threshold": 0.5, "patience": patience, "window": window}}
        options["halt_on" if halts else "monitor"] = rules
        kwargs = engine_kwargs(tiny.backbone, {"watch": tmp_path / scope}, max_num_seqs=6, **options)
        kwargs["additional_config"]["llama_probe"]["hide_scores"] = hide
        started.append(make_scheduler(kwargs, request.param, blocks, prefixes))
        return Player(started[-1])

    yield make
    for each in started:
        each.shutdown()


def shown(script: Script, most: int, patience: int = 1, hold_back: int = 0) -> tuple[int, int | None]:
    """The number of tokens that a client may see, and the token that halted the reply."""
    flagged = [token in script.flags for token in range(most)]
    total = most if script.end is None else min(script.end, most)
    for token in range(total):
        if token + 1 >= patience and all(flagged[token + 1 - patience : token + 1]):
            clear = [t for t in range(hold_back, token) if not any(flagged[t - hold_back : t + 1])]
            return max((t + 1 - hold_back for t in clear), default=0), token
    return total, None


def check(player: Player, name: str, most: int = 5, **rule) -> None:
    script, outputs = player.scripts[name], player.delivered[name]
    count, halt = shown(script, most, **rule)
    ends = script.end is not None and script.end < most and halt is None
    assert player.tokens(name) == [FIRST + i for i in range(count)] + [END] * ends
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert all(output.new_token_ids for output in outputs[1:-1]), "no empty output but the first, and the last"
    last = outputs[-1]
    assert str(last.finish_reason) == ("length" if halt is None and not ends else "stop")
    assert last.stop_reason == (None if halt is None else "watch")
    reply = last.kv_transfer_params["replies"][int(name.partition("_")[0]) if "_" in name else 0]
    halted = reply["halted"]
    assert (halted and halted["token"]) == halt and (not halted or last.kv_transfer_params["halted"])
    said = reply["probes"]["watch"]
    scored = halt + 1 if halt is not None else count
    assert said["tokens"] == scored
    if scored:
        assert said["largest"]["bad"]["score"] == pytest.approx(
            float(any(t in script.flags for t in range(scored))), abs=1e-3
        )


def test_a_token_is_delivered_once_it_has_a_score(start):
    player = start()
    player.add("a", Script(), max_tokens=3)
    seen = []
    while player.scheduler.has_unfinished_requests():
        player.step()
        seen.append(player.tokens("a"))
    assert player.tokens("a") == [100, 101, 102], "with the last one, which takes a step more"
    first, *_, last = player.delivered["a"]
    assert first.new_token_ids == [] and first.kv_transfer_params == {"probes": {}, "halted": None}
    assert (
        str(last.finish_reason) == "length" and last.kv_transfer_params["replies"][0]["probes"]["watch"]["tokens"] == 3
    )
    player.run()
    player.check_clean()


@pytest.mark.parametrize(
    "script",
    [
        Script([0]),
        Script([2]),
        Script([4]),
        Script([3], end=3),
        Script(end=2),
        Script(end=0),
        Script([4], end=4),
        Script([9]),
    ],
    ids=str,
)
def test_a_reply_ends_before_its_first_flagged_token(start, script):
    player = start()
    player.add("a", script)
    player.run()
    check(player, "a")
    player.check_clean()


def test_no_more_than_a_step_is_wasted_on_a_halted_reply(start):
    player = start()
    player.add("a", Script([2]), max_tokens=50)
    player.run()
    # The prompt, and tokens 0 to 2. One more has begun in the async form.
    assert player.steps - 4 in (0, 1, 2)


@pytest.mark.parametrize("flags", [[1, 2], [0, 2, 3], [1, 3], [0, 1], []], ids=str)
@pytest.mark.parametrize(("patience", "hold_back"), [(2, 0), (2, 2), (1, 1)])
def test_patience_and_more_that_is_held_back(start, flags, patience, hold_back):
    player = start(patience=patience, hold_back=hold_back)
    player.add("a", Script(flags), max_tokens=7)
    player.run()
    check(player, "a", 7, patience=patience, hold_back=hold_back)


@pytest.mark.parametrize(("flags", "halt"), [([0], None), ([3, 4], 4), ([0, 1], 1)])
def test_a_window_takes_the_mean_of_the_last_scores(start, flags, halt):
    player = start(window=4)
    player.add("a", Script(flags), max_tokens=7)
    player.run()
    reply = player.delivered["a"][-1].kv_transfer_params["replies"][0]
    assert (reply["halted"] and reply["halted"]["token"]) == halt
    assert len(player.tokens("a")) == (7 if halt is None else halt)


def test_a_flagged_prompt_counts_for_the_patience(start):
    for patience, flags, count in ((2, [0], 0), (2, [1], 5), (1, [], 0)):
        player = start("all", patience=patience)
        player.add("a", Script(flags, prompt=BAD))
        player.run()
        assert len(player.tokens("a")) == count
        halted = player.delivered["a"][-1].kv_transfer_params["halted"]
        assert (halted and halted["token"]) == (0 if flags == [0] else None)
        assert bool(halted) == (count == 0)


@pytest.mark.parametrize("script", [Script(no_number=[2]), Script(unscored=[2])], ids=str)
def test_a_token_without_a_score_is_not_delivered(start, script):
    player = start()
    player.add("a", script)
    player.run()
    assert player.tokens("a") == [100, 101]
    last = player.delivered["a"][-1]
    halted = last.kv_transfer_params["halted"]
    assert last.stop_reason == "watch" and (halted["head"], halted["score"], halted["token"]) == ("watch", None, 2)


@pytest.mark.parametrize("script", [Script(), Script([3]), Script(end=3)], ids=str)
def test_logprobs_are_those_of_the_tokens(start, script):
    player = start()
    player.add("a", script, logprobs=2)
    player.add("other", Script(), logprobs=None)
    player.run()
    for output in player.delivered["a"]:
        assert output.new_logprobs.sampled_token_ranks.tolist() == output.new_token_ids
        assert output.new_logprobs.logprob_token_ids[:, 0].tolist() == output.new_token_ids
        assert output.new_logprobs.logprobs.shape == (len(output.new_token_ids), 3)
    assert not any(output.new_logprobs for output in player.delivered["other"])


def test_who_monitors_halts_and_delays_nothing(start):
    player = start(halts=False, patience=2)
    player.add("a", Script([1, 2]))
    player.run()
    assert player.tokens("a") == [100, 101, 102, 103, 104] and player.delivered["a"][0].new_token_ids == [100]
    last = player.delivered["a"][-1].kv_transfer_params
    said = last["replies"][0]["probes"]["watch"]
    assert "halted" not in last and (said["flagged"], said["token"], said["tokens"]) == (["bad"], 2, 4)
    player.check_clean()


def test_hidden_scores(start):
    player = start(hide=True)
    player.add("a", Script([1]), asked={"token_scores": True})
    player.run()
    last = player.delivered["a"][-1].kv_transfer_params
    assert last["replies"] == [
        {
            "probes": {"watch": {"tokens": 2, "label": "bad", "flagged": ["bad"], "token": 1}},
            "halted": {"head": "watch", "label": "bad", "token": 1},
        }
    ]


def test_the_last_of_several_replies_knows_of_all(start):
    player = start()
    for index, script in enumerate((Script([1]), Script(), Script(end=1))):
        player.add(f"{index}_parent", script)
    player.run()
    known = max(
        (outputs[-1].kv_transfer_params for outputs in player.delivered.values()),
        key=lambda params: len(params["replies"]),
    )
    longest = player.delivered["1_parent"][-1].kv_transfer_params
    assert [reply["probes"]["watch"]["tokens"] for reply in longest["replies"]] == [2, 5, 1]
    assert [bool(reply["halted"]) for reply in longest["replies"]] == [True, False, False] and longest["halted"]
    assert known and [len(player.tokens(f"{index}_parent")) for index in range(3)] == [1, 5, 2]
    player.check_clean()


def test_a_prompt_alone_has_no_reply(start):
    player = start("all")
    player.add("a", Script(prompt=FINE), asked={"reply": False, "probes": ["watch"]}, max_tokens=1)
    player.run()
    (output,) = player.delivered["a"]
    assert output.new_token_ids == [] and output.kv_transfer_params["probes"]["watch"]["logits"] == FINE
    assert player.steps <= 3


def test_a_context_that_is_full_ends_a_token_earlier(start):
    player = start()
    player.add("a", Script(), 120, max_tokens=8)  # of 128
    player.run()
    assert player.tokens("a") == [FIRST + i for i in range(7)]
    assert str(player.delivered["a"][-1].finish_reason) == "length"


def test_whole_replies_hold_what_a_stream_shows(start):
    player = start()
    player.add("a", Script([3]), kind=RequestOutputKind.FINAL_ONLY, stop=["never"], detokenize=True)
    player.run()
    check(player, "a")
    assert all(output.kv_transfer_params["replies"] for output in player.delivered["a"]), "any may be the last"


@pytest.mark.parametrize("seed", range(6))
def test_many_requests_at_once_in_a_small_cache_with_some_that_go_away(start, seed):
    """Preempted, aborted, thrown out of the prefix cache: nobody gets a token that was not scored, and no slot is lost."""
    chance = random.Random(seed)
    hold_back, patience = chance.choice([(0, 1), (2, 1), (1, 2)])
    player = start(patience=patience, hold_back=hold_back, blocks=12, prefixes=seed % 2 == 1)
    waiting, gone = [f"{number % 2}_{number // 2}" for number in range(40)], set()
    most, preempted = {}, 0
    while waiting or player.scheduler.has_unfinished_requests() or player.queue:
        for _ in range(min(len(waiting), chance.randrange(3))):
            name = waiting.pop()
            most[name] = chance.randrange(1, 60)
            flags = [token for token in range(60) if chance.random() < 0.03 * patience**2]
            script = Script(flags, end=chance.choice([None, chance.randrange(60)]))
            player.add(name, script, chance.randrange(1, 60), max_tokens=most[name])
        if chance.random() < 0.05 and (running := list(player.scheduler.requests)):
            gone.add(name := chance.choice(running))
            player.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
        if chance.random() < 0.03:
            player.scheduler.reset_prefix_cache(reset_running_requests=True)
        player.step()
        preempted += sum(request.num_preemptions for request in player.scheduler.requests.values())
        assert player.steps < 4000
    assert preempted and gone
    for name in most:
        if name in gone:
            count, _ = shown(player.scripts[name], most[name], patience, hold_back)
            tokens = [token for token in player.tokens(name) if token != END]
            assert tokens == [FIRST + i for i in range(len(tokens))] and len(tokens) <= count
        else:
            check(player, name, most[name], patience=patience, hold_back=hold_back)
    player.check_clean()
