"""Metrics beside scikit-learn, calibration, and reports by slice."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from llama_probe import ProbeConfig, ProbeError
from llama_probe.evaluation.calibration import best_f1_threshold, calibrate, fit_temperature
from llama_probe.evaluation.metrics import (
    ProbeMetric,
    check_metric,
    compute_metrics,
    confusion,
    default_metric,
    label_scores,
    outcomes,
    score,
    score_logits,
)
from llama_probe.evaluation.report import report
from llama_probe.heads.decision import probabilities


def config(**changes):
    return ProbeConfig(probe_type="gate", **changes)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_two_labels(rng):
    scores, truth = rng.random(200), rng.integers(0, 2, 200)
    probs = np.stack([1 - scores, scores], axis=1).astype(np.float32)
    found = ProbeMetric(config(threshold=0.3)).compute(predictions=np.log(probs), references=truth)
    assert found["f1"] == pytest.approx(f1_score(truth, probs[:, 1] >= 0.3))
    assert found["auprc"] == pytest.approx(average_precision_score(truth, probs[:, 1]))
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, probs[:, 1]))
    assert found["accuracy"] == pytest.approx(np.mean((probs[:, 1] >= 0.3) == truth))


def test_more_labels(rng):
    probs, truth = rng.dirichlet(np.ones(4), 100), rng.integers(0, 3, 100)  # label 3 never occurs
    found = ProbeMetric(config(num_labels=4)).compute(predictions=np.log(probs).astype(np.float32), references=truth)
    assert found["accuracy"] == pytest.approx(np.mean(probs.argmax(1) == truth))
    assert found["f1"] == pytest.approx(
        f1_score(truth, probs.argmax(1), average="macro", labels=range(4), zero_division=0)
    )
    assert found["auroc"] == pytest.approx(
        np.mean([roc_auc_score(truth == c, probs[:, c]) for c in range(3)]), abs=1e-6
    )


def test_several_at_once_and_values(rng):
    probs, truth = rng.random((50, 3)), rng.integers(0, 2, (50, 3))
    several = config(num_labels=3, problem_type="multi_label_classification")
    found = ProbeMetric(several).compute(
        predictions=np.log(probs / (1 - probs)).astype(np.float32), references=truth.astype(np.float32)
    )
    assert found["f1"] == pytest.approx(f1_score(truth, probs >= 0.5, average="macro"))
    values = config(num_labels=1, problem_type="regression")
    found = ProbeMetric(values).compute(predictions=[[1.0], [2.0]], references=[[1.0], [4.0]])
    assert found == {"mse": 2.0, "mae": 1.0, "r2": pytest.approx(1 - 4 / 4.5)}


def test_the_trainers_callback_applies_the_temperature(rng):
    class Evaluated:
        predictions = rng.normal(size=(40, 2)).astype(np.float32)
        label_ids = rng.integers(0, 2, 40)

    head = config(temperature=3.0, threshold=0.55)
    found = compute_metrics(head)(Evaluated)
    probs = (torch.from_numpy(Evaluated.predictions) / 3).softmax(-1)[:, 1].numpy()
    assert found["f1"] == pytest.approx(f1_score(Evaluated.label_ids, probs >= 0.55))


def test_the_trainers_callback_ranks_as_a_report_does():
    class Evaluated:
        predictions = np.array([[0, 25], [0, 18], [0, 22], [0, -3]], dtype=np.float32)  # p of three is 1 in float32
        label_ids = np.array([1, 0, 1, 0])

    found = compute_metrics(config())(Evaluated)
    assert found["auprc"] == found["auroc"] == 1.0
    assert found == score_logits(torch.from_numpy(Evaluated.predictions), Evaluated.label_ids, config())


def test_the_trainers_callback_takes_one_value_a_row():
    class Evaluated:
        predictions = np.array([[1.0], [2.0]], dtype=np.float32)
        label_ids = np.array([1.0, 4.0], dtype=np.float32)

    found = compute_metrics(config(num_labels=1, problem_type="regression"))(Evaluated)
    assert found == {"mse": 2.0, "mae": 1.0, "r2": pytest.approx(1 - 4 / 4.5)}


def test_what_a_head_is_chosen_by():
    assert default_metric(config()) == "auprc"
    assert default_metric(config(num_labels=3)) == "accuracy"
    assert default_metric(config(num_labels=3, problem_type="multi_label_classification")) == "auprc"
    assert default_metric(config(num_labels=1, problem_type="regression")) == "r2"


def test_temperature_undoes_a_scale():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator) * 2
    truth = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    assert fit_temperature(logits, truth, config(num_labels=3)) == pytest.approx(1.0, abs=0.1)
    assert fit_temperature(logits * 5, truth, config(num_labels=3)) == pytest.approx(5.0, abs=0.5)


def test_the_threshold_has_the_best_f1(rng):
    truth = rng.integers(0, 2, 300)
    scores = np.clip(truth * 0.3 + rng.random(300) * 0.7, 0, 1)
    found = f1_score(truth, scores >= best_f1_threshold(scores, truth))
    assert found == pytest.approx(max(f1_score(truth, scores >= t) for t in scores))
    assert best_f1_threshold(np.array([0.2, 0.8]), np.array([0, 1])) == pytest.approx(0.5)


def test_calibrate_sets_what_the_problem_has():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 2, generator=generator)
    two = calibrate(config(), logits, torch.randint(0, 2, (60,), generator=generator))
    assert isinstance(two.threshold, float)
    several = config(problem_type="multi_label_classification")
    on = torch.randint(0, 2, (60, 2), generator=generator)
    on[:, 1] = 0
    assert calibrate(several, logits, on).threshold[1] == 0.5
    three = calibrate(config(num_labels=3), torch.randn(60, 3), torch.randint(0, 3, (60,)))
    assert three.threshold is None and three.temperature != 1.0
    values = config(num_labels=1, problem_type="regression")
    assert calibrate(values, torch.randn(5, 1), torch.randn(5, 1)) == values


def test_reports_by_slice():
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = report(config(), logits, np.array([1, 0, 0, 0]), {"who": [True, True, False, False]})
    assert found["rows"] == 4 and found["accuracy"] == 0.75
    assert found["slices"]["who"]["True"]["accuracy"] == 1.0 and found["slices"]["who"]["False"]["accuracy"] == 0.5
    assert found["slices"]["who"]["False"]["auprc"] is None, "without a positive row there is no AUPRC"
    assert probabilities(logits, config()).shape == (4, 2)


def test_each_label_against_the_others(rng):
    probs, truth = rng.dirichlet(np.ones(3), 80).astype(np.float32), rng.integers(0, 3, 80)
    found = label_scores(probs, truth, config(id2label={0: "a", 1: "b", 2: "c"}))
    given = probs.argmax(axis=1)
    for index, name in enumerate("abc"):
        expected = {
            "rows": (truth == index).sum(),
            "f1": f1_score(truth == index, given == index),
            "precision": precision_score(truth == index, given == index),
            "recall": recall_score(truth == index, given == index),
            "auprc": average_precision_score(truth == index, probs[:, index]),
            "auroc": roc_auc_score(truth == index, probs[:, index]),
        }
        assert found[name] == pytest.approx(expected)
    matrix = confusion(probs, truth, config(num_labels=3))
    assert all(matrix[t][g] == ((truth == t) & (given == g)).sum() for t in range(3) for g in range(3))


def test_labels_by_hand():
    probs = np.array([[0.3, 0.7], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
    head = config(id2label={0: "no", 1: "yes"}, threshold=0.35)
    found = label_scores(probs, np.array([1, 0, 0, 0]), head)
    assert (found["yes"]["rows"], found["yes"]["precision"], found["yes"]["recall"]) == (1, pytest.approx(1 / 3), 1.0)
    assert (found["no"]["rows"], found["no"]["precision"], found["no"]["recall"]) == (3, 1.0, pytest.approx(1 / 3))
    assert found["yes"]["auprc"] == 0.5 and found["yes"]["auroc"] == pytest.approx(2 / 3) == found["no"]["auroc"]
    assert confusion(probs, np.array([1, 0, 0, 0]), head) == [[1, 2], [0, 1]]
    several = config(num_labels=2, problem_type="multi_label_classification", threshold=[0.25, 0.75])
    found = label_scores(probs, np.array([[1.0, 0], [0, 0], [0, 0], [0, 0]]), several)
    assert found["LABEL_0"] == pytest.approx(
        {"rows": 1, "f1": 0.5, "precision": 1 / 3, "recall": 1.0, "auprc": 1 / 3, "auroc": 1 / 3}
    )
    assert outcomes(probs, np.array([[1.0, 0], [0, 1], [0, 0], [0, 0]]), several) == {
        "LABEL_0": {"found": 1, "missed": 0, "wrong": 2},
        "LABEL_1": {"found": 0, "missed": 1, "wrong": 1},
    }
    assert found["LABEL_1"] == {"rows": 0, "f1": 0.0, "precision": 0.0, "recall": 0.0, "auprc": None, "auroc": None}


def test_one_label_that_holds_or_not():
    head = config(num_labels=1, problem_type="multi_label_classification")
    probs, labels = np.array([[0.9], [0.2], [0.8], [0.1]], dtype=np.float32), np.array([[1], [0], [0], [0]])
    found = score(probs, labels, head)
    assert (found["precision"], found["recall"], found["f1"]) == (0.5, 1.0, pytest.approx(2 / 3))
    assert found["accuracy"] == 0.75 and found["auprc"] == 1.0


def test_a_mean_is_over_the_labels_that_occur():
    """A slice or a small file may lack some: what is right in every row has an F1 of 1."""
    config = ProbeConfig(probe_type="gate", num_labels=4)
    probs = np.eye(4)[[0, 2, 2]]
    assert score(probs, np.array([0, 2, 2]), config)["f1"] == 1.0
    assert score(probs, np.array([0, 2, 3]), config)["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    several = ProbeConfig(probe_type="gate", num_labels=3, problem_type="multi_label_classification")
    given = np.array([[0.9, 0.1, 0.1], [0.9, 0.9, 0.1]])
    assert score(given, np.array([[1, 0, 0], [1, 1, 0]]), several)["f1"] == 1.0
    assert score(given * 0, np.zeros((2, 3)), several)["f1"] == 0.0
    value = ProbeConfig(probe_type="gate", num_labels=1, problem_type="regression")
    assert score(np.array([[1.0]]), np.array([[2.0]]), value) == {"mse": 1.0, "mae": 1.0, "r2": None}


@pytest.mark.parametrize("labels", [[[2.0]], [[2.0], [2.0], [2.0]]])
def test_values_that_are_all_the_same_choose_no_head(labels):
    value = ProbeConfig(probe_type="gate", num_labels=1, problem_type="regression")
    labels = np.array(labels, dtype=np.float32)
    assert score(labels + 1, labels, value)["r2"] is None
    with pytest.raises(ProbeError, match=rf"'r2' is not defined on the {len(labels)} validation rows"):
        check_metric("r2", labels, value)
    check_metric("r2", np.array([[2.0], [3.0]]), value)
