"""The arguments of a `ProbeTrainer`, checked and completed: the rows that choose, the arguments of each head, and the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch.utils.data import Dataset

from ..data.labelled_texts import LabelledTexts
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from .arguments import ProbeTrainingArguments
from .head_group import GroupOutput, HeadGroup
from .loss import ProbeLoss
from .row_encoder import RowEncoder
from .rows import TrainingRows, labels_of, learners
from .search import HEAD_ARGS


NO_SEARCH = "is not supported: the search of a recipe tries configurations side by side, search={trials: 20}"

Rows = LabelledTexts | Dataset | None


def check_model(
    model: object, backbone: object, probe_config: Mapping[str, object] | None, model_init: object
) -> None:
    """Raise `ProbeError` unless a trainer is given a head, or a backbone to make a head for."""
    if model_init is not None:
        raise ProbeError(f"model_init {NO_SEARCH}")
    if (model is None) == (backbone is None):
        raise ProbeError("give one of model=ProbeModel(...) and backbone=")
    if probe_config is not None and backbone is None:
        raise ProbeError("probe_config needs backbone=; a model has its own config")
    if unknown := set(probe_config or ()) - {item.name for item in fields(ProbeConfig)}:
        raise ProbeError(f"probe_config has no {min(unknown)!r}; learning rates and the like go into args=")
    if model is not None and not isinstance(model, ProbeModel | Mapping):
        raise ProbeError(f"model must be a ProbeModel, not {type(model).__name__}; backbone= takes an LM")


def checked_arguments(args: ProbeTrainingArguments | None) -> ProbeTrainingArguments:
    """Return a copy of the arguments, which the trainer fills."""
    args = copy.copy(args) if args is not None else ProbeTrainingArguments()
    if not isinstance(args, ProbeTrainingArguments):
        raise ProbeError(f"args must be ProbeTrainingArguments, not {type(args).__name__}")
    args.check()
    return args


@dataclass(frozen=True)
class EvaluationRows:
    """The evaluation rows of a trainer by name, `""` for a single set. `chosen_by` names the rows that choose epochs and thresholds."""

    by_name: Mapping[str, Rows]
    chosen_by: str

    @classmethod
    def read(cls, encoder: RowEncoder, data: object, metric: str | None) -> EvaluationRows:
        """Read the tables with the labels of the heads. Of several tables the first chooses, or the table that the metric names."""
        sets = data if encoder.is_several(data) else {"": data}
        named = (metric or "").removeprefix("eval_")
        matching = (name for name in sets if named.startswith(f"{name}_"))
        chosen_by = max(matching, key=len, default=next(iter(sets)))
        return cls({name: encoder.label("eval_dataset", rows) for name, rows in sets.items()}, chosen_by)

    @property
    def chosen(self) -> Rows:
        """The rows that choose epochs and thresholds."""
        return self.by_name[self.chosen_by]

    def encode(self, encoder: RowEncoder) -> Dataset | dict[str, Dataset | None] | None:
        """Return the data set, or the data sets by name."""
        datasets = {name: encoder.encode("eval_dataset", rows) for name, rows in self.by_name.items()}
        return datasets.get("", datasets)


def fill_arguments(
    group: HeadGroup,
    args: ProbeTrainingArguments,
    rows: int,
    head_args: Mapping[str, Mapping[str, object]],
    left_out: Mapping[str, Sequence[int]],
) -> dict[str, JSON]:
    """Choose the arguments that are open, by the heads and the number of rows. Return the arguments of each head that differ."""
    heads = dict(group.heads)
    if unknown := {*head_args, *left_out} - set(heads):
        raise ProbeError(f"there is no head {min(unknown)!r} in model={{name: head}}: {', '.join(heads)}")
    if unknown := {name for values in head_args.values() for name in values} - set(HEAD_ARGS):
        raise ProbeError(f"head_args has {min(unknown)!r}; allowed: {', '.join(HEAD_ARGS)}")
    by_type = {name: args.open_for(head.config) for name, head in heads.items()}
    args.fill(group.config, rows)
    differing: dict[str, JSON] = {}
    for name, values in by_type.items():
        differing[name] = {key: value for key, value in values.items() if value != getattr(args, key)}
        differing[name] |= head_args.get(name, {})
    return differing


def total_loss(
    group: HeadGroup, args: ProbeTrainingArguments, head_args: Mapping[str, JSON], train: Rows
) -> Callable[..., torch.Tensor]:
    """Return a loss for the Trainer: the sum of the losses of the heads."""
    losses = {}
    for name, head in dict(group.heads).items():
        own = vars(args) | head_args[name]
        labels = None if train is None or own["class_weights"] != "balanced" else labels_of(train)
        losses[name] = ProbeLoss.create(head.config, own, labels)

    def total(outputs: GroupOutput, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        parts = [loss(outputs.by_head[name], labels, num_items_in_batch) for name, loss in losses.items()]
        return torch.stack(parts).sum()

    return total


def learned_rows(
    encoder: RowEncoder, train: Rows, group: HeadGroup, left_out: Mapping[str, Sequence[int]], token_loss: str | None
) -> Dataset | None:
    """Return the training rows as prompts or states, with the heads that learn from each row."""
    learned = encoder.encode("train_dataset", train, learned=True)
    if left_out:
        learned = TrainingRows(learned, learned_by=learners(range(len(learned)), dict(group.heads), left_out))
    if token_loss is not None and learned is not None and getattr(learned, "reply_lengths", None) is None:
        raise ProbeError(f"token_loss={token_loss!r} needs training rows with replies: chats, or probe_mask")
    return learned
