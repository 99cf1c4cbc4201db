"""Metrics beside scikit-learn, and cases known by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from llama_probe import ProbeConfig, ProbeError
from llama_probe.evaluation.calibration import best_f1_threshold, calibrate, threshold_table
from llama_probe.evaluation.metrics import (
    check_metric,
    compute_metrics,
    confusion,
    default_metric,
    label_scores,
    outcomes,
    score_logits,
    summarize,
)
from llama_probe.evaluation.report import detailed_report
from llama_probe.heads.decision import probabilities


MULTI = {"problem_type": "multi_label_classification"}
REGRESSION = {"num_labels": 1, "problem_type": "regression"}


def config(**changes):
    return ProbeConfig(probe_type="gate", **changes)


@pytest.mark.parametrize(
    "head, logits, labels",
    [
        (config(), [[0, 25], [0, 18], [0, 22], [0, -3]], [1, 0, 1, 0]),  # three probabilities are 1 in float32
        (config(num_labels=2, **MULTI), [[3, 25], [0, -18]], [[1, 1], [0, 0]]),
        (config(**REGRESSION), [[1], [2]], [1, 4]),
    ],
)
def test_the_trainers_callback_gives_the_numbers_of_a_report(head, logits, labels):
    evaluated = SimpleNamespace(predictions=np.array(logits, np.float32), label_ids=np.array(labels))
    truth = evaluated.label_ids.reshape(len(labels), -1) if head.num_labels == 1 else evaluated.label_ids
    expected = score_logits(torch.from_numpy(evaluated.predictions), truth, head)
    assert compute_metrics(head)(evaluated) == pytest.approx(expected)
    assert expected.get("auroc", 1.0) == 1.0 and expected.get("mse", 2.0) == 2.0


def test_each_label_against_the_others_and_their_means():
    rng = np.random.default_rng(0)
    logits, truth = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)), rng.integers(0, 3, 100)
    head, given = config(id2label=dict(enumerate("abcd"))), logits.argmax(dim=1).numpy()  # label d never occurs
    parts, probs = label_scores(logits, truth, head), logits.softmax(dim=1)
    for index, name in enumerate("abc"):
        assert parts[name] == pytest.approx(
            {
                "rows": (truth == index).sum(),
                "f1": f1_score(truth == index, given == index),
                "precision": precision_score(truth == index, given == index),
                "recall": recall_score(truth == index, given == index),
                "auprc": average_precision_score(truth == index, probs[:, index]),
                "auroc": roc_auc_score(truth == index, probs[:, index]),
            }
        )
    found, matrix = score_logits(logits, truth, head), confusion(logits, truth, head)
    assert found["accuracy"] == pytest.approx(np.mean(given == truth))
    assert found["f1"] == pytest.approx(f1_score(truth, given, average="macro", labels=range(4), zero_division=0))
    assert found["auroc"] == pytest.approx(np.mean([parts[name]["auroc"] for name in "abc"]))
    assert all(matrix[t][g] == ((truth == t) & (given == g)).sum() for t in range(4) for g in range(4))


def test_a_label_counts_on_the_rows_where_it_is_known():
    rng = np.random.default_rng(0)
    head, logits = config(num_labels=2, **MULTI), torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    labels = rng.integers(0, 2, (80, 2)).astype(np.float32)
    labels[:30, 0], labels[50:, 1] = np.nan, np.nan
    one = config(num_labels=1, **MULTI)
    apart = [(logits[30:, :1], labels[30:, :1]), (logits[:50, 1:], labels[:50, 1:])]
    expected = [label_scores(*part, one)["LABEL_0"] for part in apart]
    assert label_scores(logits, labels, head) == dict(zip(head.id2label.values(), expected, strict=True))
    report, calibrated = detailed_report(head, logits, labels), calibrate(head, logits, torch.tensor(labels))
    assert report["auroc"] == pytest.approx(np.mean([part["auroc"] for part in expected]))
    low, high = report["labels"]["LABEL_1"]["intervals"]["auroc"]
    assert low < expected[1]["auroc"] < high
    for index, part in enumerate(apart):
        warm = one.replace(temperature=calibrated.temperature)
        alone = best_f1_threshold(probabilities(part[0], warm)[:, 0].numpy(), part[1][:, 0])
        assert calibrate(head, logits, torch.tensor(labels), None, "best-f1").threshold[index] == pytest.approx(alone)
        assert threshold_table(logits, labels, head)[f"LABEL_{index}"] == threshold_table(*part, one)["LABEL_0"]
    assert sum(each["rows"] for each in report["calibration"]["bins"]) == 100


def test_labels_by_hand():
    probs = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    assert confusion(probs.log(), np.array([1, 0, 0, 0]), config(threshold=0.35)) == [[1, 2], [0, 1]]
    several = config(num_labels=2, threshold=[0.25, 0.75], **MULTI)
    found = label_scores(probs.logit(), np.array([[1.0, 0], [0, 0], [0, 0], [0, 0]]), several)
    assert found == {
        "LABEL_0": pytest.approx(
            {"rows": 1, "f1": 0.5, "precision": 1 / 3, "recall": 1.0, "auprc": 1 / 3, "auroc": 1 / 3}
        ),
        "LABEL_1": {"rows": 0, "f1": 0.0, "precision": 0.0, "recall": 0.0, "auprc": None, "auroc": None},
    }
    assert outcomes(probs.logit(), np.array([[1.0, 0], [0, 1], [0, 0], [0, 0]]), several) == {
        "LABEL_0": {"found": 1, "missed": 0, "wrong": 2},
        "LABEL_1": {"found": 0, "missed": 1, "wrong": 1},
    }


def test_a_mean_is_over_the_labels_that_occur():
    """A slice or a small file may lack some. If each row is right, F1 is 1."""
    four, logits = config(num_labels=4), torch.eye(4)[[0, 2, 2]]
    assert score_logits(logits, np.array([0, 2, 2]), four)["f1"] == 1.0
    assert score_logits(logits, np.array([0, 2, 3]), four)["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    several, logits = config(num_labels=3, **MULTI), torch.tensor([[1.0, -1, -1], [1, 1, -1]])
    assert score_logits(logits, np.array([[1, 0, 0], [1, 1, 0]]), several)["f1"] == 1.0
    nothing = score_logits(logits - 9, np.zeros((2, 3)), several)
    assert nothing["f1"] == 0.0 and nothing["auprc"] is None


@pytest.mark.parametrize(
    "changes, metric",
    [({}, "auprc"), ({"num_labels": 3}, "accuracy"), ({"num_labels": 3, **MULTI}, "auprc"), (REGRESSION, "r2")],
)
def test_what_a_head_is_chosen_by(changes, metric):
    head = config(**changes)
    assert default_metric(head) == metric
    labels = np.arange(6).reshape(-1, 1) % 2 if changes == REGRESSION else np.arange(6) % head.num_labels
    labels = np.eye(3)[labels] if head.problem_type == MULTI["problem_type"] else labels
    check_metric(metric, labels, head)
    with pytest.raises(ProbeError, match="metric='loss'"):
        check_metric("loss", labels, head)
    if metric != "accuracy":  # of rows that are all alike it has no value
        with pytest.raises(ProbeError, match=f"{metric} is not defined"):
            check_metric(metric, labels * 0, head)


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ProbeError, match="no number"):
        score_logits(torch.tensor([[0.5, float("nan")]]), np.array([1]), config())


def test_a_summary_has_the_shape_of_a_report():
    reports = [{"rows": 3, "f1": f1, "auprc": None, "slices": {"a": {"x": {"f1": 1.0}}}} for f1 in (0.4, 0.6, 0.8)]
    found, one = summarize(reports), {"mean": 1, "std": 0}
    assert found.pop("f1") == pytest.approx({"mean": 0.6, "std": 0.2})
    assert found == {"rows": 3, "auprc": None, "slices": {"a": {"x": {"f1": one}}}}
    assert summarize(reports[:1])["f1"] == {"mean": 0.4, "std": 0.0}
