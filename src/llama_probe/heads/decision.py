"""From logits to probabilities, labels and losses, for each `problem_type`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from ..errors import ProbeError
from ..files import JSON
from .configuration import ProbeConfig, filled_later
from .novelty import MeanStates


# A row's label: of multi-label heads a list of names, of regression heads a list of values; None if the head abstains.
Label = str | list[str] | list[float] | None


def probabilities(logits: torch.Tensor, config: ProbeConfig) -> torch.Tensor:
    """Apply the saved temperature to logits `[batch, num_labels]`: softmax for single-label heads, sigmoid for multi-label ones.

    Regression heads have no probabilities: their logits come back as they are.
    """
    if config.problem_type == "regression":
        return logits
    scaled = logits / config.temperature
    return scaled.sigmoid() if config.problem_type == "multi_label_classification" else scaled.softmax(dim=-1)


def log_odds(logits: torch.Tensor, config: ProbeConfig) -> torch.Tensor:
    """Return log p - log(1 - p) of each probability p, in fp64, `[rows, num_labels]`; for regression heads the logits.

    Log odds rank rows as p does, but still differ where p rounds to 1. A head without an error on its validation rows has a low
    temperature, and p rounds to 1 for many rows.
    """
    if config.problem_type == "regression":
        return logits
    scaled = logits.double() / config.temperature
    if config.problem_type == "multi_label_classification":
        return scaled
    log_p = scaled.log_softmax(dim=-1)
    # Only the largest p can be close to 1. For it, 1 - p is the sum of the other probabilities.
    best, index = scaled.max(dim=-1, keepdim=True)
    others = scaled.scatter(-1, index, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return (log_p - torch.log1p(-log_p.exp().clamp_max(0.75))).scatter(-1, index, best - others)


# A logit that fp16 holds. Its probability rounds to 0 at temperatures up to 90.
_RULED_OUT = -1e4
NO_NUMBER_BECAUSE = (
    "its training ran away (a lower learning rate helps), or states of the backbone are too large for its dtype (float32 and "
    "bfloat16 hold more than float16)"
)


def fill_unread(
    output: ProbeOutput,
    read: torch.Tensor,
    move: Callable[[torch.Tensor, torch.device], torch.Tensor] = torch.Tensor.to,
) -> ProbeOutput:
    """Rule out the flagged labels in rows without a token that the head reads. Return the output.

    Logits of these rows become 0, or -1e4 (a probability of 0) for flagged labels and for all labels of a multi-label head.

    Args:
        read (`[batch]` bool, on the CPU): the rows with a token that counts.
        move: copies a tensor to a device.
    """
    if not bool(read.all()):
        config = output.config_of()
        unread = torch.zeros(config.num_labels)
        if config.problem_type != "regression":
            is_multi_label = config.problem_type == "multi_label_classification"
            ruled_out = config.id2label.values() if is_multi_label else config.flagged or ()
            unread[[config.label2id[name] for name in ruled_out]] = _RULED_OUT
        read, unread = move(read, output.logits.device), move(unread.to(output.logits.dtype), output.logits.device)
        output.logits = torch.where(read[:, None], output.logits, unread)
    return output


def check_numbers(scores: torch.Tensor) -> None:
    """Raise `ProbeError` if a score of `[rows, num_labels]` is not a finite number."""
    if wrong := int((~scores.isfinite()).any(dim=-1).sum()):
        raise ProbeError(f"the head gives no number for {wrong} of {len(scores)} rows: {NO_NUMBER_BECAUSE}")


def threshold_of(config: ProbeConfig, index: int) -> float | None:
    """Return the probability from which a head gives a label, by its index; `None` if the largest probability decides."""
    if isinstance(config.threshold, list):  # multi-label
        return config.threshold[index]
    if config.problem_type == "multi_label_classification":
        return 0.5 if config.threshold is None else config.threshold
    return config.threshold if index == config.flagged_index else None


def predictions(probs: torch.Tensor, config: ProbeConfig) -> torch.Tensor:
    """Apply the saved threshold to `[batch, num_labels]` probabilities.

    Return class indices `[batch]`, for multi-label heads booleans `[batch, num_labels]`, for regression heads the values.
    """
    if config.problem_type == "regression":
        return probs
    if config.problem_type == "multi_label_classification":
        thresholds = [threshold_of(config, index) for index in range(config.num_labels)]
        return probs >= torch.as_tensor(thresholds, dtype=probs.dtype, device=probs.device)
    flagged = config.flagged_index
    if flagged is not None and (threshold := threshold_of(config, flagged)) is not None:
        return torch.where(probs[:, flagged] >= threshold, flagged, 1 - flagged)
    return probs.argmax(dim=-1)


def labels(
    probs: torch.Tensor, config: ProbeConfig, novelty: torch.Tensor | None = None, abstain_at: float | None = None
) -> list[Label]:
    """Return the label of each row: a name (single-label), a list of names (multi-label), or a list of floats (regression).

    With `abstain_at`, rows with a larger novelty get `None`.

    Raises:
        ProbeError: a probability is not a number, which would look harmless below any threshold; or `abstain_at` is given without
            `novelty`.
    """
    probs = probs.cpu()
    decided = predictions(probs, config).tolist()
    rows: list[Label] = decided
    if config.problem_type != "regression":
        check_numbers(probs)
        if config.problem_type == "multi_label_classification":
            rows = [[config.id2label[i] for i, on in enumerate(row) if on] for row in decided]
        else:
            rows = [config.id2label[index] for index in decided]
    if abstain_at is None:
        return rows
    if novelty is None:
        raise ProbeError(f"abstain_at={abstain_at} needs a head with novelty")
    return [None if new else label for label, new in zip(rows, (novelty > abstain_at).tolist(), strict=True)]


def abstaining(outputs: dict[str, ProbeOutput], levels: Mapping[str, float]) -> dict[str, ProbeOutput]:
    """Set `abstain_at` of the outputs of several heads, and return the outputs."""
    for name, level in levels.items():
        outputs[name].abstain_at = level
    return outputs


def flagged_score(logits: torch.Tensor, config: ProbeConfig) -> torch.Tensor | None:
    """Return the score of the flagged labels, larger for a more likely label: logits `[..., num_labels]` to `[...]`.

    For two labels this is the difference of the logits. For a multi-label head it is the largest logit of a flagged label, or of
    any label if none is flagged. For other heads it is `None`.
    """
    if config.problem_type == "multi_label_classification":
        names = config.flagged or list(config.id2label.values())
        return logits[..., [config.label2id[name] for name in names]].amax(dim=-1)
    index = config.flagged_index
    if index is None:
        return None
    return logits[..., index] - logits[..., 1 - index]


def strongest(logits: torch.Tensor, config: ProbeConfig, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of the strongest item, `[..., num_labels]`. Items are tokens of a reply, or segments of a prompt.

    The strongest item has the largest `flagged_score`. For multi-label heads each label's largest logit is returned; for heads
    without a flagged label, the logits of the last item.

    Args:
        logits (`[..., items, num_labels]`): of each item.
        counted (`[..., items]`, *optional*): true for the items that count. Defaults to all.
    """
    return take_items(logits, strongest_places(logits, config, counted))


