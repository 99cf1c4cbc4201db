"""Cached hidden states give the logits that the backbone in the loop gives."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_lm, make_prompts
from launcher import environment

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.backbone.capture import collect_hidden_states
from llama_probe.data import states as features
from llama_probe.data.states import ProbeCollator, PromptDataset, StateCache
from llama_probe.evaluation.report import predict_logits, predict_together


PREFIX = [7, 8, 9]


@pytest.fixture
def prompts():
    return [PREFIX + make_prompts(1, length, seed=length)[0].tolist() for length in (3, 11, 5, 1, 8)]


def config(**changes):
    return ProbeConfig(downcast=4, token_scope="content", prefix_ids=PREFIX, **changes)


LABELS = np.array([0, 1, 1, 0, 1])


@pytest.mark.parametrize("scope", ["content", "prompt"])
def test_cached_equals_live(tmp_path, prompts, scope):
    torch.manual_seed(0)
    lm = make_lm()
    probe = ProbeModel(config().replace(token_scope=scope), backbone=lm).eval()
    live, collate = PromptDataset(prompts, LABELS), ProbeCollator()
    cached = StateCache(tmp_path, torch.float32).dataset(lm, probe.config, prompts, LABELS, batch_tokens=20)
    assert len(cached) == len(live)
    batches = [collate([data[row] for row in range(5)]) for data in (live, cached)]
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    with torch.no_grad():
        a, b = (probe(**batch) for batch in batches)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.loss, b.loss)


@pytest.mark.parametrize("kind", ["mha", "gate", "last"])
def test_masks_in_place_of_the_scope(tmp_path, prompts, kind):
    """Cached, live, and a batch at a time: only the tokens that the masks name."""
    torch.manual_seed(0)
    lm = make_lm()
    config = ProbeConfig(probe_type=kind, downcast=4, token_scope="response", prefix_ids=PREFIX)
    probe = ProbeModel(config, backbone=lm).eval()
    masks = [[i >= len(ids) // 2 for i in range(len(ids))] for ids in prompts]
    live, cache = PromptDataset(prompts, LABELS, masks), StateCache(tmp_path, torch.float32)
    cached = cache.dataset(lm, probe.config, prompts, LABELS, masks=masks)
    others = cache.dataset(lm, probe.config, prompts, LABELS, masks=[[True] * len(ids) for ids in prompts])
    expected = torch.zeros(5, 2)
    for row, (ids, mask) in enumerate(zip(prompts, masks, strict=True)):
        expected[row] = probe(input_ids=torch.tensor([ids]), probe_mask=torch.tensor([mask])).logits
    for data in (live, cached):
        torch.testing.assert_close(predict_logits(probe, data), expected, atol=1e-5, rtol=1e-5)
        passed = None if data is cached else lm
        (found,) = predict_together([probe], data, passed)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert kind == "last" or len(others[0]["input_ids"]) > len(cached[0]["input_ids"])


def test_only_tokens_that_count_are_kept(tmp_path, prompts):
    cached = StateCache(tmp_path).dataset(make_lm(), ProbeModel(config(), make_lm()).config, prompts, LABELS)
    assert [cached[row]["input_ids"] for row in range(5)] == [ids[3:] for ids in prompts]
    assert cached[1]["hidden_states"].shape == (11, 5, 32) and cached[1]["hidden_states"].dtype == torch.float16


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"layers": [1, 4]}, (11, 2, 32)),
        ({"probe_type": "last"}, (1, 1, 32)),
        ({"probe_type": "last", "layers": [0, 3]}, (1, 1, 32)),
    ],
)
def test_only_what_the_head_reads_is_kept(tmp_path, prompts, changes, shape):
    torch.manual_seed(0)
    lm, collate = make_lm(), ProbeCollator()
    probe = ProbeModel(config(**changes), backbone=lm).eval()
    live, cache = PromptDataset(prompts, LABELS), StateCache(tmp_path, torch.float32)
    cached = cache.dataset(lm, probe.config, prompts, LABELS)
    assert cached[1]["hidden_states"].shape == shape
    whole = StateCache(tmp_path / "whole", torch.float32)
    whole.dataset(lm, ProbeModel(config(), lm).config, prompts, LABELS)
    served = whole.dataset(lm, probe.config, prompts, LABELS)
    assert served[1]["hidden_states"].shape == (11, 5, 32), "an entry with all that any head reads serves every head"
    expected = probe(**collate([live[row] for row in range(5)])).logits
    for data in (cached, served):
        found = probe(**collate([data[row] for row in range(5)])).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_it_is_found_again_and_only_for_the_same(tmp_path, prompts):
    lm, head = make_lm(), ProbeModel(config(), make_lm()).config

    def entries():
        return {path.name for path in tmp_path.iterdir()}

    StateCache(tmp_path).dataset(lm, head, prompts, LABELS)
    first = entries()
    StateCache(tmp_path).dataset(lm, head, prompts, 1 - LABELS)
    assert entries() == first and len(first) == 1, "labels are no part of it, and no scratch folder is left"
    changed = make_lm()
    changed.model.layers[0].mlp.up_proj.weight.data.add_(0.01)
    for count, args in enumerate(
        [(changed, head, prompts), (lm, head, prompts[:4]), (lm, head.replace(token_scope="prompt"), prompts)], start=2
    ):
        StateCache(tmp_path).dataset(*args, LABELS)
        assert len(entries()) == count
    cache = StateCache(tmp_path)
    cache.delete()
    assert not tmp_path.exists()


WORKER = """
import sys, time
import torch
from conftest import make_lm
from test_states import LABELS, PREFIX, config
from llama_probe import ProbeModel
from llama_probe.data.states import StateCache

