"""`HeadTrainer`: the Trainer of transformers for one head or several, from labelled rows to heads that can be saved."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction, HubStrategy, IntervalStrategy, TrainOutput
from transformers.utils import logging

from ..backbone.decoder import is_tensor_parallel
from ..data.batches import collate_in_parts
from ..data.labelled_texts import LabelledTexts
from ..distributed import meet
from ..errors import ProbeError
from ..evaluation.calibration import check_threshold_rule
from ..evaluation.metrics import check_metric
from ..evaluation.metrics import compute_metrics as metrics_of
from ..evaluation.prediction import predict_together
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..hub.publish import push_folder
from .arguments import ProbeTrainingArguments
from .defaults import head_for_rows
from .head_group import SINGLE, GroupOutput, HeadGroup
from .loss import ProbeLoss
from .progress import BEST_NAME, BestEpochs, Progress, last_checkpoint, read_progress, write_progress
from .results import add_novelty, basic_results, decide, inspect
from .row_encoder import RowEncoder
from .rows import TrainingRows, labels_of, learners
from .search import HEAD_ARGS


logger = logging.get_logger(__name__)

# Arguments of `push_to_hub` for the card of the Trainer. The card of a head says these facts by itself.
_CARD_FACTS = {"model_name", "finetuned_from", "tasks", "language", "dataset", "dataset_tags", "dataset_args"}
_NO_SEARCH = "is not supported: the search of a recipe tries configurations side by side, search={trials: 20}"


class HeadTrainer(Trainer):
    """Trains heads on a frozen backbone; see `ProbeTrainer`, which says what the arguments are."""

    def __init__(
        self,
        model: ProbeModel | Mapping[str, ProbeModel] | None = None,
        args: ProbeTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: object = None,
        eval_dataset: object = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., ProbeModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        *,
        backbone: str | os.PathLike | PreTrainedModel | None = None,
        probe_config: Mapping[str, object] | None = None,
        column_mapping: Mapping[str, str] | None = None,
        head_args: Mapping[str, Mapping[str, object]] | None = None,
        left_out: Mapping[str, Sequence[int]] | None = None,
        **kwargs,
    ):
        meet()
        self.args = args = copy.copy(args) if args is not None else ProbeTrainingArguments()
        if not isinstance(args, ProbeTrainingArguments):
            raise ProbeError(f"args must be ProbeTrainingArguments, not {type(args).__name__}")
        args.check()
        if model_init is not None:
            raise ProbeError(f"model_init {_NO_SEARCH}")
        if (model is None) == (backbone is None):
            raise ProbeError("give one of model=ProbeModel(...) and backbone=")
        if probe_config is not None and backbone is None:
            raise ProbeError("probe_config needs backbone=; a model has its own config")
        if unknown := set(probe_config or ()) - {item.name for item in fields(ProbeConfig)}:
            raise ProbeError(f"probe_config has no {min(unknown)!r}; learning rates and the like go into args=")
        if backbone is not None:
            made = head_for_rows(backbone, dict(probe_config or {}), train_dataset, column_mapping, processing_class)
            model, train_dataset, processing_class = made
        if not isinstance(model, ProbeModel | Mapping):
            raise ProbeError(f"model must be a ProbeModel, not {type(model).__name__}; backbone= takes an LM")
        self.model = group = HeadGroup(model)
        if is_tensor_parallel(group.backbone):
            raise ProbeError("a Trainer divides the rows, which a backbone with a tp_plan needs in all processes")
        self._best_epochs = BestEpochs(self.heads)
        self.logits: torch.Tensor | dict[str, torch.Tensor] | None = None
        self._encoder = encoder = RowEncoder(group, args, processing_class, column_mapping)

        train = encoder.label("train_dataset", train_dataset, learned=True)
        sets = eval_dataset if encoder.is_several(eval_dataset) else {"": eval_dataset}
        named = (args.metric_for_best_model or "").removeprefix("eval_")
        # The name of the evaluation rows that choose epochs and thresholds.
        self._chosen_by = max(
            (name for name in sets if named.startswith(f"{name}_")), key=len, default=next(iter(sets))
        )
        labelled = {name: encoder.label("eval_dataset", rows) for name, rows in sets.items()}
        validation = labelled[self._chosen_by]
        if validation is None:
            args.eval_strategy = IntervalStrategy.NO
            args.do_eval = False
        self._own_metrics = compute_metrics
        if compute_metrics is not None and group.is_single:  # the names of the user's metrics are not known
            args.metric_for_best_model = args.metric_for_best_model or "loss"
        self._head_args = self._fill_arguments(len(train or ()), head_args or {}, left_out or {})
        is_known = not group.is_single or (args.greater_is_better and compute_metrics is None)
        if validation is not None and is_known:
            check_metric(self._metric, labels_of(validation), group.config)
        args.metric_for_best_model = "_".join(filter(None, (self._chosen_by, self._metric)))
        check_threshold_rule(group.config, args.max_false_positive_rate, args.threshold_rule)
        if compute_loss_func is None:
            compute_loss_func = self._create_loss(train)

        learned = encoder.encode("train_dataset", train, learned=True)
        if left_out:
            learned = TrainingRows(learned, learned_by=learners(range(len(learned)), self.heads, left_out))
        if args.token_loss is not None and getattr(learned, "reply_lengths", None) is None and learned is not None:
            raise ProbeError(f"token_loss={args.token_loss!r} needs training rows with replies: chats, or probe_mask")
        judged = {name: encoder.encode("eval_dataset", rows) for name, rows in labelled.items()}
        with warnings.catch_warnings():
            # The parent does not smooth several labels a row; `ProbeLoss` does.
            warnings.filterwarnings("ignore", message="Label smoothing is not compatible")
            super().__init__(
                model=group,
                args=args,
                data_collator=data_collator or collate_in_parts,
                train_dataset=learned,
                eval_dataset=judged.get("", judged),
                processing_class=encoder.tokenizer,
                compute_loss_func=compute_loss_func,
                compute_metrics=self._measure,
                callbacks=[self._best_epochs, *(callbacks or ())],
                **kwargs,
            )

    @property
    def heads(self) -> dict[str, ProbeModel]:
        """The heads by name; a single head has the name `"head"`."""
        return dict(self.model.heads)

    @property
    def progress(self) -> dict[str, Progress]:
        """The evaluations of each head so far, by name."""
        return self._best_epochs.progress

    @property
    def results(self) -> Any:
        """Results of a single head, or of several heads by name; None for a head that `judge` has not measured."""
        return self._of_all({name: head.results for name, head in self.heads.items()})

    def _of_all(self, by_head: Mapping[str, Any]) -> Any:
        """Return the value of a single head, or the values of several heads by name."""
        return by_head[SINGLE] if self.model.is_single else dict(by_head)

    # Arguments

    @property
    def _metric(self) -> str:
        """The metric that chooses a head, without the name of the evaluation rows."""
        return self.args.metric.removeprefix(f"{self._chosen_by}_")

    def _fill_arguments(
        self,
        rows: int,
        head_args: Mapping[str, Mapping[str, object]],
        left_out: Mapping[str, Sequence[int]],
    ) -> dict[str, JSON]:
        """Choose the arguments that are open. Return the arguments of each head that differ."""
        if unknown := {*head_args, *left_out} - set(self.heads):
            raise ProbeError(f"there is no head {min(unknown)!r} in model={{name: head}}: {', '.join(self.heads)}")
        if unknown := {name for values in head_args.values() for name in values} - set(HEAD_ARGS):
            raise ProbeError(f"head_args has {min(unknown)!r}; allowed: {', '.join(HEAD_ARGS)}")
        by_type = {name: self.args.open_for(head.config) for name, head in self.heads.items()}
        self.args.fill(self.model.config, rows)
        differing: dict[str, JSON] = {}
        for name, values in by_type.items():
            differing[name] = {key: value for key, value in values.items() if value != getattr(self.args, key)}
            differing[name] |= head_args.get(name, {})
        return differing

    def _create_loss(self, train: LabelledTexts | Dataset | None) -> Callable[..., torch.Tensor]:
        """Return a loss for the Trainer: the sum of the losses of the heads."""
        losses = {}
        for name, head in self.heads.items():
            args = vars(self.args) | self._head_args[name]
            labels = None if train is None or args["class_weights"] != "balanced" else labels_of(train)
            losses[name] = ProbeLoss.create(head.config, args, labels)

        def total(outputs: GroupOutput, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
            parts = [loss(outputs.by_head[name], labels, num_items_in_batch) for name, loss in losses.items()]
            return torch.stack(parts).sum()

        return total

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs) -> TrainOutput:
        """Train the heads; see `Trainer.train`. Then `judge` them."""
        self._best_epochs.progress = {name: Progress() for name in self.heads}
        last = last_checkpoint(Path(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last or True  # the parent would take a checkpoint that a kill has cut short
        elif last and not resume_from_checkpoint and self.args.should_save:
            logger.warning(f"{last} is of an earlier run: train(resume_from_checkpoint=True) continues it")
        if isinstance(resume_from_checkpoint, str):
            self._best_epochs.progress = read_progress(Path(resume_from_checkpoint) / BEST_NAME)
        for head in self.heads.values():
            if head.config.weights_sha256 is not None:  # a head that was loaded: its figures are of earlier weights
                fitted = {"temperature": 1.0, "threshold": None, "thresholds": None, "weights_sha256": None}
                head.config = head.config.replace(**fitted)
                head.results = None
        output = super().train(resume_from_checkpoint, trial, **kwargs)
        self.judge()
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with groups of parameters for each head."""
        if self.optimizer is not None:
            return self.optimizer
        groups = []
        for name, head in self.heads.items():
            args = vars(self.args) | self._head_args[name]
            decayed = self.get_decay_parameter_names(head)
            for is_decayed, decay in ((True, args["weight_decay"]), (False, 0.0)):
                parameters = [p for key, p in head.named_parameters() if (key in decayed) == is_decayed]
                groups.append({"params": parameters, "weight_decay": decay, "lr": args["learning_rate"]})
        optimizer, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = optimizer(groups, **kwargs)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradient of a batch, of a batch with many tokens part by part; see `Trainer.training_step`."""
        if "parts" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        parts = inputs["parts"]
        losses = []
        for number, batch in enumerate(parts, 1):
            # The ranks may have different numbers of parts, and meet once a step.
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch, num_items_in_batch))
        return torch.stack(losses).sum()

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        self.accelerator.unscale_gradients()
        limit = self.args.max_grad_norm
        return torch.stack([nn.utils.clip_grad_norm_(head.parameters(), limit) for head in self.heads.values()]).max()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # a checkpoint is complete once the main rank has written the state

    def hyperparameter_search(self, *args, **kwargs) -> Any:
        """Raise `ProbeError`: the `search` of a recipe tries configurations, which share the pass of the backbone."""
        raise ProbeError(f"hyperparameter_search {_NO_SEARCH}")

    # Evaluation

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the heads on a table as well, or on several by name; see `Trainer.evaluate`."""
        # Evaluations of the training count; evaluations of callbacks do not.
        chooses = eval_dataset is None and metric_key_prefix == "eval" and self.control.should_evaluate
        if not (isinstance(eval_dataset, str) or self._encoder.is_several(eval_dataset)):  # the parent evaluates each
            eval_dataset = self._encoder("eval_dataset", eval_dataset)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if chooses and self.args.load_best_model_at_end:
            scores = {}
            for name in self.heads:
                rows_and_metric = filter(None, ("eval", self._chosen_by, self.metric_name(name, self._metric)))
                value = metrics.get("_".join(rows_and_metric))
                scores[name] = value if value is None or self.args.greater_is_better else -value
            stops = self._best_epochs.note(scores, self.state.epoch, self.args.patience)
            self.control.should_training_stop |= stops
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Score a batch, a batch with many tokens part by part; see `Trainer.prediction_step`."""
        if "parts" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        parts = inputs["parts"]
        rows = torch.tensor([place for places in parts.places for place in places])
        losses: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []
        for places, batch in zip(parts.places, parts, strict=True):
            loss, part, _ = super().prediction_step(model, batch, prediction_loss_only, ignore_keys)
            if loss is not None:
                losses.append(loss * (len(places) / len(rows)))
            if part is not None:
                logits.append(part)
        mean_loss = torch.stack(losses).sum() if losses else None
        if not logits:
            return mean_loss, None, None
        labels = self._prepare_inputs({"labels": inputs["labels"]})["labels"] if "labels" in inputs else None
        return mean_loss, torch.cat(logits)[rows.argsort()], labels

    def metric_name(self, head: str, metric: str) -> str:
        """Return the name of a head's metric in an evaluation. The metrics of a single head have no prefix."""
        return metric if self.model.is_single else f"{head}_{metric}"

    def _measure(self, evaluated: EvalPrediction) -> dict[str, float | None]:
        """Return the metrics of all heads, and the results of the user's `compute_metrics`."""
        values: dict[str, float | None] = {}
        by_head = evaluated.predictions.reshape(len(evaluated.predictions), len(self.heads), -1)
        for place, (name, head) in enumerate(self.heads.items()):
            rows = ~np.isnan(by_head[:, place]).any(axis=-1)  # `HeadGroup` marks the rows that are not for this head
            logits = by_head[rows, place]
            metrics: dict[str, float | None] = {self._metric: -math.inf}
            if len(logits) and np.isfinite(logits).all():
                part = EvalPrediction(predictions=logits, label_ids=evaluated.label_ids[rows])
                metrics = metrics_of(head.config)(part)
            values |= {self.metric_name(name, key): value for key, value in metrics.items()}
        if not self.model.is_single:
            scores = [values[self.metric_name(name, self._metric)] for name in self.heads]
            values[self._metric] = max(-math.inf if score is None else score for score in scores)
        return values if self._own_metrics is None else values | self._own_metrics(evaluated)

    def get_test_dataloader(self, test_dataset: object) -> DataLoader:
        """Return the batches of `test_dataset` in its order. It may be a table without labels."""
        dataset = self._encoder("test_dataset", test_dataset)
        return self._get_dataloader(dataset, "test", self.args.eval_batch_size, SequentialSampler)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Any:
        if self._own_metrics is not None:  # metrics of the user may know the rows by their order
            return SequentialSampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset)

    def judge(self) -> None:
        """Fit temperature and threshold on the evaluation rows, fit novelty, and measure the heads on the evaluation rows.

        Each head then has the `results` that `save_model` writes into `results.json` and the card. A head that diverged beside
        other heads has no results. Without evaluation rows nothing is fitted.
        """
        train = self.train_dataset
        validation = self.eval_dataset
        if validation is None:
            return
        if isinstance(validation, dict):
            validation = validation[self._chosen_by]
        parts = {"train": train, "validation": validation}
        rows = {name: {"source": "own rows", "rows": len(part)} for name, part in parts.items() if part is not None}
        logits_by_head = dict(zip(self.heads, predict_together(list(self.heads.values()), validation), strict=True))
        for name, logits in logits_by_head.items():
            head = self.heads[name]
            if not self.model.is_single and not bool(logits.isfinite().all()):
                continue
            head.config, decided = decide(head.config, logits, labels_of(validation), self.args)
            runs = [{"seed": self.args.seed, "epochs": self.state.epoch, **decided}]
            head.results = basic_results(head, self.args, rows, self._head_args[name], runs)
            inspect(head, "validation", validation, logits)
            add_novelty(head, self.args, train, validation)
        self.logits = self._of_all(logits_by_head)

    # Files and the Hub

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the head into a folder: config, weights, results and card. Checkpoints have the Trainer's own files."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                write_progress(Path(output_dir or self.args.output_dir) / BEST_NAME, self.progress)
            return
        if self.args.should_save:
            self._save_heads(output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def _save_heads(self, output_dir: str | None = None) -> Path:
        """Write a single head into a folder, several heads into folders of their names inside. Return the folder."""
        folder = Path(output_dir or self.args.output_dir)
        for name, head in self.heads.items():
            head.save_pretrained(folder if self.model.is_single else folder / name)
        return folder

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None, **kwargs
    ) -> CommitInfo | None:
        """Write the head into its folder, and upload it in one commit: config, weights, results and card, and no pickle.

        The repository is `args.hub_model_id`, or the user's with the name of the folder.

        Args:
            blocking: has no effect; heads are small.
            kwargs: `revision`, `private`, `tags`, `license` and the like; see `push_folder`.
        """
        if not self.is_world_process_zero():
            return None
        folder = self._folder_to_push()  # before the Hub can refuse
        repo_id = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
        kwargs = {"private": self.args.hub_private_repo} | {k: v for k, v in kwargs.items() if k not in _CARD_FACTS}
        kwargs |= {"revision": kwargs.get("revision") or self.args.hub_revision, "token": token or self.args.hub_token}
        return push_folder(folder, repo_id, commit_message=commit_message, **kwargs)

    def _folder_to_push(self) -> Path:
        if not self.model.is_single:
            raise ProbeError("push each of several heads by itself: trainer.heads[name].push_to_hub(repo_id)")
        return self._save_heads()

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the head and its card into its folder, instead of the card of the parent, which has no labels."""
        if self.args.should_save:
            self._save_heads()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent would upload training_args.bin, a pickle, and weights without a config.
        if self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(f"Training in progress, epoch {self.state.epoch:.0f}")
