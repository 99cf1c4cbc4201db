"""Scores of a head on labelled rows."""

import numpy as np
import pytest
import torch
from cases import make_scores
from conftest import LAYERS, make_lm, make_probe

from llama_probe import ProbeConfig
from llama_probe.data.cached_states import PromptDataset
from llama_probe.evaluation.report import asked, detailed_report, inspect_head, report


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


def test_what_a_detailed_report_holds_for_each_problem():
    many = detailed_report(*scored(num_labels=3), resamples=20)
    assert np.shape(many["confusion"]) == (3, 3) and len(many["labels"]) == 3
    several = detailed_report(*scored(num_labels=3, **MULTI), resamples=20)
    assert "confusion" not in several and len(several["labels"]) == 3 and several["calibration"]["bins"]
    regression = detailed_report(*scored(**REGRESSION), {"half": np.arange(60) % 2}, resamples=20)
    assert set(regression) == {"rows", "mse", "mae", "r2", "bootstrap", "intervals", "slices"}
    assert set(regression["intervals"]) == {"mse", "mae", "r2"} == set(regression["slices"]["half"]["1"]["intervals"])


ASKING = ProbeConfig(probe_type="gate", id2label={0: "fine", 1: "bad"}, threshold=0.2)
ASKED_SCORES = np.array([0.01, 0.15, 0.19, 0.22, 0.3, 0.99])
ASKED_LABELS = np.array([0, 1, 0, 0, 1, 1])
ASKED_LOGITS = torch.tensor(np.stack([np.zeros(6), np.log(ASKED_SCORES / (1 - ASKED_SCORES))], axis=1))


def test_the_rows_nearest_to_the_threshold_are_asked_about():
    alone, some, all_rows = asked(ASKING, ASKED_LOGITS, ASKED_LABELS, [0, 0.5, 1])
    assert alone == {"share": 0, "band": None, "recall": 2 / 3, "false_alarms": 1 / 3}
    assert some["band"] == pytest.approx([0.15, 0.22]) and (some["recall"], some["false_alarms"]) == (1, 0)
    assert (all_rows["recall"], all_rows["false_alarms"]) == (1, 0)


def test_the_judge_may_be_wrong():
    (found,) = asked(ASKING, ASKED_LOGITS, ASKED_LABELS, [0.5], verdicts=np.array([0, 0, 1, 1, 0, 0]))
    assert (found["recall"], found["false_alarms"]) == (2 / 3, 2 / 3)


def test_rows_of_one_label():
    (found,) = asked(ASKING, ASKED_LOGITS[:1], ASKED_LABELS[:1], [0])
    assert found["recall"] is None and found["false_alarms"] == 0
