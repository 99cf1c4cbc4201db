"""Novelty fitted on rows, measured against other texts, and compared with a log."""

import numpy as np
import pytest
import torch
from cases import with_backbone
from conftest import make_lm
from sklearn.metrics import roc_auc_score

from llama_probe.data.cached_states import PromptDataset, StateCache
from llama_probe.evaluation.novelty_fit import against_others, compare_log, fit_novelty
from llama_probe.evaluation.plots import drift_plot
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
    assert facts["rows"] == {"train": 120, "validation": 60} and sum(facts["labels"].values()) == pytest.approx(1)
    assert set(facts["scores"]) == {"LABEL_0", "LABEL_1"} and len(facts["scores"]["LABEL_0"]) == 11
    cache = StateCache(tmp_path, torch.float32)
    cached = [cache.dataset(same.backbone, same.config, rows) for rows in (train, held)]
    same.set_backbone(None)
    assert fit_novelty(same, *cached)["scores"].keys() == facts["scores"].keys()
    logits, novelty, _ = predict_rows(probe, own)
    torch.testing.assert_close(logits, predict_logits(probe, own))
    far = predict_rows(probe, other)[1]
    measured = against_others(novelty, {"other": far}, resamples=50)
    auroc = roc_auc_score(np.repeat([0, 1], [60, 60]), torch.cat([novelty, far]))
    part = measured["against"]["other"]
    assert part["auroc"] == pytest.approx(auroc) and auroc > 0.75 and part["rows"] == 60
    assert part["interval"][0] <= auroc <= part["interval"][1] and part["far"] > measured["own"]["far"]
    same.set_backbone(make_lm())
    torch.testing.assert_close(predict_rows(same, own)[1], novelty, atol=1e-3, rtol=0)


def test_a_log_is_compared():
    probe = with_backbone(**HEAD, id2label={0: "no", 1: "yes"})
    reference = fit_novelty(probe, dataset(120, 0), dataset(100, 1))
    alike = compare_log(probe.config, reference, *predict_rows(probe, dataset(100, 2))[:2], top=5)
    other = compare_log(probe.config, reference, *predict_rows(probe, dataset(100, 3, 50, 90))[:2], top=5)
    assert alike["novelty"]["far"] < 0.1 < other["novelty"]["far"]
    assert alike["novelty"]["median"] < other["novelty"]["median"]
    assert set(alike["labels"]) == {"no", "yes"} and not alike["labels"]["yes"]["changed"]
    later = probe.config.replace(threshold=0.999, flagged=["yes"])
    logits, novelty, _ = predict_rows(probe, dataset(100, 2))
    assert compare_log(later, reference, logits, novelty, top=5) == alike, "shares are those at the threshold of then"
    guard = with_backbone(**HEAD, id2label={0: "no", 1: "yes"}, flagged=["yes"], threshold=0.3)
    guarded = fit_novelty(guard, dataset(120, 0), dataset(100, 1))
    before, after = (
        compare_log(guard.config.replace(flagged=[name]), guarded, logits, novelty) for name in ("yes", "no")
    )
    assert before == after, "and of the label that was flagged then"
    old = {name: value for name, value in reference.items() if name != "threshold"}
    assert "labels" not in compare_log(later.replace(thresholds={"fpr-1%": 0.999}), old, logits, novelty)
    renamed = compare_log(probe.config.replace(id2label={0: "no", 1: "oh"}), reference, logits, novelty)
    assert list(renamed["labels"]) == ["no"] and "expected" not in renamed["scores"]["oh"]
    unread = torch.cat([logits[:2], logits]), torch.cat([torch.tensor([torch.nan] * 2), novelty])
    log = compare_log(probe.config, reference, *unread, top=5)
    assert against_others(unread[1], {"log": unread[1]}, 0)["own"] == against_others(novelty, {}, 0)["own"]
    figures = (drift_plot(probe.config, *rows, reference) for rows in (unread, (logits, novelty)))
    assert len({tuple(figure.axes[0].lines[0].get_ydata()) for figure in figures}) == 1
    assert [row["row"] - 2 for row in log["worth_labelling"]] == [row["row"] for row in alike["worth_labelling"]]
    assert log["rows"] == 100 and log["novelty"] == alike["novelty"]
    worth = [row["novelty"] + row["unsure"] for row in other["worth_labelling"]]
    assert len(worth) == 5 and worth == sorted(worth, reverse=True)


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


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_a_log_of_other_heads(kind):
    probe, rows = with_backbone(**HEAD, problem_type=kind, num_labels=2), dataset(50, 0)
    log = compare_log(probe.config, fit_novelty(probe, rows, dataset(50, 1)), *predict_rows(probe, rows)[:2])
    assert log["rows"] == 50 and ("labels" in log) == (kind != "regression")
