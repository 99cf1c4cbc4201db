"""Novelty fitted on rows, measured against other texts, and compared with a log."""

import numpy as np
import pytest
import torch
from conftest import make_lm, make_probe
from sklearn.metrics import roc_auc_score

from llama_probe import ProbeError
from llama_probe.data.cached_states import PromptDataset, StateCache
from llama_probe.evaluation.novelty_fit import against_others, can_fit, compare_log, fit_novelty
from llama_probe.evaluation.prediction import predict_logits, predict_rows


def prompts(rows, low, high, seed):
    """Prompts of ids from `low` to `high`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, rng.integers(4, 20)).tolist() for _ in range(rows)]


def with_backbone(**changes):
    probe = make_probe(**{"probe_type": "gate", "layers": [0, 1, 2, 4], **changes})
    probe.set_backbone(make_lm())
    return probe


def dataset(rows):
    return PromptDataset(rows, np.zeros(len(rows)))


def test_other_prompts_are_told_apart_from_cached_states_as_from_prompts(tmp_path):
    probe, same = with_backbone(), with_backbone()
    train, held, own = (prompts(n, 3, 40, i) for i, n in enumerate((120, 60, 60)))
    other = prompts(60, 50, 90, 4)
    facts = fit_novelty(probe, dataset(train), dataset(held))
    assert facts["rows"] == {"train": 120, "validation": 60} and sum(facts["labels"].values()) == pytest.approx(1)
    assert set(facts["scores"]) == {"LABEL_0", "LABEL_1"} and len(facts["scores"]["LABEL_0"]) == 11
    cache = StateCache(tmp_path, torch.float32)
    cached = [cache.dataset(same.backbone, same.config, dataset(rows)) for rows in (train, held)]
    same.set_backbone(None)
    assert fit_novelty(same, *cached)["scores"].keys() == facts["scores"].keys()
    logits, novelty = predict_rows(probe, dataset(own))
    torch.testing.assert_close(logits, predict_logits(probe, dataset(own)))
    far = predict_rows(probe, dataset(other))[1]
    found = against_others(novelty, {"other": far}, resamples=50)
    truth = np.repeat([0, 1], [60, 60])
    auroc = roc_auc_score(truth, torch.cat([novelty, far]))
    part = found["against"]["other"]
    assert part["auroc"] == pytest.approx(auroc) and auroc > 0.75 and part["rows"] == 60
    assert part["interval"][0] <= auroc <= part["interval"][1] and part["far"] > found["own"]["far"]
    same.set_backbone(make_lm())
    torch.testing.assert_close(predict_rows(same, dataset(own))[1], novelty, atol=1e-3, rtol=0)


def test_too_few_rows_and_heads_that_cannot(tmp_path):
    probe, few, many = with_backbone(), dataset(prompts(9, 3, 40, 0)), dataset(prompts(60, 3, 40, 0))
    assert can_fit(probe.config, many, many) and not can_fit(probe.config, many, few)
    with pytest.raises(ProbeError, match="validation rows, not 9"):
        fit_novelty(probe, many, few)
    assert not can_fit(make_probe(token_scope="all").config, many, many)
    assert predict_rows(probe, few)[1] is None


def test_a_log_is_compared():
    probe = with_backbone(id2label={0: "no", 1: "yes"})
    reference = fit_novelty(probe, dataset(prompts(120, 3, 40, 0)), dataset(prompts(100, 3, 40, 1)))
    alike = compare_log(probe.config, reference, *predict_rows(probe, dataset(prompts(100, 3, 40, 2))), top=5)
    other = compare_log(probe.config, reference, *predict_rows(probe, dataset(prompts(100, 50, 90, 3))), top=5)
    assert alike["novelty"]["far"] < 0.1 < other["novelty"]["far"]
    assert alike["novelty"]["median"] < other["novelty"]["median"]
    assert set(alike["labels"]) == {"no", "yes"} and not alike["labels"]["yes"]["changed"]
    worth = [row["novelty"] + row["unsure"] for row in other["worth_labelling"]]
    assert len(worth) == 5 and worth == sorted(worth, reverse=True)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_a_log_of_other_heads(kind):
    probe = with_backbone(problem_type=kind, num_labels=2)
    rows = dataset(prompts(50, 3, 40, 0))
    reference = fit_novelty(probe, rows, dataset(prompts(50, 3, 40, 1)))
    found = compare_log(probe.config, reference, *predict_rows(probe, rows))
    assert found["rows"] == 50 and ("labels" in found) == (kind != "regression")