def strongest_places(logits: torch.Tensor, config: ProbeConfig, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Return which item gives each label its logit, `[..., num_labels]`; see `strongest`."""
    if config.problem_type == "multi_label_classification":
        scores = logits
    elif (flagged := flagged_score(logits, config)) is not None:
        scores = flagged[..., None]
    else:
        scores = torch.ones_like(logits[..., :1]).cumsum(dim=-2)  # the last item
    if counted is not None:
        scores = scores.masked_fill(~counted[..., None], float("-inf"))
    return scores.argmax(dim=-2).expand(*logits.shape[:-2], logits.shape[-1])


def take_items(items: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return of items `[..., items, num_labels]` those at `places`, `[..., num_labels]`."""
    return items.gather(-2, places.unsqueeze(-2)).squeeze(-2)  # one operation, unlike take_along_dim


def found_spans(labels: list[Label], spans: torch.Tensor, config: ProbeConfig) -> list[dict[str, list[int]]]:
    """Return for each row the span `[first, end]` of the window that gave each flagged label that the row has, by label.

    Labels that the head does not flag are everywhere in a text. A multi-label head that flags no label flags them all.

    Args:
        labels: what `labels` returned for the rows.
        spans (`[rows, num_labels, 2]`): as in `ProbeOutput`.
    """
    flagged = config.flagged or list(config.id2label.values())
    rows: list[dict[str, list[int]]] = []
    for label, row in zip(labels, spans.tolist(), strict=True):
        found = [label] if isinstance(label, str) else label or []
        rows.append({name: row[config.label2id[name]] for name in flagged if name in found})
    return rows


def describe_predictions(
    labels: list[Label],
    probs: torch.Tensor,
    config: ProbeConfig,
    novelty: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> list[JSON]:
    """Return the prediction of each row as JSON values.

    Args:
        labels: what `labels` returned for the rows.
        probs (`[rows, num_labels]`): probabilities (regression: values).
        novelty (`[rows]`, *optional*): of a head with novelty; NaN in rows without a token that counts.
        spans (`[rows, num_labels, 2]`, *optional*): of a head with windows.

    Returns:
        For each row `label`, the probability of the label as `score`, and `scores`, the probabilities by label. For multi-label
        heads `label` and `score` are lists. If the head abstains, both are None. Regression heads have no `label`; `scores` are
        their values, and `score` is the value of a head that has only one. With `novelty` there is `novelty`, None for NaN. With
        `spans` there is `span`: by flagged label that the row has, the first token and one past the last of its window.
    """
    rows: list[JSON] = []
    for label, values in zip(labels, probs.tolist(), strict=True):
        scores = dict(zip(config.id2label.values(), values, strict=True))
        row: JSON = {"label": label, "score": None, "scores": scores}
        if isinstance(label, str):
            row["score"] = scores[label]
        elif label is not None and config.problem_type != "regression":
            row["score"] = [scores[name] for name in scores if name in label]
        elif label is not None:
            row = {"score": values[0], "scores": scores} if len(values) == 1 else {"scores": scores}
        rows.append(row)
    for row, value in zip(rows, [] if novelty is None else novelty.tolist(), strict=False):
        row["novelty"] = None if math.isnan(value) else value
    for row, found in zip(rows, [] if spans is None else found_spans(labels, spans, config), strict=False):
        row["span"] = found
    return rows


def in_words(prediction: JSON, style: str = ".2f") -> str:
    """Return a prediction of `describe_predictions` as text: the label with its probability, which need not be the largest.

    Args:
        style: format of a probability.
    """
    scores = prediction["scores"]
    if "label" not in prediction:  # of a regression head
        return ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
    label = prediction["label"]
    if label is None:
        return "no label: unlike the training data"
    names = [name for name in scores if name in label] if isinstance(label, list) else [label]
    return ", ".join(f"{name} ({scores[name]:{style}})" for name in names) or "no label"


def probe_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: ProbeConfig,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of a head: cross-entropy, binary cross-entropy a label, or squared error.

    Args:
        logits (`[batch, num_labels]`): or `[members, batch, num_labels]`. The members then learn from the mean of their losses.
        targets: as `labels` of `ProbeModel.forward`. A multi-label target that is NaN is not known, and has no loss.
        class_weights (`[num_labels]`, *optional*): weight of each class (single-label) or of its positives
            (multi-label).
        label_smoothing: share of the target spread evenly over the classes.
        focal_gamma: down-weights rows that are already right by `(1 - p)^gamma` (Lin et al., arXiv 1708.02002).
        reduction: `"mean"` or `"sum"` over the rows, and the mean over the members; `"none"` for `[members, batch]`.
        row_weights (`[batch, W]`, *optional*): factors of each row's loss. Member m takes column m modulo W.
    """
    targets = targets.to(logits.device)
    if class_weights is not None:
        class_weights = class_weights.to(logits.device, logits.dtype)
    members = len(logits) if logits.dim() == 3 else 1
    logits, targets = logits.flatten(0, -2), torch.cat([targets] * members)  # [M B, C]
    if config.problem_type == "regression":
        rows = F.mse_loss(logits, targets.to(logits.dtype).view_as(logits), reduction="none").mean(dim=-1)
    elif config.problem_type == "multi_label_classification":
        is_known, targets = ~targets.isnan(), targets.nan_to_num().to(logits.dtype)
        soft = targets * (1 - label_smoothing) + label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, soft, reduction="none", pos_weight=class_weights)
        if focal_gamma:
            losses = losses * (1 - torch.where(targets > 0.5, logits.sigmoid(), (-logits).sigmoid())) ** focal_gamma
        rows = (losses * is_known).mean(dim=-1)
    else:
        targets = targets.long()
        rows = F.cross_entropy(logits, targets, class_weights, label_smoothing=label_smoothing, reduction="none")
        if focal_gamma:
            right = logits.softmax(dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
            rows = rows * (1 - right) ** focal_gamma
    rows = rows.view(members, -1)  # [M, B]
    if row_weights is not None:
        columns = [member % row_weights.shape[1] for member in range(members)]
        rows = rows * row_weights[:, columns].T.to(rows)
    if reduction == "none":
        return rows
    return (rows.sum(dim=1) if reduction == "sum" else rows.mean(dim=1)).mean()


class DecidedMixin:
    """Base of outputs, which compute probabilities and labels only when they are read: a forward pass never waits for them.

    Attributes:
        abstain_at: novelty above which a row has the label `None`, by head if there are several; `None` for never.
        means: the `MeanStates` from which the novelty of a single head is computed; `None` if the head has no novelty. `means` is
            not a field, because the Trainer would gather it.
    """

    abstain_at: Any = None
    means: MeanStates | None = None

    def config_of(self, name: str | None = None) -> ProbeConfig:
        """Return the config of a head, by its name if there are several.

        Raises:
            ProbeError: the output is a copy, which has no configs.
        """
        configs = self.__dict__.get("_probe_configs", {})
        if name not in configs:
            raise ProbeError("this output has lost its head configs (a copy or a gather does that); use its logits")
        return configs[name]


@dataclass
class ProbeOutput(DecidedMixin, ModelOutput):
    """The predictions of one head for a batch.

    Args:
        loss (scalar, *optional*): with labels.
        logits (`torch.FloatTensor` of shape `[batch, num_labels]`): without the temperature.
        token_weights (`[batch, layers_read, tokens]`, *optional*): how much each token counted in the summary of each
            layer that the head reads, ascending; sums to 1 over the tokens, 0 on padding.
        layer_weights (`[batch, layers_read]`, *optional*): how much each layer counted; sums to 1.
        member_logits (`[members, batch, num_labels]`, *optional*): in training, of a head that averages several members.
        row_weights (`[batch, W]`, *optional*): for the loss; see `probe_loss`.
        token_logits (`[members, batch, R, num_labels]`, *optional*): after R tokens of each reply; see `ProbeModel.score_replies`.
        token_mask (`[batch, R]`, *optional*): true for those of the R columns in which the reply has a token.
        spans (`torch.LongTensor` of shape `[batch, num_labels, 2]`, *optional*): first token, and one past the last, of the window
            that gave each label its logit; the columns are those of the input. Of heads with windows.
        segment_logits (`[members, batch, K, num_labels]`, *optional*): in training, of the windows of each row, K at most.
        segment_mask (`[batch, K]`, *optional*): true for the windows that a row has.
        holds_request (`[batch, K]`, *optional*): true for the windows that hold the request; see `Segments.holding`.
        touches_request (`[batch, K]`, *optional*): true for the windows that have a token of the request.

    Attributes:
        passages: the passages of each row, from `classify(texts, passages=True)`; else `None`. See `describe`. It is not a field,
            because the Trainer would gather it.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor = filled_later()
    token_weights: torch.Tensor | None = None
    layer_weights: torch.Tensor | None = None
    member_logits: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None
    token_logits: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    spans: torch.Tensor | None = None
    segment_logits: torch.Tensor | None = None
    segment_mask: torch.Tensor | None = None
    holds_request: torch.Tensor | None = None
    touches_request: torch.Tensor | None = None
    passages = None  # without an annotation, which would make it a field

    @classmethod
    def from_logits(cls, logits: torch.Tensor, config: ProbeConfig) -> ProbeOutput:
        """Return an output with these logits, and with the config that turns them into labels."""
        output = cls(logits=logits)
        output.__dict__["_probe_configs"] = {None: config}
        return output

    @property
    def novelty(self) -> torch.Tensor | None:
        """The novelty of each row, `[batch]` from 0 (like the training data) to 1; `None` if the head has no novelty."""
        return None if self.means is None else self.means.novelty

    @property
    def learned_logits(self) -> torch.Tensor:
        """The logits for the loss: those of each member if there are several, else `logits`."""
        return self.logits if self.member_logits is None else self.member_logits

    @property
    def probabilities(self) -> torch.Tensor:
        """`[batch, num_labels]`, with the saved temperature."""
        return probabilities(self.logits, self.config_of())

    @property
    def labels(self) -> list[Label]:
        """Label names a row, with the saved temperature and threshold; `None` for a row where the head abstains."""
        return labels(self.probabilities, self.config_of(), self.novelty, self.abstain_at)

    @property
    def found_spans(self) -> list[dict[str, list[int]]] | None:
        """For each row, by label, the span of each flagged label that the row has; `None` without `spans`."""
        return None if self.spans is None else found_spans(self.labels, self.spans, self.config_of())

    def describe(self) -> list[JSON]:
        """Return the prediction of each row as JSON values; see `describe_predictions`.

        With `passages` a row also has `passages`, its passages as `serving.passages.locate` returns them.
        """
        rows = describe_predictions(self.labels, self.probabilities, self.config_of(), self.novelty, self.spans)
        for row, passages in zip(rows, self.passages or [], strict=False):
            row["passages"] = passages
        return rows
