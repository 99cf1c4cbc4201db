"""Guards of prompts and of replies in both schedulers, with workers that are played: what a client gets."""

import json
import math
import random

import pytest
from conftest import make_probe
from played_workers import BAD, CHUNK, END, FINE, FIRST, Player, Script, make_scheduler
from tiny_engine import HIDDEN
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus

from llama_probe.vllm import engine_kwargs


@pytest.fixture(params=[False, True], ids=["plain", "async"])
def start(request, tiny, tmp_path):
    """A function that starts a scheduler whose one head is called `watch`. It halts, or flags alone."""
    started = []

    def make(scope="response", does="halt_on", blocks=30, prefixes=False, hide=False, hold_back=0, **rule) -> Player:
        head = make_probe(hidden_size=HIDDEN, probe_type="gate", id2label={0: "fine", 1: "bad"}, token_scope=scope)
        head.save_pretrained(tmp_path / scope)
        options = {does: {"watch": {"label": "bad", "threshold": 0.5, **rule}}, "hold_back": hold_back}
        options["for_server"] = {"hide_scores": hide}
        kwargs = engine_kwargs(tiny.backbone, {"watch": tmp_path / scope}, max_num_seqs=6, **options)
        started.append(make_scheduler(kwargs, request.param, blocks, prefixes))
        return Player(started[-1])

    yield make
    for each in started:
        each.shutdown()


class TestPrompts:
    def test_is_scored_when_its_last_chunk_runs(self, start):
        player = start("content")
        outputs = player.play(Script(prompt=FINE), 40)
        assert [list(scored) for scored in player.scored[:2]] == [[], ["a"]] and not any(player.scored[2:])
        request = player.scored[1]["a"]
        assert CHUNK < 40 and (request.token_ids, request.heads) == (list(range(4, 44)), ["watch"])
        assert request.num_tokens == 40 and len({*request.block_ids}) == len(request.block_ids) == 3
        assert player.tokens("a") == [FIRST + i for i in range(5)]
        for output in outputs:
            assert output.kv_transfer_params["probes"]["watch"]["label"] == "fine"
            assert output.kv_transfer_params["halted"] is None

    def test_flagged_or_unscored_one_gets_no_token_and_no_other_ends(self, start):
        for script in (Script(prompt=BAD), Script(prompt=[math.nan] * 2), Script(unscored=[-1])):
            player = start("content")
            player.add("fine", Script(prompt=FINE), 6)
            (output,) = player.play(script)
            assert (output.new_token_ids, str(output.finish_reason), output.stop_reason) == ([], "stop", "watch")
            known = output.kv_transfer_params
            assert known["halted"]["head"] == "watch" and (known["halted"]["score"] is None) == (script.prompt != BAD)
            assert ("error" in known["probes"]["watch"]) == (script.prompt != BAD)
            assert len(player.tokens("fine")) == 5
            assert player.delivered["fine"][-1].kv_transfer_params["halted"] is None
            assert player.scheduled["a"] <= 2, "in the async form a step may have begun before it was known"

    def test_scores_come_with_the_last_output_or_each_that_may_be_the_last(self, start):
        # With a stop string the front end may end the reply at any output.
        for changes, have_scores in (({}, [False] * 4 + [True]), ({"stop": ["end"], "detokenize": True}, [True] * 5)):
            options = {"kind": RequestOutputKind.FINAL_ONLY, **changes}
            known = [output.kv_transfer_params for output in start("content").play(Script(prompt=FINE), **options)]
            assert [params is not None for params in known] == have_scores
            assert known[-1]["probes"]["watch"]["logits"] == FINE

    def test_one_in_pieces_is_scored_after_each(self, start):
        player = start("content")
        player.add("a", Script(prompt=FINE), resumable=True)
        while not player.delivered["a"]:
            player.step()
        assert player.delivered["a"][0].kv_transfer_params["halted"] is None
        *_, last = player.play(Script(prompt=BAD), 6, resumable=True)  # it waits for the reply to the first piece
        lengths = [scored["a"].num_tokens for scored in player.scored if scored]
        assert lengths == [5, 5 + 4 + 6], "less a reply's last token"
        assert (last.new_token_ids, last.stop_reason) == ([], "watch")
        assert last.kv_transfer_params["probes"]["watch"]["logits"] == BAD

    def test_labels_alone_take_no_step_more(self, start):
        player = start("all")
        (output,) = player.play(Script(prompt=FINE), asked={"reply": False, "probes": ["watch"]}, max_tokens=1)
        assert output.new_token_ids == [] and output.kv_transfer_params["probes"]["watch"]["logits"] == FINE
        assert player.steps <= 3
        (output,) = player.play(Script(), asked={"reply": False, "probes": []}, max_tokens=1)
        assert output.kv_transfer_params == {"probes": {}, "halted": None}, "no guard either"


