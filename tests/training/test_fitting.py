"""Heads that are fitted: what is found, how the strength is chosen, and runs from rows to a folder."""

import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCAB, make_lm, read_head
from torch.utils.data import Dataset
from training_runs import run_of

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.evaluation.metrics import score_logits
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.training import fitting
from llama_probe.training import run as training_run
from llama_probe.training.fitting import fit_classifier
from llama_probe.training.loss import ProbeLoss


pytestmark = pytest.mark.usefixtures("no_plots")


LM = make_lm()


class States(Dataset):
    """Final states of one token a row, as a `StateDataset` of a muli head has them."""

    def __init__(self, states: torch.Tensor, labels: np.ndarray):
        self.states, self.labels = states, labels

    def __len__(self):
        return len(self.states)

    def __getitem__(self, row):
        return {"input_ids": [0], "hidden_states": self.states[row][None, None], "labels": self.labels[row]}


def fresh(**changes):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    probe = ProbeModel(ProbeConfig(probe_type="muli", **{**sizes, **changes}))
    probe.bind(LM)
    return probe


def rows(count, seed, label_of):
    """States whose label `label_of` tells from their log odds `[rows, vocabulary]`."""
    states = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return States(states, label_of(fresh().classifier.inputs(states)).numpy())


def fit(probe, label_of, loss=None, metric="accuracy"):
    parts = [rows(300, 0, label_of), rows(100, 1, label_of)]
    return fit_classifier(probe, *parts, loss or ProbeLoss(probe.config), metric), parts


def likely(token):
    return lambda odds: (odds[:, token] > -4.5).long()


def test_a_token_that_tells_is_found():
    probe = fresh()
    fitted, (train, validation) = fit(probe, likely(41), metric="auprc")
    scale = probe.classifier.inputs(train.states).std(dim=0)
    assert int((probe.classifier.weight[1].abs() * scale).argmax()) == 41
    assert not probe.classifier.weight[0].any(), "of two labels one has weights"
    assert 0 < fitted.facts["nonzero_weights"] < VOCAB / 2
    assert fitted.facts["nonzero_weights"] == int((probe.classifier.weight != 0).sum())
    assert probe.config.options == {"l1": fitted.facts["l1"]}
    found = predict_logits(probe, validation)
    torch.testing.assert_close(found, fitted.logits, atol=1e-3, rtol=1e-3)
    assert score_logits(found, validation.labels, probe.config)["auprc"] > 0.95


@pytest.mark.parametrize(
    "problem, label_of, metric",
    [
        ("single_label_classification", lambda odds: odds.argmax(dim=1), "accuracy"),
        ("multi_label_classification", lambda odds: (odds > -4.5).float(), "auprc"),
    ],
)
def test_three_labels(problem, label_of, metric):
    probe = fresh(num_labels=3, problem_type=problem)
    fitted, (_, validation) = fit(probe, lambda odds: label_of(odds[:, [3, 50, 77]]), metric=metric)
    found = predict_logits(probe, validation)
    torch.testing.assert_close(found, fitted.logits, atol=1e-3, rtol=1e-3)
    assert score_logits(found, validation.labels, probe.config)[metric] > 0.9


def test_folds_judge_each_row_by_a_model_that_did_not_see_it():
    noise = torch.randint(0, 2, (32,), generator=torch.Generator().manual_seed(3))
    data = States(torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(0)), noise.numpy())
    folds = np.array_split(np.random.default_rng(0).permutation(32), 4)
    probe = fresh(options={"l1": 0.005})
    fitted = fit_classifier(probe, data, data, ProbeLoss(probe.config), "accuracy", None, folds)
    held_out, own = fitted.logits.argmax(-1), predict_logits(probe, data).argmax(-1)
    assert (own == noise).float().mean() > 0.95 and (held_out == noise).float().mean() < 0.75
    part = fresh(options={"l1": 0.005})
    rest = np.setdiff1d(np.arange(32), folds[0])
    one = [States(data.states[chosen], data.labels[chosen]) for chosen in (rest, folds[0])]
    by_hand = fit_classifier(part, *one, ProbeLoss(part.config), "accuracy")
    torch.testing.assert_close(fitted.logits[folds[0]], by_hand.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("weights, expected", [(None, 0.1), ([1.0, 9.0], 0.5)])
def test_a_strong_penalty_leaves_nothing_but_the_frequencies_as_the_loss_weighs_them(weights, expected):
    probe = fresh(options={"l1": 5})
    fitted, _ = fit(probe, lambda odds: (torch.arange(len(odds)) % 10 == 0).long(), ProbeLoss(probe.config, weights))
    assert fitted.facts == {"l1": 5.0, "nonzero_weights": 0} and not probe.classifier.weight.any()
    assert float(fitted.logits.softmax(-1)[0, 1]) == pytest.approx(expected, abs=0.01)


def test_a_metric_that_is_not_defined():
    data = States(torch.randn(30, HIDDEN), np.zeros(30, dtype=int))
    with pytest.raises(ProbeError, match="auprc"):
        fit_classifier(fresh(), rows(60, 0, likely(41)), data, ProbeLoss(fresh().config), "auprc")


@pytest.mark.parametrize("folds, cache", [(3, True), (0, False)])
def test_runs(tmp_path, backbone_folder, cache, folds, monkeypatch):
    monkeypatch.setattr(training_run, "ProbeTrainer", lambda *args, **kwargs: pytest.fail("nothing is trained"))
    monkeypatch.setattr(fitting, "PATH", fitting.PATH[[0, 8]])
    changes = {"head": {"probe_type": "muli"}, "folds": folds, "test_share": 0.2}
    run = run_of(tmp_path, backbone_folder, rows=60, seeds=[4, 5], **changes)
    run.cache = cache
    results = run.run()
    (only,) = results["runs"]
    assert only["seed"] == 4 and only["l1"] > 0 and "epochs" not in only and results["recipe"]["label_smoothing"] == 0
    head = read_head(tmp_path / "head")
    assert head.config.options == {"l1": only["l1"]} and head.config.temperature == only["temperature"]
    assert int((head.classifier.weight != 0).sum()) == only["nonzero_weights"]
    assert results["num_parameters"] == 2 * 261 and results["inspection"]["layer_weights"]["layers"] == [LAYERS]
    card = (tmp_path / "head" / "README.md").read_text()
    assert str(only["nonzero_weights"]) in card and "AdamW" not in card
    with pytest.raises(ProbeError, match="focal_gamma"):
        run_of(tmp_path, focal_gamma=1.0, **changes).run()
