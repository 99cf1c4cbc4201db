"""What a judge adds that decides the rows nearest to a head's threshold."""

import numpy as np
import pytest
import torch

from llama_probe import ProbeConfig, ProbeError
from llama_probe.evaluation.asking import asked, check_shares


CONFIG = ProbeConfig(probe_type="gate", id2label={0: "fine", 1: "bad"}, threshold=0.2)
SCORES = np.array([0.01, 0.15, 0.19, 0.22, 0.3, 0.99])
LABELS = np.array([0, 1, 0, 0, 1, 1])
LOGITS = torch.tensor(np.stack([np.zeros(6), np.log(SCORES / (1 - SCORES))], axis=1))


def test_the_rows_nearest_to_the_threshold_are_asked_about():
    alone, some, all_rows = asked(CONFIG, LOGITS, LABELS, [0, 0.5, 1])
    assert alone == {"share": 0, "band": None, "recall": 2 / 3, "false_alarms": 1 / 3}
    assert some["band"] == pytest.approx([0.15, 0.22]) and (some["recall"], some["false_alarms"]) == (1, 0)
    assert (all_rows["recall"], all_rows["false_alarms"]) == (1, 0)


def test_the_judge_may_be_wrong():
    (found,) = asked(CONFIG, LOGITS, LABELS, [0.5], verdicts=np.array([0, 0, 1, 1, 0, 0]))
    assert (found["recall"], found["false_alarms"]) == (2 / 3, 2 / 3)


def test_rows_of_one_label():
    (found,) = asked(CONFIG, LOGITS[:1], LABELS[:1], [0])
    assert found["recall"] is None and found["false_alarms"] == 0


def test_a_wrong_share():
    with pytest.raises(ProbeError, match=r"1\.5"):
        check_shares([0.5, 1.5])