def shown(script: Script, most: int, patience: int = 1, hold_back: int = 0) -> tuple[int, int | None]:
    """The number of tokens that a client may see, and the token that halted the reply."""
    no_score = {*script.no_number, *script.unscored}
    flagged = [token in script.flags or token in no_score for token in range(most)]
    total = most if script.end is None else min(script.end, most)
    for token in range(total):
        is_halted = token + 1 >= patience and all(flagged[token + 1 - patience : token + 1])
        if is_halted or token in no_score:
            clear = [t for t in range(hold_back, token) if not any(flagged[t - hold_back : t + 1])]
            return max((t + 1 - hold_back for t in clear), default=0), token
    return total, None


def check(player: Player, name: str, most: int = 5, **rule) -> None:
    """Raise unless a client has got of a reply all that it may see, and what heads say of it."""
    script, outputs = player.scripts[name], player.delivered[name]
    count, halt = shown(script, most, **rule)
    ends = script.end is not None and script.end < most and halt is None
    assert player.tokens(name) == [FIRST + i for i in range(count)] + [END] * ends
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert all(output.new_token_ids for output in outputs[:-1]), "no empty output but the last"
    last = outputs[-1]
    assert str(last.finish_reason) == ("length" if halt is None and not ends else "stop")
    assert last.stop_reason == (None if halt is None else "watch")
    reply = last.kv_transfer_params["replies"][int(name.partition("_")[0]) if "_" in name else 0]
    halted, said = reply["halted"], reply["probes"]["watch"]
    assert (halted and halted["token"]) == halt and (not halted or last.kv_transfer_params["halted"])
    scored = count if halt is None else halt + (halt not in script.unscored)
    assert said["tokens"] == scored
    assert not halted or (halted["score"] is None) == (halt in (*script.no_number, *script.unscored))
    assert said["flagged"] == ["bad"] * (halt is not None and halt not in script.unscored)
    if scored and halt not in script.no_number:
        largest = float(any(token in script.flags for token in range(scored)))
        assert said["largest"]["bad"]["score"] == pytest.approx(largest, abs=1e-3)


