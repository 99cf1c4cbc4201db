"""Many heads on one pass of the backbone: each as if it were alone, and resumable."""

import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCAB, make_lm
from hub_server.heads import same_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset

from llama_probe import ProbeConfig, ProbeError
from llama_probe.data.states import PromptDataset, StateCache
from llama_probe.training import shared as shared_training
from llama_probe.training.learners import Candidate, Learner
from llama_probe.training.loss import ProbeLoss
from llama_probe.training.rows import CutReplies, WeightedRows
from llama_probe.training.shared import CHECKPOINT_NAME, SharedTraining


def rows(count: int, seed: int) -> PromptDataset:
    """Prompts of different lengths; those with the token 5 in them are positive."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(10, VOCAB, rng.integers(3, 12)).tolist() for _ in range(count)]
    labels = rng.integers(0, 2, count)
    for prompt, label in zip(prompts, labels, strict=True):
        if label:
            prompt[rng.integers(len(prompt))] = 5
    return PromptDataset(prompts, labels)


def candidate(number: int, batch_size: int = 8, learning_rate: float = 3e-3, **changes) -> Candidate:
    values = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "downcast": 4, "dropout": 0.2, **changes}
    config = ProbeConfig(**values)
    return Candidate(number, config, ProbeLoss(config), learning_rate, batch_size=batch_size, seed=number)


CANDIDATES = [
    candidate(0, probe_type="gate", learning_rate=0.03),
    candidate(1, probe_type="mha", batch_size=5, normalize="rms"),
    candidate(2, probe_type="attentive", batch_size=32, layers=[0, 2, 4]),
    candidate(3, probe_type="pooling", learning_rate=1e-6),
]


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def data():
    return rows(43, 0), rows(30, 1)


def train(folder, lm, data, candidates=CANDIDATES, epochs=4, **kwargs):
    training = SharedTraining(candidates, *data, "auprc", epochs, folder, lm, **{"keep": 1.0, "patience": 9, **kwargs})
    return {learner.candidate.number: learner for learner in training.run()}


def same(one, other) -> bool:
    return one.history == other.history and same_weights(one.probe, other.probe)


@pytest.fixture(scope="module")
def cut_data(data):
    """The same rows; each training row now and then loses some of its last tokens."""
    return CutReplies(data[0], [len(prompt) - 1 for prompt in data[0].prompts]), data[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lm, data):
    return train(tmp_path_factory.mktemp("trained"), lm, data)


def test_each_learns_as_if_it_were_alone(tmp_path, lm, data, trained):
    for number, single in enumerate(CANDIDATES):
        assert same(train(tmp_path / str(number), lm, data, [single])[number], trained[number])
    assert trained[0].history.best_epoch > 1 and len(set(trained[3].history.scores)) == 1, "one learns, one cannot"


def test_chance_in_the_rows_is_the_same_for_all(tmp_path, lm, cut_data, trained):
    together = train(tmp_path / "all", lm, cut_data, batch_tokens=64)
    assert same(train(tmp_path / "one", lm, cut_data, CANDIDATES[1:2], batch_tokens=64)[1], together[1])
    assert not same(together[0], trained[0]), "some were cut"


def test_the_backbone_runs_once_a_batch(tmp_path, lm, data, monkeypatch):
    calls = []
    original = shared_training.collect_hidden_states
    monkeypatch.setattr(
        shared_training, "collect_hidden_states", lambda *args: (calls.append(len(args[2])), original(*args))[1]
    )
    train(tmp_path, lm, data, epochs=2, batch_tokens=64)
    assert sum(calls) == 2 * (43 + 30), "every row once an epoch, for all candidates"
    assert len(calls) > 8


def test_cached_states_give_the_same(tmp_path, lm, data, trained):
    config = CANDIDATES[0].config
    cache = StateCache(tmp_path / "states", torch.float32)
    cached = [cache.dataset(lm, config, part.prompts, part.labels) for part in data]
    for number, learner in train(tmp_path / "cached", None, cached).items():
        assert learner.history.scores == pytest.approx(trained[number].history.scores, abs=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 13), min_size=1, max_size=8))
def test_batches_do_not_depend_on_how_rows_arrive(batch_size, chunks):
    count = sum(chunks)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LAYERS + 1, count, 3, HIDDEN, generator=generator)
    mask, labels = torch.ones(count, 3, dtype=torch.bool), torch.randint(0, 2, (count,), generator=generator)
    weights = []
    for parts in (chunks, [count]):
        learner = Learner(candidate(0, batch_size, probe_type="gate", dropout=0.0), count, 3, torch.device("cpu"))
        for _ in range(3):
            start = 0
            for size in parts:
                learner.feed(x[:, start : start + size], mask[start : start + size], labels[start : start + size])
                start += size
            learner.flush()
        assert learner.steps == learner.total_steps == 3 * -(-count // batch_size)
        weights.append(learner.probe.classifier.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


def test_rows_that_count_for_nothing_teach_nothing(tmp_path, lm, data):
    further, found = rows(20, 2), []
    for weight, labels in ((0.0, further.labels), (0.0, 1 - further.labels), (1.0, further.labels)):
        extra = WeightedRows(PromptDataset(further.prompts, labels), [weight])
        found.append(train(tmp_path, lm, (ConcatDataset([data[0], extra]), data[1]), CANDIDATES[:2], epochs=2))
    assert all(same(found[0][number], found[1][number]) for number in found[0])
    assert not same(found[0][0], found[2][0])


@pytest.mark.parametrize(("killed_after", "rows_are"), [(1, "data"), (3, "data"), (2, "cut_data")], ids=str)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, lm, killed_after, rows_are, monkeypatch, request):
    data = request.getfixturevalue(rows_are)
    arguments = {"keep": 0.6, "patience": 2, "epochs": 5}
    whole = train(tmp_path / "whole", lm, data, **arguments)
    training = SharedTraining(CANDIDATES, *data, "auprc", folder=tmp_path / "cut", lm=lm, **arguments)
    original = training._train_epoch

    def die():
        if training.epoch == killed_after:
            training.learners[0].probe.classifier.weight.data.zero_()  # in the middle of an epoch
            raise KeyboardInterrupt
        original()

    monkeypatch.setattr(training, "_train_epoch", die)
    with pytest.raises(KeyboardInterrupt):
        training.run()
    again = SharedTraining(CANDIDATES, *data, "auprc", folder=tmp_path / "cut", lm=lm, **arguments)
    resumed = {learner.candidate.number: learner for learner in again.run(resume=True)}
    assert all(same(resumed[number], whole[number]) for number in whole)


def test_a_damaged_checkpoint(tmp_path, lm, data):
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"cut")
    with pytest.raises(ProbeError, match=CHECKPOINT_NAME):
        SharedTraining(CANDIDATES, *data, "auprc", 4, tmp_path, lm).run(resume=True)


def test_halving_keeps_the_better_ones(tmp_path, lm, data):
    candidates = [candidate(i, probe_type="gate", learning_rate=3e-2 if i < 4 else 1e-7) for i in range(8)]
    learners = train(tmp_path, lm, data, candidates, epochs=5, keep=0.5)
    lengths = {number: len(learner.history.scores) for number, learner in learners.items()}
    assert sorted(lengths.values()) == [1, 1, 1, 1, 2, 2, 4, 5]
    assert next(iter(learners.values())).history.status == "finished"
    first = {number: learner.history.scores[0] for number, learner in learners.items()}
    assert min(first[n] for n in lengths if lengths[n] > 1) >= max(first[n] for n in lengths if lengths[n] == 1)


def test_patience(tmp_path, lm, data):
    stuck = candidate(0, probe_type="pooling", learning_rate=1e-12, dropout=0.0)
    learner = train(tmp_path, lm, data, [stuck], epochs=9, patience=2)[0]
    assert learner.history.status == "stopped" and len(learner.history.scores) == learner.history.best_epoch + 2


DIVERGES = candidate(7, probe_type="gate", learning_rate=1e6)


def test_one_that_diverges_holds_no_other_up(tmp_path, lm, data, trained):
    together = train(tmp_path, lm, data, [DIVERGES, *CANDIDATES])
    assert all(same(together[number], trained[number]) for number in trained)
    assert list(together)[-1] == 7 and together[7].history.status == "failed", "and comes last"
    assert len(together[7].history.scores) < 4 and together[7].history.best == -np.inf
    again = SharedTraining([DIVERGES, *CANDIDATES], *data, "auprc", 4, tmp_path, lm).run(resume=True)
    assert again[-1].history == together[7].history and same(again[0], together[again[0].candidate.number])


def test_where_all_diverge_it_says_so(tmp_path, lm, data):
    with pytest.raises(ProbeError, match="none of 1 candidates"):
        train(tmp_path, lm, data, [DIVERGES])


def test_the_best_epoch_is_what_comes_back(tmp_path, lm, data, monkeypatch):
    training = SharedTraining([CANDIDATES[0]], *data, "auprc", 4, tmp_path, lm, keep=1.0, patience=9)
    values, seen = iter([0.3, 0.9, 0.1, 0.5]), []

    def validate():
        seen.append(training.learners[0].probe.classifier.weight.clone())
        return {0: next(values)}

    monkeypatch.setattr(training, "_validate", validate)
    (learner,) = training.run()
    assert learner.history.best_epoch == 2 and torch.equal(learner.probe.classifier.weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_a_metric_that_the_validation_rows_do_not_define(tmp_path, lm, data):
    alike = PromptDataset(data[1].prompts, np.zeros(30, dtype=int))
    with pytest.raises(ProbeError, match="auprc"):
        train(tmp_path / "x", lm, (data[0], alike))
