"""Toxicity detection for free (MULI): a sparse linear map of the LM's first-token logits (Hu et al., arXiv 2405.18822)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backbone.next_token import NextToken
from ..errors import ProbeError
from .aggregator import Classifier, register_probe_type
from .configuration import ProbeConfig
from .last import LastItemAggregator


class LogOddsClassifier(Classifier):
    """A linear map of the log odds of every next token: f(p) = log p - log(1 - p), p from the frozen LM's own output head.

    The standardisation of f over the training rows is folded into `weight` and `bias`: `(vocab_size + 1) num_labels`
    parameters, of which few are not zero. The LM's output embeddings are shared with it, and no part of the module.
    """

    def __init__(self, config: ProbeConfig):
        if config.vocab_size is None:
            raise ProbeError("vocab_size is None: put it in the ProbeConfig of a muli head or pass backbone=")
        super().__init__(config.vocab_size, config.num_labels)
        self.next_token: NextToken | None = None

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "next_token": None}

    @property
    def lm(self) -> nn.Module | None:
        return None if self.next_token is None else self.next_token.lm

    def attach(self, lm: nn.Module, check: bool = True) -> None:
        found = NextToken(lm)
        self._check_width(getattr(found.embeddings, "out_features", self.in_features))
        if check:
            found.check()
        self.next_token = found

    def inputs(self, pooled: torch.Tensor) -> torch.Tensor:
        if self.next_token is None:
            raise ProbeError("this muli head has no LM: attach it, pass backbone= or call bind(lm)")
        with torch.no_grad():  # there is nothing to train before the linear map
            logits = self.next_token(pooled)
            self._check_width(logits.shape[-1])
            return token_log_odds(logits.log_softmax(dim=-1)).to(self.weight.device)

    def _check_width(self, width: int) -> None:
        if width != self.in_features:
            raise ProbeError(f"this LM has {width} next tokens, and the muli head is for {self.in_features}")


@register_probe_type("muli")
class MuliAggregator(LastItemAggregator):
    """The final state of the last token, as it is: the classifier makes next-token logits of it.

    `options`: `l1`, the strength of the L1 penalty at fitting: the mean loss + l1 * sum |w| over standardised features is
    smallest. Defaults to a choice by validation rows. Such a head is fitted as a convex problem, in `llama_probe.training.fitting`.
    """

    # Only the L1 penalty regularises the fit.
    recipe = {"learning_rate": 1e-3, "label_smoothing": 0.0, "dropout": 0.0, "layer_dropout": 0.0}
    options = {"l1": (None, "strength of the L1 penalty; chosen by validation rows if not given")}
    normalize = "none"
    convex = True

    @classmethod
    def check(cls, config):
        super().check(config)
        strength = config.options.get("l1", 1.0)
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength < float("inf"):
            raise ProbeError(f"options['l1']={strength!r} must be a number above 0")
        if config.problem_type == "regression":
            raise ProbeError("problem_type='regression' is not for probe_type='muli'; other kinds do regression")
        if config.normalize != "none":
            raise ProbeError(f"normalize={config.normalize!r} must be 'none' with probe_type='muli'")
        last = config.num_hidden_layers
        if config.layers != "all" and (len(config.layers) != 1 or last not in (None, *config.layers)):
            raise ProbeError(f"layers={config.layers!r} must be 'all': probe_type='muli' reads the final state alone")

    @classmethod
    def create_classifier(cls, config):
        return LogOddsClassifier(config)


def token_log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log p - log(1 - p) of log-probabilities of any shape, fp32. Bounded where p is 1 to fp32's precision."""
    # Each form of log(1 - p) is exact where the other is not (Maechler 2012, "Accurately computing log(1 - exp(-|a|))").
    near_one = (-torch.expm1(log_p)).clamp_min(2.0**-24).log()
    return log_p - torch.where(log_p > -0.7, near_one, torch.log1p(-log_p.exp()))