lm = make_lm()
head = ProbeModel(config(), lm).config
lm.model.layers[1].register_forward_pre_hook(lambda *_: (print("at work", flush=True), time.sleep(600)))
StateCache(sys.argv[1]).dataset(lm, head, [PREFIX + [10, 11]], LABELS[:1])
"""


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "states.bin").write_bytes(b"short"),
        lambda entry: (entry / "states.bin").unlink(),
        lambda entry: (entry / "meta.json").write_text('{"shape": [5'),
        lambda entry: (entry / "meta.json").write_text("{}"),
        lambda entry: (entry / "meta.json").unlink(),
    ],
)
def test_a_damaged_entry_is_computed_anew(tmp_path, prompts, damage):
    lm = make_lm()
    head, cache = ProbeModel(config(), lm).config, StateCache(tmp_path)
    whole = cache.dataset(lm, head, prompts, LABELS)[1]["hidden_states"].clone()
    (entry,) = tmp_path.iterdir()
    damage(entry)
    assert torch.equal(cache.dataset(lm, head, prompts, LABELS)[1]["hidden_states"], whole)
    assert list(tmp_path.iterdir()) == [entry]


def test_the_same_weights_with_another_config_have_states_of_their_own(tmp_path, prompts):
    """Such as another rope_theta, of which no weight tells."""
    cache = StateCache(tmp_path, torch.float32)
    for theta in (10_000.0, 100.0):
        lm = make_lm(rope_theta=theta)
        probe = ProbeModel(config(), lm).eval()
        logits = predict_logits(probe, PromptDataset(prompts, LABELS))
        probe.set_backbone(None)
        cached = predict_logits(probe, cache.dataset(lm, probe.config, prompts, LABELS))
        torch.testing.assert_close(cached, logits, atol=1e-5, rtol=1e-5)
    lm = make_lm(use_cache=False)
    lm.config._name_or_path = "elsewhere"
    cache.dataset(lm, ProbeModel(config(), lm).config, prompts, LABELS)
    assert len(list(tmp_path.iterdir())) == 2, "a copy in another folder has the same states"


def test_what_a_killed_run_left_is_removed_and_nothing_of_a_living_one(tmp_path, prompts):
    lm = make_lm()
    head = ProbeModel(config(), lm).config

    def scratch():
        return {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}

    runs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
        )
        for _ in range(2)
    ]
    try:
        assert [run.stdout.readline() for run in runs] == ["at work\n"] * 2
        assert len(scratch()) == 2
        cache = StateCache(tmp_path)
        cache.dataset(lm, head, prompts, LABELS)
        assert len(scratch()) == 2, "both still live"
        runs[0].kill()
        runs[0].wait()
        assert len(scratch()) == 2
        cache.dataset(lm, head, prompts, LABELS)  # which is there already
        assert len(scratch()) == 1 and runs[1].poll() is None
        runs[1].kill()
        runs[1].wait()
        cache.dataset(lm, head, prompts, LABELS)
        assert not scratch() and len(list(tmp_path.iterdir())) == 1
    finally:
        for run in runs:
            run.kill()
            run.wait()
            run.stdout.close()


def test_what_was_killed_while_it_took_its_room_is_removed(tmp_path, prompts, monkeypatch):
    """Which takes long on a disk where each byte has to be written for it."""
    lm, killed = make_lm(), StateCache(tmp_path)
    head = ProbeModel(config(), lm).config

    def kill(file, size):
        file.truncate(size)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "_take_room", kill)
        killed.dataset(lm, head, prompts, LABELS)
    killed._reserved.close()  # as the end of its process does
    StateCache(tmp_path).dataset(lm, head, prompts, LABELS)
    assert not list(tmp_path.glob(".*"))


def test_two_runs_may_compute_the_same(tmp_path, prompts):
    lm, other = make_lm(), make_lm()
    head = ProbeModel(config(), lm).config
    found = []

    def overtake(*_):
        if not found:
            found.append(StateCache(tmp_path).dataset(other, head, prompts, LABELS))

    lm.model.layers[1].register_forward_pre_hook(overtake)
    slower = StateCache(tmp_path).dataset(lm, head, prompts, LABELS)
    assert torch.equal(slower[1]["hidden_states"], found[0][1]["hidden_states"])
    assert len(list(tmp_path.iterdir())) == 1


def test_values_too_large_are_refused(tmp_path, prompts):
    lm = make_lm()
    lm.model.norm.weight.data.fill_(1e6)
    with pytest.raises(ProbeError, match=r"too large for torch.float16; cache as bfloat16"):
        StateCache(tmp_path).dataset(lm, ProbeModel(config(), make_lm()).config, prompts, LABELS)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_foreseen(tmp_path, prompts, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(1, 1, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ProbeError, match="GB free"):
        StateCache(tmp_path).dataset(make_lm(), ProbeModel(config(), make_lm()).config, prompts, LABELS)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system takes no room before it is written")
def test_room_is_taken_before_the_work(tmp_path, prompts, monkeypatch):
    taken = []

    def noted(*args, **kwargs):
        (states,) = tmp_path.glob(".*/states.bin")
        taken.append(512 * states.stat().st_blocks >= states.stat().st_size > 0)
        return collect_hidden_states(*args, **kwargs)

    monkeypatch.setattr(features, "collect_hidden_states", noted)
    head = ProbeModel(config(), make_lm()).config
    StateCache(tmp_path).dataset(make_lm(), head, prompts, LABELS)
    assert taken and all(taken)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ProbeError, match="GB free"):
        StateCache(tmp_path / "other").dataset(make_lm(), head, prompts, LABELS)
    assert not list((tmp_path / "other").iterdir())


def test_each_prompt_has_a_label_and_a_mask():
    with pytest.raises(ProbeError, match="2 labels for 3 prompts: give one for each"):
        PromptDataset([[1], [2], [3]], np.zeros(2, dtype=int))
    with pytest.raises(ProbeError, match="1 masks for 2 prompts"):
        PromptDataset([[1], [2]], np.zeros(2, dtype=int), [[True]])


def test_no_prompt_may_be_empty(tmp_path):
    with pytest.raises(ProbeError, match="no token that a head reads"):
        StateCache(tmp_path).dataset(make_lm(), ProbeModel(config(), make_lm()).config, [PREFIX], LABELS[:1])
