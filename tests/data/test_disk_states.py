"""Cached hidden states give the logits of the backbone in the loop, whatever else happens to the cache."""

import errno
import os
import shutil
import signal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cases import MARKERS, REPLY, USER
from conftest import make_lm, make_prompts, score_turns
from kills import each_kill

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.backbone import passes
from llama_probe.data import disk_states
from llama_probe.data.batches import collate, counted_lengths
from llama_probe.data.disk_states import DiskStates
from llama_probe.data.prompts import PromptDataset
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.heads.turns import turn_mask
from llama_probe.training.head_group import HeadGroup


PREFIX = [7, 8, 9]
PROMPTS = [PREFIX + make_prompts(1, length, seed=length)[0].tolist() for length in (3, 11, 5, 1, 8)]
LABELS = np.array([0, 1, 1, 0, 1])
ROWS = PromptDataset(PROMPTS, LABELS)


def make_head(lm, **changes) -> ProbeModel:
    torch.manual_seed(0)
    values = {"downcast": 4, "token_scope": "content", "prefix_ids": PREFIX}
    return ProbeModel(ProbeConfig(**{**values, **changes}), backbone=lm).eval()


HEAD = make_head(make_lm()).config


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("head_type", ["mha", "last"])
def test_masks_replace_the_scope(tmp_path, lm, head_type):
    probe = make_head(lm, probe_type=head_type, token_scope="response")
    masks = [[int(i >= len(ids) // 2) for i in range(len(ids))] for ids in PROMPTS]  # as `assistant_masks` are
    live, cache = PromptDataset(PROMPTS, LABELS, masks), DiskStates(tmp_path, torch.float32)
    whole = PromptDataset(PROMPTS, LABELS, [[True] * len(ids) for ids in PROMPTS])
    cached, others = (cache.dataset(lm, probe.config, rows) for rows in (live, whole))
    expected = torch.zeros(5, 2)
    for row, (ids, mask) in enumerate(zip(PROMPTS, masks, strict=True)):
        expected[row] = probe(input_ids=torch.tensor([ids]), probe_mask=torch.tensor([mask])).logits
    for data in (live, cached):
        torch.testing.assert_close(predict_logits(probe, data), expected, atol=1e-5, rtol=1e-5)
    assert head_type == "last" or len(others[0]["input_ids"]) > len(cached[0]["input_ids"])


def test_turns_are_judged_one_by_one(tmp_path, lm):
    """By the Trainer's group as well. Each member learns from the turn that it finds strongest."""
    changes = {"token_scope": "user", "turn_markers": MARKERS, "prefix_ids": [], "dropout": 0, "layer_dropout": 0}
    probe = make_head(lm, probe_type="multimax", **changes)
    chats = [[USER, *ids[3:6], REPLY, 20, USER, *ids[6:]] for ids in PROMPTS[1:]]
    live = PromptDataset([*chats, [USER, 30, 31]], LABELS)
    cached = DiskStates(tmp_path, torch.float32).dataset(lm, probe.config, live)
    group, rows = HeadGroup({"a": probe}), []
    for ids in live.prompts:
        states = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states
        rows.append((states, turn_mask("user", MARKERS, torch.tensor([ids]))))
    expected = torch.cat([score_turns(probe.eval(), *row) for row in rows])
    by_member = torch.cat([score_turns(probe.train(), *row, "member_logits") for row in rows], dim=1)
    assert not torch.allclose(by_member.mean(dim=0), expected, atol=1e-3)
    for data in (live, cached):
        torch.testing.assert_close(predict_logits(probe, data), expected, atol=1e-5, rtol=1e-5)
        batch = collate(list(data))
        torch.testing.assert_close(probe(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        del batch["labels"]
        torch.testing.assert_close(group.eval()(**batch).logits[:, 0], expected, atol=1e-5, rtol=1e-5)
        learned = group.train()(**batch).by_head["a"].member_logits
        torch.testing.assert_close(learned, by_member, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({}, (5, 11, 32)),
        ({"token_scope": "prompt"}, (5, 14, 32)),
        ({"layers": [1, 4]}, (2, 11, 32)),
        ({"probe_type": "last"}, (1, 1, 32)),
    ],
)
def test_only_what_the_head_reads_is_kept(tmp_path, lm, monkeypatch, changes, shape):
    monkeypatch.setattr(passes, "BATCH_TOKENS", 20)
    probe, live = make_head(lm, **changes), ROWS
    cache = DiskStates(tmp_path / "own", torch.float32)
    cached = cache.dataset(lm, probe.config, ROWS)
    assert cache.bytes_of(probe.config, list(ROWS)) == sum(row["hidden_states"].nbytes for row in cached)
    assert cached[1]["hidden_states"].shape == shape and len(cached) == len(list(cached)) == 5
    counted = [ids if probe.config.token_scope == "prompt" else ids[3:] for ids in PROMPTS]
    assert [cached[row]["input_ids"].tolist() for row in range(5)] == [ids[-shape[1] :] for ids in counted]
    expected, output = (probe(**collate([data[row] for row in range(5)])) for data in (live, cached))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss)


def test_requests_and_windows_are_of_the_rows_and_not_of_the_states(tmp_path, lm):
    """Heads of several windows, and rows with and without a known place, share the states of a text."""
    config = make_head(lm, flagged=["LABEL_1"], window=4).config
    requests = [[i % 3 == 0 for i in range(len(ids))] for ids in PROMPTS]
    live = PromptDataset(PROMPTS, LABELS, requests=requests)
    cached = DiskStates(tmp_path, torch.float32).dataset(lm, config, live)
    before = names(next(iter(tmp_path.iterdir())))
    plain = DiskStates(tmp_path, torch.float32).dataset(lm, HEAD, ROWS)
    assert names(next(iter(tmp_path.iterdir()))) == before and "request_mask" not in plain[0]
    assert [cached[row]["request_mask"].tolist() for row in range(5)] == [mask[3:] for mask in requests]
    assert (
        collate(list(cached))["request_mask"].shape == (5, 11)
        and collate(list(live))["request_mask"].dtype == torch.bool
    )
    lengths = [len(ids) - 3 for ids in PROMPTS]
    assert counted_lengths(config, live) == counted_lengths(config, cached) == lengths


def test_a_prompt_is_computed_once_and_only_for_the_same(tmp_path, lm):
    cache = DiskStates(tmp_path / "cache")
    assert cache.dataset(lm, HEAD, ROWS)[0]["hidden_states"].dtype == torch.float16
    assert cache.dataset(lm, HEAD, PromptDataset(PROMPTS, 1 - LABELS))[0]["labels"] == 1
    moved = make_lm(use_cache=False)
    moved.config._name_or_path = "elsewhere"
    cache.dataset(moved, HEAD, ROWS)
    (entry,) = cache.folder.iterdir()  # labels and the LM's path do not matter
    before = names(entry)
    again = cache.dataset(lm, HEAD, PromptDataset([*PROMPTS[3:], PROMPTS[0], PROMPTS[3]]))
    assert names(entry) == before and len(again) == 4, "prompts of other data sets are not computed anew"
    assert [again[row]["input_ids"].tolist() for row in range(4)] == [PROMPTS[row][3:] for row in (3, 4, 0, 3)]
    changed = make_lm()
    changed.model.layers[0].mlp.up_proj.weight.data[0, 1] += 0.01
    whole = HEAD.replace(token_scope="prompt")
    for count, others in enumerate([(changed, HEAD), (make_lm(rope_theta=100.0), HEAD), (lm, whole)], start=2):
        cache.dataset(*others, ROWS)
        assert len(names(cache.folder)) == count


def test_a_run_continues_where_a_killed_one_has_stopped(tmp_path, monkeypatch):
    """Killed before some of its operations on the folder."""
    monkeypatch.setattr(passes, "BATCH_TOKENS", 20)
    place, counts = tmp_path / "killed", []

    def compute(folder=place):
        lm, rows = make_lm(), []
        lm.model.layers[1].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        found = DiskStates(folder).dataset(lm, HEAD, ROWS)
        return sum(rows), [found[row]["hidden_states"] for row in range(len(PROMPTS))]

    _, expected = compute(tmp_path / "whole")
    for _ in each_kill(compute, place, lambda: shutil.rmtree(place, ignore_errors=True), range(0, 99, 4)):
        count, found = compute()
        counts.append(count)
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
        assert names(place) == names(tmp_path / "whole")
        (entry,) = place.iterdir()
        left = {path.suffix for path in entry.iterdir()} - {".safetensors"}
        assert not (count and left), "a run that writes leaves nothing else"
    assert any(0 < count < len(PROMPTS) for count in counts), "finished rows are not computed again"


def test_a_kill_in_the_middle_of_long_rows(tmp_path, lm, monkeypatch, caplog):
    """Each long row is a pass of its own. The rows before the kill are there, and the next run says so."""
    monkeypatch.setattr(passes, "BATCH_TOKENS", 20)
    prompts = [PREFIX + make_prompts(1, length, seed=length)[0].tolist() for length in (30, 31, 32, 33)]
    parts = {"train": PromptDataset(prompts[:3]), "validation": PromptDataset(prompts[2:])}
    ran = []
    child = os.fork()

    def note(module, args):
        ran.append(len(args[0]))
        if child == 0 and len(ran) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    lm.model.layers[1].register_forward_pre_hook(note)
    if child == 0:
        try:
            DiskStates(tmp_path).datasets(lm, HEAD, parts)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = DiskStates(tmp_path).datasets(lm, HEAD, parts)
    assert "2 of 4 rows are there" in caplog.text and ran == [1, 1]
    assert [len(row["input_ids"]) for part in found.values() for row in part] == [30, 31, 32, 32, 33]


def test_two_runs_may_compute_the_same(tmp_path, lm):
    found = []

    def overtake(*_):
        if not found:
            found.append(None)
            found[0] = DiskStates(tmp_path).dataset(make_lm(), HEAD, ROWS)

    lm.model.layers[1].register_forward_pre_hook(overtake)
    slower = DiskStates(tmp_path).dataset(lm, HEAD, ROWS)
    assert torch.equal(slower[1]["hidden_states"], found[0][1]["hidden_states"]) and len(names(tmp_path)) == 1


def test_states_that_cannot_be_kept(tmp_path, lm):
    with pytest.raises(ProbeError, match="no token that a head reads"):
        DiskStates(tmp_path).dataset(lm, HEAD, PromptDataset([PREFIX]))
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(disk_states, "save_file", side_effect=full), pytest.raises(ProbeError, match="no room"):
        DiskStates(tmp_path).dataset(lm, HEAD, ROWS)
    lm.model.norm.weight.data.fill_(1e6)
    with pytest.raises(ProbeError, match=r"torch.float16"):
        DiskStates(tmp_path).dataset(lm, HEAD, ROWS)
    assert not list(tmp_path.rglob("*.*")), "nothing is left of a pass that failed"
