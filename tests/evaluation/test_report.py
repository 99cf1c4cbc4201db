"""Scores of a head on labelled rows, and its outputs for them."""

import numpy as np
import pytest
import torch
from cases import MULTI, REGRESSION, make_scores, with_backbone
from conftest import LAYERS, make_probe, make_prompts

from llama_probe.backbone import passes
from llama_probe.data.prompts import PromptDataset
from llama_probe.evaluation.calibration import reliability
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.evaluation.report import detailed_report, inspect_head, report


LABELS = np.array([0, 1, 1, 0, 1])
METRICS = ["accuracy", "f1", "precision", "recall", "auprc", "auroc"]


@pytest.fixture
def dataset():
    return PromptDataset([make_prompts(1, length, length)[0].tolist() for length in (7, 3, 9, 5, 3)], LABELS)


@pytest.mark.parametrize("head_type", ["pooling", "gate", "mha"])
def test_layer_weights_by_label(dataset, head_type, monkeypatch):
    monkeypatch.setattr(passes, "BATCH_TOKENS", 14)
    probe = with_backbone(probe_type=head_type, layers=[0, 2, LAYERS], id2label={0: "no", 1: "yes"}, flagged=["yes"])
    found = inspect_head(probe, dataset, LABELS)
    assert found["layer_weights"]["layers"] == [0, 2, LAYERS]
    for index, weights in enumerate(found["layer_weights"]["by_label"].values()):
        rows = [torch.tensor([dataset.prompts[row]]) for row in np.flatnonzero(index == LABELS)]
        expected = torch.cat([probe(input_ids=ids, output_attentions=True).layer_weights for ids in rows]).mean(dim=0)
        assert weights == pytest.approx(expected.tolist(), abs=1e-4) and sum(weights) == pytest.approx(1, abs=1e-3)
    assert set(found["thresholds"]) == {"yes"} and found["calibration"]["bins"]
    assert [sum(row) for row in found["confusion"]] == [(index == LABELS).sum() for index in range(2)]


def test_replies_are_inspected_by_the_scores_that_halt_them(dataset):
    probe = with_backbone(probe_type="gate", token_scope="response", id2label={0: "no", 1: "yes"}, flagged=["yes"])
    masks = [[False] * (len(ids) - 2) + [True] * 2 for ids in dataset.prompts]
    replies = PromptDataset(dataset.prompts, LABELS, masks, reply_lengths=[2] * len(masks))
    expected = reliability(predict_logits(probe, replies), LABELS, probe.config)
    assert inspect_head(probe, replies, LABELS)["calibration"] == expected


def scored(**changes):
    """Return config, logits and labels of a head."""
    config = make_probe(**changes).config
    return config, *make_scores(config)


def test_a_detailed_report_of_two_labels():
    config, logits, labels = scored(id2label={0: "no", 1: "yes"}, threshold=0.4, temperature=1.5)
    slices = {"half": np.arange(60) % 2}
    found, plain = detailed_report(config, logits, labels, slices, 200), report(config, logits, labels, slices)
    assert plain["slices"]["half"]["1"] == report(config, logits[1::2], labels[1::2])
    assert found["bootstrap"] == {"resamples": 200, "seed": 0, "level": 0.95}
    assert "intervals" not in str(detailed_report(config, logits, labels, slices, 0))
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


def test_metrics_that_need_a_label_are_none_where_no_row_has_it():
    config, logits, labels = scored(id2label={0: "no", 1: "yes"}, threshold=0.4)
    for found in (report, detailed_report):
        parts = found(config, logits, labels, {"truth": labels})["slices"]["truth"]
        assert [(part["f1"], part["precision"]) for part in parts.values()] == [(None, None)] * 2
        assert parts["0"]["recall"] is None and parts["1"]["recall"] is not None
    assert detailed_report(config, logits[labels == 0], labels[labels == 0], resamples=0)["recall"] is None


def test_what_a_detailed_report_holds_for_each_problem():
    many = detailed_report(*scored(num_labels=3), resamples=20)
    assert np.shape(many["confusion"]) == (3, 3) and len(many["labels"]) == 3
    several = detailed_report(*scored(num_labels=3, **MULTI), resamples=20)
    assert "confusion" not in several and len(several["labels"]) == 3 and several["calibration"]["bins"]
    regression = detailed_report(*scored(**REGRESSION), {"half": np.arange(60) % 2}, resamples=20)
    assert set(regression) == {"rows", "mse", "mae", "r2", "bootstrap", "intervals", "slices"}
    assert set(regression["intervals"]) == {"mse", "mae", "r2"} == set(regression["slices"]["half"]["1"]["intervals"])
