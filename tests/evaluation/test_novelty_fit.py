"""Novelty fitted on rows, and measured against other texts."""

import numpy as np
import pytest
import torch
from cases import with_backbone
from conftest import make_lm
from sklearn.metrics import roc_auc_score

from llama_probe.data.disk_states import DiskStates
from llama_probe.data.prompts import PromptDataset
from llama_probe.evaluation.novelty_fit import against_others, fit_novelty
from llama_probe.evaluation.prediction import predict_logits, predict_rows
from llama_probe.training.measurements import _measure_part


HEAD = {"probe_type": "gate", "layers": [0, 1, 2, 4]}


def dataset(rows, seed, low=3, high=40):
    """Prompts of ids from `low` to `high`."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(low, high, rng.integers(4, 20)).tolist() for _ in range(rows)]
    return PromptDataset(prompts, np.zeros(rows))


def test_other_prompts_are_told_apart_from_cached_states_as_from_prompts(tmp_path):
    probe, same = with_backbone(**HEAD), with_backbone(**HEAD)
    train, held, own, other = dataset(120, 0), dataset(60, 1), dataset(60, 2), dataset(60, 4, 50, 90)
    facts = fit_novelty(probe, train, held)
    assert facts == {"rows": {"train": 120, "validation": 60}}
    cache = DiskStates(tmp_path, torch.float32)
    cached = [cache.dataset(same.backbone, same.config, rows) for rows in (train, held)]
    same.set_backbone(None)
    assert fit_novelty(same, *cached) == facts
    logits, novelty, _ = predict_rows(probe, own)
    torch.testing.assert_close(logits, predict_logits(probe, own))
    far = predict_rows(probe, other)[1]
    measured = against_others(novelty, {"other": far}, resamples=50)
    auroc = roc_auc_score(np.repeat([0, 1], [60, 60]), torch.cat([novelty, far]))
    part = measured["against"]["other"]
    assert part["auroc"] == pytest.approx(auroc) and auroc > 0.75 and part["rows"] == 60
    assert part["interval"][0] <= auroc <= part["interval"][1] and part["far"] > measured["own"]["far"]
    unread = torch.cat([novelty, torch.full((3,), torch.nan)])
    assert against_others(unread, {}, 0)["own"] == measured["own"], "rows without a number do not count"
    same.set_backbone(make_lm())
    torch.testing.assert_close(predict_rows(same, own)[1], novelty, atol=1e-3, rtol=0)


def test_chats_without_a_result_of_a_tool_are_not_flagged_and_do_not_count():
    markers = {role: {"ids": [ids], "skip": 0} for role, ids in (("user", 90), ("tool", 91), ("assistant", 92))}
    probe = with_backbone(**HEAD, token_scope="tool", turn_markers=markers, flagged=["LABEL_1"])
    parts = dataset(50, 0), dataset(50, 1), dataset(50, 4, 50, 90)
    *rows, far = [PromptDataset([[90, 5, 92, 91, *ids] for ids in part.prompts], part.labels) for part in parts]
    *more, further = [PromptDataset([*part.prompts, *[[90, 5, 6]] * 30], np.zeros(80)) for part in (*rows, far)]
    probs = predict_logits(probe, more[0]).softmax(-1)[:, 1]
    assert (probs[:50] > 0).all() and not probs[50:].any()
    facts, center = fit_novelty(probe, *rows), probe.novelty.center
    assert fit_novelty(probe, *more) == facts and torch.equal(probe.novelty.center, center)
    assert _measure_part(probe, further, further, None)["novel"] == _measure_part(probe, far, far, None)["novel"] > 0
