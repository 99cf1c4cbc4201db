"""Scoring a head on labelled rows."""

import numpy as np
import pytest
import torch
from conftest import LAYERS, make_lm, make_probe

from llama_probe.evaluation import inspect_head, predict_logits
from llama_probe.features import PromptDataset


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
    together = predict_logits(probe, dataset, batch_size=2)
    for row, ids in enumerate(dataset.prompts):
        alone = probe(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["pooling", "gate", "mha"])
def test_layer_weights_by_label(dataset, kind):
    probe = with_backbone(probe_type=kind, layers=[0, 2, LAYERS], id2label={0: "no", 1: "yes"})
    found = inspect_head(probe, dataset, LABELS, batch_size=2)
    assert found["layer_weights"]["layers"] == [0, 2, LAYERS]
    for label, index in (("no", 0), ("yes", 1)):
        rows = [torch.tensor([dataset.prompts[row]]) for row in np.flatnonzero(index == LABELS)]
        expected = torch.cat([probe(input_ids=ids, output_attentions=True).layer_weights for ids in rows]).mean(dim=0)
        assert found["layer_weights"]["by_label"][label] == pytest.approx(expected.tolist(), abs=1e-4)
        assert sum(found["layer_weights"]["by_label"][label]) == pytest.approx(1, abs=1e-3)
    assert set(found["thresholds"]) == {"yes"} and found["calibration"]["bins"]


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
