"""Probabilities, labels and losses."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from llama_probe import ProbeConfig, ProbeError, ProbeOutput
from llama_probe.heads.decision import labels, log_odds, probabilities, probe_loss


def config(**changes):
    return ProbeConfig(probe_type="gate", **changes)


def test_single_label():
    head = config(id2label={0: "no", 1: "yes"}, temperature=2.0, threshold=0.3)
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    probs = probabilities(logits, head)
    torch.testing.assert_close(probs, (logits / 2).softmax(-1))
    assert labels(probs, head) == ["no", "yes", "yes"]  # 0.27, 0.38, 0.88 against 0.3
    assert labels(probs, head.replace(threshold=None)) == ["no", "no", "yes"]
    assert labels(torch.tensor([[0.7, 0.3]]), head) == ["yes"], "the threshold itself counts"


def test_multi_label():
    names, several = {0: "a", 1: "b", 2: "c"}, "multi_label_classification"
    head = config(id2label=names, problem_type=several, threshold=[0.5, 0.9, 0.1])
    probs = probabilities(torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, -4.0]]), head)
    assert labels(probs, head) == [["a", "c"], []]
    assert labels(probs, head.replace(threshold=None)) == [["a", "b"], []]
    fine = head.replace(threshold=[0.999, 0.999, 0.31])
    try:
        torch.set_default_dtype(torch.bfloat16)
        probs = torch.tensor([[0.9991, 0.9985, 0.3105]], dtype=torch.float32)
        assert labels(probs, fine) == [["a", "c"]]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("count", [2, 4])
def test_log_odds(problem_type, count):
    head = config(num_labels=count, problem_type=problem_type, temperature=0.5)
    logits = torch.randn(20, count, generator=torch.Generator().manual_seed(0))
    probs = probabilities(logits.double(), head)
    torch.testing.assert_close(log_odds(logits, head), (probs / (1 - probs)).log())
    sure = log_odds(torch.tensor([[0.0] * (count - 1) + [40.0], [0.0] * (count - 1) + [41.0]]), head)[:, -1]
    others = 0.0 if problem_type == "multi_label_classification" else torch.tensor(count - 1.0).log().item()
    assert sure.tolist() == pytest.approx([80.0 - others, 82.0 - others]), "both probabilities are 1"


def test_regression():
    head = config(num_labels=1, problem_type="regression")
    values = torch.tensor([[0.5], [-2.0]])
    assert labels(probabilities(values, head), head) == [[0.5], [-2.0]]
    torch.testing.assert_close(probe_loss(values, torch.tensor([1.0, 0.0]), head), torch.tensor((0.25 + 4) / 2))


def test_losses_against_torch():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 3), torch.randint(0, 3, (6,))
    head, weights = config(num_labels=3), torch.tensor([1.0, 2.0, 3.0])
    plain = F.cross_entropy(logits, targets)
    torch.testing.assert_close(probe_loss(logits, targets, head), plain)
    torch.testing.assert_close(probe_loss(logits, targets, head, reduction="sum"), plain * 6)
    weighted = F.cross_entropy(logits, targets, weight=weights, label_smoothing=0.1, reduction="none").mean()
    torch.testing.assert_close(probe_loss(logits, targets, head, weights, label_smoothing=0.1), weighted)
    several, on = config(num_labels=3, problem_type="multi_label_classification"), torch.randint(0, 2, (6, 3)).float()
    known = torch.ones(6, 3)
    known[:2, 1] = 0
    losses = F.binary_cross_entropy_with_logits(logits, on, reduction="none")
    torch.testing.assert_close(probe_loss(logits, on, several), losses.mean())
    some = on.masked_fill(known == 0, float("nan"))
    torch.testing.assert_close(probe_loss(logits, some, several), (losses * known).mean())


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_focal_weights_favour_hard_rows(problem_type):
    head = config(num_labels=2, problem_type=problem_type)
    sure, unsure = torch.tensor([[-4.0, 4.0]]), torch.tensor([[0.1, -0.1]])
    target = torch.tensor([1]) if problem_type.startswith("single") else torch.tensor([[0.0, 1.0]])
    ratios = [probe_loss(x, target, head, focal_gamma=2.0) / probe_loss(x, target, head) for x in (sure, unsure)]
    assert ratios[0] < 0.01 < ratios[1] < 1


def test_an_output_without_its_config_says_so():
    output = ProbeOutput.from_logits(torch.tensor([[0.0, 1.0]]), config())
    assert output.labels == ["LABEL_1"] and list(output) == ["logits"]
    copied = pickle.loads(pickle.dumps(output))
    assert torch.equal(copied.logits, output.logits)
    with pytest.raises(ProbeError, match="lost its head configs"):
        ProbeOutput(logits=output.logits).labels  # noqa: B018


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_what_is_no_number_has_no_label(problem_type, threshold):
    """A backbone in fp16 that overflows gives such states; a guard must not call the prompt harmless."""
    logits = torch.tensor([[0.0, 1.0], [float("nan"), float("nan")]])
    output = ProbeOutput.from_logits(logits, config(problem_type=problem_type, threshold=threshold))
    assert output.probabilities[1].isnan().all(), "the scores themselves can be had"
    with pytest.raises(ProbeError, match=r"no number for 1 of 2 rows: .*too large for its dtype"):
        output.labels  # noqa: B018