class TestReplies:
    @pytest.mark.parametrize(("patience", "hold_back"), [(1, 0), (1, 1), (2, 0), (2, 2)])
    def test_ends_before_its_first_flagged_token(self, start, patience, hold_back):
        """Or before the first of as many as the patience; what is held back besides is not delivered either."""
        rule, player = {"patience": patience, "hold_back": hold_back}, start(patience=patience, hold_back=hold_back)
        ends = Script([3], end=3), Script(end=2), Script(end=0), Script([4], end=4)
        flags = [], [0], [2], [6], [9], [0, 1], [1, 2], [1, 3], [0, 2, 3]
        for script in (*ends, *map(Script, flags)):
            player.play(script, max_tokens=7)
            check(player, "a", 7, **rule)

    def test_no_more_than_a_step_is_wasted_on_a_halted_one(self, start):
        player = start()
        player.play(Script([2]), max_tokens=50)
        # The prompt, and tokens 0 to 2. One more has begun in the async form.
        assert player.steps - 4 in (0, 1, 2)

    def test_window_takes_the_mean_of_the_last_scores(self, start):
        for flags, halt in (([0], None), ([3, 4], 4), ([0, 1], 1)):
            player = start(window=4)
            reply = player.play(Script(flags), max_tokens=7)[-1].kv_transfer_params["replies"][0]
            assert (reply["halted"] and reply["halted"]["token"]) == halt
            assert len(player.tokens("a")) == (7 if halt is None else halt)

    def test_flagged_prompt_counts_for_the_patience(self, start):
        for patience, flags, count in ((2, [0], 0), (2, [1], 5), (1, [], 0)):
            player = start("all", patience=patience)
            halted = player.play(Script(flags, prompt=BAD))[-1].kv_transfer_params["halted"]
            assert len(player.tokens("a")) == count and bool(halted) == (count == 0)
            assert (halted and halted["token"]) == (0 if flags == [0] else None)

    def test_logprobs_are_those_of_the_tokens(self, start):
        for script in (Script(), Script([3]), Script(end=3)):
            player = start()
            player.add("other", Script(), logprobs=None)
            outputs = player.play(script, logprobs=2)
            # vLLM may join outputs, and with one that has no token yet it would get them twice.
            assert outputs[0].new_token_ids and outputs[0].prefill_stats is not None
            for output in outputs:
                assert output.new_logprobs.sampled_token_ranks.tolist() == output.new_token_ids
                assert output.new_logprobs.logprob_token_ids[:, 0].tolist() == output.new_token_ids
                assert len(output.new_logprobs.logprobs) == len(output.new_token_ids)
            assert not any(output.new_logprobs for output in player.delivered["other"])

    def test_logprobs_that_a_request_beside_it_made_narrower(self, start):
        """A request with `logprob_token_ids` gives its own number of columns to all."""
        player = start()
        player.add("a", Script(end=3), logprobs=2)
        while player.scheduler.has_unfinished_requests() or player.queue:
            player.columns = 2 + player.steps % 2
            player.step()
        assert player.tokens("a") == [FIRST, FIRST + 1, FIRST + 2, END]
        last = player.delivered["a"][-1]
        assert len(last.new_token_ids) == 2 and last.new_logprobs.logprobs.shape == (2, 3)

    def test_monitor_halts_and_delays_nothing(self, start):
        player = start(does="monitor", patience=2)
        first, *_, last = player.play(Script([1, 2], no_number=[3]), asked={"token_scores": True})
        assert first.new_token_ids == [FIRST] and player.tokens("a") == [FIRST + i for i in range(5)]
        said = last.kv_transfer_params["replies"][0]["probes"]["watch"]
        assert "halted" not in last.kv_transfer_params
        assert (said["flagged"], said["token"], said["tokens"]) == (["bad"], 2, 4)
        assert json.loads(json.dumps(said, allow_nan=False))["token_logits"] == [FINE, BAD, BAD, None]

    def test_hidden_scores_leave_labels_and_places(self, start):
        *_, last = start(hide=True).play(Script([1]), asked={"token_scores": True})
        probes = {"watch": {"tokens": 2, "label": "bad", "flagged": ["bad"], "token": 1}}
        halted = {"head": "watch", "label": "bad", "token": 1}
        assert last.kv_transfer_params["replies"] == [{"probes": probes, "halted": halted}]

    def test_others_tell_of_one_that_has_ended(self, start):
        """vLLM may merge an output of theirs with its last one."""
        player = start()
        for index, script in enumerate((Script([0]), Script())):
            player.add(f"{index}_parent", script)
        player.run()
        for output in player.delivered["1_parent"][1:]:
            assert output.kv_transfer_params["replies"][0]["halted"]["token"] == 0

    def test_context_that_is_full_ends_it_a_token_earlier(self, start):
        player = start()
        *_, last = player.play(Script(), 120, max_tokens=8)  # of 128
        assert player.tokens("a") == [FIRST + i for i in range(7)] and str(last.finish_reason) == "length"

    @pytest.mark.parametrize("seed", range(6))
    def test_crowd_in_a_small_cache_gets_no_unscored_token(self, start, seed):
        """Preempted, aborted, thrown out of the prefix cache: no slot is lost either."""
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
                missing = [[token for token in range(60) if chance.random() < 0.005] for _ in range(2)]
                script = Script(flags, None, *missing, end=chance.choice([None, chance.randrange(60)]))
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
            if name not in gone:
                check(player, name, most[name], patience=patience, hold_back=hold_back)
                continue
            count, _ = shown(player.scripts[name], most[name], patience, hold_back)
            tokens = [token for token in player.tokens(name) if token != END]
            assert tokens == [FIRST + i for i in range(len(tokens))] and len(tokens) <= count
        player.check_clean()
