"""Losses of heads that follow replies, by the score after each token: a rule halts at the largest one, not at the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..heads.configuration import ProbeConfig
from ..heads.decision import ProbeOutput, flagged_score, probe_loss


# Settings of `probe_loss` behind the targets, up to `reduction`.
Settings = tuple[Any, ...]
_TOP = 8  # scores of a reply that must agree, of about 32


def _scores(outputs: ProbeOutput, config: ProbeConfig) -> torch.Tensor:
    """Return `flagged_score` of each token, `[M, B, R]`; minus infinity for what is no token of the reply."""
    return flagged_score(outputs.token_logits, config).masked_fill(~outputs.token_mask, float("-inf"))


def _row_weights(outputs: ProbeOutput) -> torch.Tensor:
    """Return what each reply counts for, `[M, B]`; see `probe_loss`."""
    members, batch = outputs.token_logits.shape[:2]
    if (weights := outputs.row_weights) is None:
        return outputs.token_logits.new_ones(members, batch)
    return weights[:, [member % weights.shape[1] for member in range(members)]].T.to(outputs.token_logits)


def softmax_loss(outputs: ProbeOutput, labels: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Sum the losses of all tokens, weighted by a softmax over the scores of their reply (arXiv 2601.04603).

    The weights have no gradient: else low scores of harmless replies would rise to get a larger share of the loss.
    """
    tokens = outputs.token_logits.shape[2]
    shares = _scores(outputs, settings[0]).detach().softmax(dim=-1)  # [M, B, R]
    weights = (shares * _row_weights(outputs)[..., None]).flatten(1).T  # [B R, M]
    targets = labels.repeat_interleave(tokens, dim=0)
    return probe_loss(outputs.token_logits.flatten(1, 2), targets, *settings, row_weights=weights)


def top_k_loss(outputs: ProbeOutput, labels: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the loss of the mean logits of the tokens with the largest scores: several must agree (arXiv 2604.14865)."""
    scores = _scores(outputs, settings[0])
    top, places = scores.topk(min(_TOP, scores.shape[-1]), dim=-1)  # [M, B, k]
    shares = top.isfinite()[..., None].to(outputs.token_logits)
    logits = outputs.token_logits.take_along_dim(places[..., None], dim=2)  # [M, B, k, C]
    means = (logits * shares).sum(dim=2) / shares.sum(dim=2)
    return probe_loss(means, labels, *settings, row_weights=outputs.row_weights)


def monotone_loss(outputs: ProbeOutput, labels: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the loss of the whole replies, and what the probability falls in harmful and rises in harmless replies.

    It begins at 0: a reply is harmless until it does harm (after the anchored temporal consistency of arXiv 2510.09694).
    """
    config = settings[0]
    total = probe_loss(outputs.token_logits[:, :, -1], labels, *settings, row_weights=outputs.row_weights)
    begun = outputs.token_mask.cumsum(dim=1) > 0  # behind its end a score stays
    probs = flagged_score(outputs.token_logits, config).sigmoid() * begun  # [M, B, R]
    steps = probs.diff(dim=-1, prepend=torch.zeros_like(probs[..., :1]))
    labels = labels.to(probs.device)
    if config.problem_type == "multi_label_classification":
        is_harmful = flagged_score(labels, config)  # [B], NaN if it is not known
    else:
        is_harmful = (labels == config.flagged_index).to(steps)
    wrong = (steps * (1 - 2 * is_harmful).nan_to_num()[:, None]).relu().sum(dim=-1)  # [M, B]
    return total + (wrong * _row_weights(outputs)).sum(dim=1).mean()


# Each returns the sum over the rows of a batch, the mean over the members of a head.
TOKEN_LOSSES: dict[str, Callable[[ProbeOutput, torch.Tensor, Settings], torch.Tensor]] = {
    "softmax": softmax_loss,
    "top-k": top_k_loss,
    "monotone": monotone_loss,
}
