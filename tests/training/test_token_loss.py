"""Losses of heads that follow replies, by the score after each token."""

import math

import numpy as np
import pytest
import torch
from conftest import make_lm, make_probe, make_prompts
from torch.nn.functional import softplus
from training_runs import head_of, trainer_of

from llama_probe.data.disk_states import DiskStates
from llama_probe.data.prompts import PromptDataset
from llama_probe.heads.decision import ProbeOutput
from llama_probe.training.loss import MONOTONE, ProbeLoss
from llama_probe.training.rows import TrainingRows


GUARD = {"token_scope": "response", "id2label": {0: "fine", 1: "awful"}, "flagged": ["awful"]}
# The log odds of the flagged label after each token of two replies; the second one has two tokens.
ODDS = torch.tensor([[-2.0, 1.0, 3.0, 2.0], [0.5, -1.0, -1.0, -1.0]])
COUNTED = torch.tensor([[True] * 4, [True, True, False, False]])


def loss_of(labels=(1, 0), weights=None, members=1, **changes):
    config = make_probe(**(GUARD | changes)).config
    output = ProbeOutput.from_logits(None, config)
    output.token_logits = torch.stack([torch.zeros_like(ODDS), ODDS], dim=-1).expand(members, -1, -1, -1)
    output.token_mask, output.row_weights = COUNTED, weights
    return float(ProbeLoss(config, token_loss=MONOTONE)(output, torch.tensor(labels)))


def test_the_loss_is_what_it_says():
    """Beside a slow transcription, of a harmful and a harmless reply."""
    harmful, harmless = softplus(-ODDS[0]), softplus(ODDS[1, :2])  # binary cross-entropy
    probs = ODDS.sigmoid()
    expected = float(harmful[-1] + probs[0, 2] - probs[0, 3] + harmless[-1] + probs[1, 0])
    assert loss_of() == pytest.approx(expected / 2, rel=1e-5) == loss_of(members=3)
    halves = torch.tensor([[0.5], [0.5]])
    assert loss_of(weights=halves) == pytest.approx(expected / 4, rel=1e-5)
    several = {"problem_type": "multi_label_classification", "flagged": ["awful"]}
    assert math.isfinite(loss_of(labels=((0.0, 1.0), (0.0, 0.0)), **several))
    assert loss_of(labels=((math.nan, math.nan),) * 2, **several) == 0


def reply_rows(count=12, seed=0):
    """Replies to one prompt, awful if token 11 occurs, and the tokens of each reply."""
    replies = [make_prompts(1, 3 + row % 40, seed=1000 * seed + row)[0].tolist() for row in range(count)]
    replies = [[12 if token == 11 else token for token in reply] for reply in replies]
    for reply in replies[1::2]:
        reply[len(reply) // 2] = 11
    return [[5, 6, 7, *reply] for reply in replies], np.arange(count) % 2, [len(reply) for reply in replies]


def head(head_type, scope, lm=None):
    return head_of(lm, probe_type=head_type, dropout=0.1, **(GUARD | {"token_scope": scope}))


def train(model, folder, lm, cached, scope):
    def dataset(seed):
        ids, labels, lengths = reply_rows(seed=seed)
        masks = [[False] * (len(row) - n) + [True] * n for row, n in zip(ids, lengths, strict=True)]
        rows = PromptDataset(ids, labels, masks if scope == "response" else None, lengths)
        if cached:
            rows = DiskStates(folder / "states", torch.float32).dataset(lm, head("gate", scope).config, rows)
        return TrainingRows(rows, replies="tokens")

    changes = {"num_train_epochs": 2, "learning_rate": 3e-2, "token_loss": MONOTONE}
    trainer = trainer_of(folder / "run", dataset(0), dataset(1), model=model, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("scope", ["response", "all"])
def test_heads_learn_side_by_side_as_alone_and_from_cached_states(scope, tmp_path):
    lm = make_lm()
    group = {"gate": head("gate", scope), "multimax": head("multimax", scope)}
    group = train(group, tmp_path / "group", lm, True, scope)
    alone = train(head("multimax", scope, lm), tmp_path / "alone", lm, False, scope)
    assert alone.progress["head"].scores == pytest.approx(group.progress["multimax"].scores, abs=1e-4)
    for a, b in zip(alone.model.parameters(), group.heads["multimax"].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
