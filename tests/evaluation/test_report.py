"""Scoring a head on labelled rows."""

import numpy as np
import pytest
import torch
from conftest import LAYERS, make_lm, make_probe
from sklearn.metrics import average_precision_score, roc_auc_score

from llama_probe import ProbeError
from llama_probe.data.states import PromptDataset
from llama_probe.evaluation.bootstrap import intervals
from llama_probe.evaluation.calibration import reliability
from llama_probe.evaluation.report import detailed_report, inspect_head, predict_logits, report
from llama_probe.heads.decision import log_odds, probabilities


LABELS = np.array([0, 1, 1, 0, 1])


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    return PromptDataset([torch.randint(3, 97, (n,), generator=generator).tolist() for n in (7, 3, 9, 5, 3)], LABELS)


def with_backbone(**changes):
    probe = make_probe(**changes)
    probe.set_backbone(make_lm())
    return probe


def test_rows_come_back_in_their_order(dataset):
    probe = with_backbone()
    together = predict_logits(probe, dataset, batch_tokens=14)
    for row, ids in enumerate(dataset.prompts):
        alone = probe(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


def test_tokens_bound_a_batch(dataset):
    probe, seen = with_backbone(), []
    probe.register_forward_pre_hook(
        lambda _, args, batch: seen.append(tuple(batch["attention_mask"].shape)), with_kwargs=True
    )
    predict_logits(probe, dataset, batch_tokens=8)
    assert seen == [(1, 9), (1, 7), (1, 5), (2, 3)]  # a row that is longer goes alone
    seen.clear()
    inspect_head(probe, dataset, LABELS, batch_tokens=14)
    assert seen == [(1, 9), (2, 7), (2, 3)]


@pytest.mark.parametrize("kind", ["pooling", "gate", "mha"])
def test_layer_weights_by_label(dataset, kind):
    probe = with_backbone(probe_type=kind, layers=[0, 2, LAYERS], id2label={0: "no", 1: "yes"})
    found = inspect_head(probe, dataset, LABELS, batch_tokens=14)
    assert found["layer_weights"]["layers"] == [0, 2, LAYERS]
    for label, index in (("no", 0), ("yes", 1)):
        rows = [torch.tensor([dataset.prompts[row]]) for row in np.flatnonzero(index == LABELS)]
        expected = torch.cat([probe(input_ids=ids, output_attentions=True).layer_weights for ids in rows]).mean(dim=0)
        assert found["layer_weights"]["by_label"][label] == pytest.approx(expected.tolist(), abs=1e-4)
        assert sum(found["layer_weights"]["by_label"][label]) == pytest.approx(1, abs=1e-3)
    assert set(found["thresholds"]) == {"yes"} and found["calibration"]["bins"]
    assert [sum(row) for row in found["confusion"]] == [(index == LABELS).sum() for index in range(2)]


def test_what_has_no_meaning_is_left_out(dataset):
    three = inspect_head(with_backbone(num_labels=3), dataset, LABELS)
    assert (
        "thresholds" not in three
        and "calibration" in three
        and set(three["layer_weights"]["by_label"]) == {"LABEL_0", "LABEL_1"}
    )
    score = inspect_head(with_backbone(num_labels=1, problem_type="regression"), dataset, LABELS.astype(float))
    assert set(score) == {"layer_weights"} and list(score["layer_weights"]["by_label"]) == ["LABEL_0"]
    labels = np.eye(2)[LABELS]
    several = inspect_head(with_backbone(problem_type="multi_label_classification"), dataset, labels)
    assert set(several["thresholds"]) == {"LABEL_0", "LABEL_1"}
    assert "confusion" not in several and "outcomes" not in three, "one or the other"
    for index, part in enumerate(several["outcomes"].values()):
        assert part["found"] + part["missed"] == labels[:, index].sum()


def scored(rows: int = 60, seed: int = 0, **changes):
    """Config, logits and labels of a head that is often right."""
    config = make_probe(**changes).config
    rng = np.random.default_rng(seed)
    shape = (rows, config.num_labels)
    if config.problem_type == "single_label_classification":
        labels = rng.integers(0, config.num_labels, rows)
        target = np.eye(config.num_labels)[labels]
    else:
        labels = target = (rng.random(shape) < 0.4).astype(float)
    return config, torch.from_numpy(target * 2 + rng.normal(size=shape)).float(), labels


def holds(interval, value) -> bool:
    return interval[0] <= value <= interval[1]


def test_a_detailed_report_of_two_labels():
    config, logits, labels = scored(id2label={0: "no", 1: "yes"}, threshold=0.4, temperature=1.5)
    slices = {"half": np.arange(60) % 2}
    found = detailed_report(config, logits, labels, slices, resamples=200)
    plain = report(config, logits, labels, slices)
    assert {key: found[key] for key in plain if key != "slices"} == {k: v for k, v in plain.items() if k != "slices"}
    assert found["bootstrap"] == {"resamples": 200, "seed": 0, "level": 0.95}
    metrics = ["accuracy", "f1", "precision", "recall", "auprc", "auroc"]
    for part in (found, *found["slices"]["half"].values()):
        assert list(part["intervals"]) == metrics
        assert all(holds(part["intervals"][metric], part[metric]) for metric in metrics)
    for value, part in plain["slices"]["half"].items():
        assert {**found["slices"]["half"][value], "intervals": None} == {**part, "intervals": None}
    assert list(found["labels"]) == ["no", "yes"]
    yes, no = found["labels"]["yes"], found["labels"]["no"]
    assert yes["rows"] + no["rows"] == 60 and yes["rows"] == labels.sum()
    assert all(yes[metric] == pytest.approx(found[metric]) for metric in metrics[1:]), (
        "label 1 is what the head is for"
    )
    assert all(yes["intervals"][metric] == pytest.approx(found["intervals"][metric]) for metric in metrics[1:])
    assert holds(no["intervals"]["recall"], no["recall"]) and no["recall"] != yes["recall"]
    assert np.sum(found["confusion"]) == 60 and np.trace(found["confusion"]) == found["accuracy"] * 60
    assert found["confusion"][1][1] == yes["recall"] * yes["rows"]


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_low_temperature_changes_no_ranking(num_labels):
    """Rows whose probability is 1 to float32's precision are still told apart by how far beyond it they are."""
    config, logits, labels = scored(num_labels=num_labels)
    sharp = config.replace(temperature=0.05, threshold=None)
    assert (probabilities(10 * logits, sharp).amax(dim=1) == 1).float().mean() > 0.8
    found = detailed_report(sharp, 10 * logits, labels, {"half": np.arange(60) % 2}, resamples=50)
    odds = log_odds(10 * logits, sharp)[:, 1].numpy()
    part = found["labels"][config.id2label[1]]
    assert part["auprc"] == pytest.approx(average_precision_score(labels == 1, odds))
    assert part["auroc"] == pytest.approx(roc_auc_score(labels == 1, odds))
    low, high = part["intervals"]["auroc"]
    assert low <= part["auroc"] <= high
    if num_labels == 2:
        plain = detailed_report(config, logits, labels, {"half": np.arange(60) % 2}, resamples=50)
        for metric in ("auprc", "auroc"):
            assert found[metric] == pytest.approx(plain[metric])
            assert found["intervals"][metric] == pytest.approx(plain["intervals"][metric])
            for value in "01":
                assert found["slices"]["half"][value][metric] == pytest.approx(plain["slices"]["half"][value][metric])


def test_calibration_errors_and_their_intervals():
    names = ("error", "error_uncalibrated")
    for config, logits, labels in (
        scored(temperature=3.0),
        scored(num_labels=3, temperature=0.5),
        scored(num_labels=3, problem_type="multi_label_classification", temperature=2.0),
    ):
        found = detailed_report(config, logits, labels, resamples=50, seed=4)["calibration"]
        plain = reliability(logits, labels, config)
        assert {key: found[key] for key in plain} == plain

        def error(weights, key, config=config, logits=logits, labels=labels):
            rows = [np.repeat(np.arange(60), w.astype(int)) for w in weights]
            return np.array([reliability(logits[r], labels[r], config)[key] for r in rows])

        expected = intervals([lambda weights: {name: error(weights, name) for name in names}], 60, 50, seed=4)
        for name in names:
            assert found["intervals"][name] == pytest.approx(expected[name], abs=6e-5), "`reliability` rounds it"
        assert found["error"] != found["error_uncalibrated"]


def test_what_a_detailed_report_holds_for_each_problem():
    many = detailed_report(*scored(num_labels=3), resamples=20)
    assert np.shape(many["confusion"]) == (3, 3) and len(many["labels"]) == 3
    several = detailed_report(*scored(num_labels=3, problem_type="multi_label_classification"), resamples=20)
    assert "confusion" not in several and len(several["labels"]) == 3 and several["calibration"]["intervals"]
    config, values, labels = scored(num_labels=1, problem_type="regression")
    regression = detailed_report(config, values, labels, {"half": np.arange(60) % 2}, resamples=20)
    assert set(regression) == {"rows", "mse", "mae", "r2", "bootstrap", "intervals", "slices"}
    assert set(regression["intervals"]) == {"mse", "mae", "r2"} == set(regression["slices"]["half"]["1"]["intervals"])
    assert holds(regression["intervals"]["mse"], regression["mse"])


def test_the_bootstrap_is_seeded_and_can_be_off():
    config, logits, labels = scored()
    first = detailed_report(config, logits, labels, resamples=30, seed=1)
    assert detailed_report(config, logits, labels, resamples=30, seed=1) == first
    assert detailed_report(config, logits, labels, resamples=30, seed=2)["intervals"] != first["intervals"]
    off = detailed_report(config, logits, labels, {"all": [0] * 60}, resamples=0)
    assert "bootstrap" not in off and "intervals" not in str(off) and off["labels"] and off["slices"]
    with pytest.raises(ProbeError, match="resamples=-1 must be 0"):
        detailed_report(config, logits, labels, resamples=-1)
