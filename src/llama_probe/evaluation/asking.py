"""Is it worth asking an expensive judge about the prompts that a head is unsure of?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.decision import log_odds, probabilities, threshold_of


def check_shares(shares: Sequence[float]) -> None:
    """Raise `ProbeError` unless each share of the rows to ask about is from 0 to 1."""
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ProbeError(f"a share of rows to ask about must be from 0 to 1, not {wrong[0]}")


def asked(
    config: ProbeConfig,
    logits: torch.Tensor,
    labels: np.ndarray,
    shares: Sequence[float],
    verdicts: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return recall and false alarms of a head that asks a judge about the rows nearest to its threshold.

    The head flags one of two labels. A cheap score in front of an expensive judge, as in arXiv 2601.11516.

    Args:
        logits (`[rows, 2]`), labels (`[rows]`): scores and true labels.
        shares: shares of the rows that the judge decides.
        verdicts (`[rows]`, *optional*): labels by the judge. Defaults to the true ones: a judge that is always right.

    Returns:
        For each share: `share`, the `band` of probabilities that is asked about (None if empty), `recall` and
        `false_alarms`, which are None without rows of that label.
    """
    index = config.need_flagged_index("asked")
    threshold = threshold_of(config, index)
    threshold = 0.5 if threshold is None else threshold
    distance = log_odds(logits.float(), config)[:, index].numpy() - np.log(threshold / (1 - threshold))
    scores = probabilities(logits.float(), config)[:, index].numpy()
    judged = labels if verdicts is None else verdicts
    nearest, parts = np.argsort(np.abs(distance), kind="stable"), []
    for share in shares:
        rows = nearest[: round(share * len(labels))]
        flagged = distance >= 0
        flagged[rows] = judged[rows] == index
        band = [float(scores[rows].min()), float(scores[rows].max())] if len(rows) else None
        recall, alarms = (
            float(flagged[labels == label].mean()) if (labels == label).any() else None for label in (index, 1 - index)
        )
        parts.append({"share": share, "band": band, "recall": recall, "false_alarms": alarms})
    return parts
