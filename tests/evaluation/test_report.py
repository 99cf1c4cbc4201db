"""Scores of a head on labelled rows."""

import numpy as np
import pytest
import torch
from conftest import LAYERS, make_lm, make_probe
from sklearn.metrics import average_precision_score, roc_auc_score

from llama_probe.data.cached_states import PromptDataset
from llama_probe.evaluation.report import detailed_report, inspect_head, report
from llama_probe.heads.decision import log_odds, probabilities


LABELS = np.array([0, 1, 1, 0, 1])
MULTI = {"problem_type": "multi_label_classification"}
REGRESSION = {"num_labels": 1, "problem_type": "regression"}
METRICS = ["accuracy", "f1", "precision", "recall", "auprc", "auroc"]


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    return PromptDataset([torch.randint(3, 97, (n,), generator=generator).tolist() for n in (7, 3, 9, 5, 3)], LABELS)


def with_backbone(**changes):
    probe = make_probe(**changes)
    probe.set_backbone(make_lm())
    return probe


@pytest.mark.parametrize("kind", ["pooling", "gate", "mha"])
def test_layer_weights_by_label(dataset, kind):
    probe = with_backbone(probe_type=kind, layers=[0, 2, LAYERS], id2label={0: "no", 1: "yes"}, flagged=["yes"])
    found = inspect_head(probe, dataset, LABELS, batch_tokens=14)
    assert found["layer_weights"]["layers"] == [0, 2, LAYERS]
    for index, weights in enumerate(found["layer_weights"]["by_label"].values()):
        rows = [torch.tensor([dataset.prompts[row]]) for row in np.flatnonzero(index == LABELS)]
        expected = torch.cat([probe(input_ids=ids, output_attentions=True).layer_weights for ids in rows]).mean(dim=0)
        assert weights == pytest.approx(expected.tolist(), abs=1e-4) and sum(weights) == pytest.approx(1, abs=1e-3)
    assert set(found["thresholds"]) == {"yes"} and found["calibration"]["bins"]
    assert [sum(row) for row in found["confusion"]] == [(index == LABELS).sum() for index in range(2)]


def test_an_inspection_holds_what_has_a_meaning(dataset):
    three = inspect_head(with_backbone(num_labels=3), dataset, LABELS)
    assert set(three) == {"layer_weights", "calibration", "confusion"}
    assert set(three["layer_weights"]["by_label"]) == {"LABEL_0", "LABEL_1"}, "label 2 does not occur"
    value = inspect_head(with_backbone(**REGRESSION), dataset, LABELS.astype(float))
    assert set(value) == {"layer_weights"} and list(value["layer_weights"]["by_label"]) == ["LABEL_0"]
    labels = np.eye(2)[LABELS]
    several = inspect_head(with_backbone(**MULTI), dataset, labels)
    assert set(several) == {"layer_weights", "calibration", "outcomes", "thresholds"}
    assert set(several["thresholds"]) == {"LABEL_0", "LABEL_1"}
    for index, part in enumerate(several["outcomes"].values()):
        assert part["found"] + part["missed"] == labels[:, index].sum()


def scored(rows: int = 60, seed: int = 0, **changes):
    """Return config, logits and labels of a head that is often right."""
    config = make_probe(**changes).config
    rng = np.random.default_rng(seed)
    shape = (rows, config.num_labels)
    if config.problem_type == "single_label_classification":
        labels = rng.integers(0, config.num_labels, rows)
        target = np.eye(config.num_labels)[labels]
    else:
        labels = target = (rng.random(shape) < 0.4).astype(float)
    return config, torch.from_numpy(target * 2 + rng.normal(size=shape)).float(), labels


def test_slices_are_reports_of_their_rows():
    config, logits, labels = scored()
    found = report(config, logits, labels, {"who": [True] * 10 + [False] * 50})
    for value, rows in (("True", slice(0, 10)), ("False", slice(10, 60))):
        assert found["slices"]["who"][value] == report(config, logits[rows], labels[rows])
    assert found["rows"] == 60 and found["slices"]["who"]["True"]["rows"] == 10


def test_a_detailed_report_of_two_labels():
    config, logits, labels = scored(id2label={0: "no", 1: "yes"}, threshold=0.4, temperature=1.5)
    slices = {"half": np.arange(60) % 2}
    found, plain = detailed_report(config, logits, labels, slices, 200), report(config, logits, labels, slices)
    assert found["bootstrap"] == {"resamples": 200, "seed": 0, "level": 0.95}
    for part in (found, *found["slices"]["half"].values()):
        assert list(part["intervals"]) == METRICS
        assert all(low <= part[name] <= high for name, (low, high) in part["intervals"].items())
    for value, part in plain["slices"].pop("half").items():
        assert {**found["slices"]["half"][value], "intervals": None} == {**part, "intervals": None}
    assert {key: found[key] for key in plain if key != "slices"} | {"slices": {}} == plain
    yes, no = found["labels"]["yes"], found["labels"]["no"]
    assert yes["rows"] == labels.sum() == 60 - no["rows"]
    for metric in METRICS[1:]:  # label 1 is the one to find
        assert yes[metric] == pytest.approx(found[metric])
        assert yes["intervals"][metric] == pytest.approx(found["intervals"][metric])
    low, high = no["intervals"]["recall"]
    assert low <= no["recall"] <= high and no["recall"] != yes["recall"]
    assert np.sum(found["confusion"]) == 60 and np.trace(found["confusion"]) == found["accuracy"] * 60


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_low_temperature_changes_no_ranking(num_labels):
    """Rows whose probability is 1 in float32 are ranked by their log odds."""
    config, logits, labels = scored(num_labels=num_labels)
    sharp = config.replace(temperature=0.05, threshold=None)
    assert (probabilities(10 * logits, sharp).amax(dim=1) == 1).float().mean() > 0.8
    found = detailed_report(sharp, 10 * logits, labels, resamples=50)
    odds, part = log_odds(10 * logits, sharp)[:, 1].numpy(), found["labels"][config.id2label[1]]
    assert part["auprc"] == pytest.approx(average_precision_score(labels == 1, odds))
    assert part["auroc"] == pytest.approx(roc_auc_score(labels == 1, odds))
    low, high = part["intervals"]["auroc"]
    assert low <= part["auroc"] <= high
    if num_labels == 2:
        plain = detailed_report(config, logits, labels, resamples=50)
        assert all(found["intervals"][name] == pytest.approx(plain["intervals"][name]) for name in ("auprc", "auroc"))


def test_what_a_detailed_report_holds_for_each_problem():
    many = detailed_report(*scored(num_labels=3), resamples=20)
    assert np.shape(many["confusion"]) == (3, 3) and len(many["labels"]) == 3
    several = detailed_report(*scored(num_labels=3, **MULTI), resamples=20)
    assert "confusion" not in several and len(several["labels"]) == 3 and several["calibration"]["bins"]
    regression = detailed_report(*scored(**REGRESSION), {"half": np.arange(60) % 2}, resamples=20)
    assert set(regression) == {"rows", "mse", "mae", "r2", "bootstrap", "intervals", "slices"}
    assert set(regression["intervals"]) == {"mse", "mae", "r2"} == set(regression["slices"]["half"]["1"]["intervals"])


def test_the_bootstrap_can_be_off():
    config, logits, labels = scored()
    off = detailed_report(config, logits, labels, {"all": [0] * 60}, resamples=0)
    assert "bootstrap" not in off and "intervals" not in str(off) and off["labels"] and off["slices"]
