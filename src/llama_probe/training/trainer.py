"""`ProbeTrainer`, the Trainer of transformers for heads, from labelled rows to heads that can be saved; and that of a recipe."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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
from ..heads.probe import ProbeModel
from ..hub.publish import push_folder
from .arguments import ProbeTrainingArguments
from .choosing import ChosenHead, TrainedHeads, choose, save
from .defaults import head_for_rows
from .head_group import SINGLE, HeadGroup
from .measuring import measure
from .plan import Plan, States, compute_states, create_heads, make_plan, training_rows, validation_rows
from .progress import BEST_NAME, BestEpochs, Progress, last_checkpoint, read_progress, write_progress
from .recipe import Recipe
from .recipe_rows import read_rows
from .results import basic_results, decide, inspection, novelty
from .row_encoder import RowEncoder
from .rows import labels_of
from .trainer_inputs import (
    NO_SEARCH,
    EvaluationRows,
    check_model,
    checked_arguments,
    fill_arguments,
    learned_rows,
    total_loss,
)


logger = logging.get_logger(__name__)

# Arguments of `push_to_hub` for the card of the Trainer. The card of a head says these facts by itself.
_CARD_FACTS = {"model_name", "finetuned_from", "tasks", "language", "dataset", "dataset_tags", "dataset_args"}


class ProbeTrainer(Trainer):
    """A `Trainer` for heads on a frozen backbone. Takes texts, chats or token ids with labels.

    After training it fits temperature and threshold on the rows of `eval_dataset`, and novelty on all rows. `save_model` and
    `push_to_hub` then write a head with its results and its card. Under `torchrun` it trains with DDP, which synchronises
    only the head. The frozen backbone may be sharded with FSDP: apply `fully_shard` to each layer and to the decoder
    (`lm.model`), which is what heads run.

    Several heads of one data set learn side by side, from one pass of the backbone: each as if it were alone, with its best
    epoch. `from_recipe` makes all of this from a recipe.

    Example:
        >>> trainer = ProbeTrainer(backbone="HuggingFaceTB/SmolLM2-135M-Instruct", train_dataset=[("Well done!", "good"), ...])
        >>> trainer.train()
        >>> trainer.save_model("mood")

    Args:
        model: a head, new or from `ProbeModel.from_pretrained`, or heads by name; with a backbone if the rows are texts or token
            ids. Heads by name read the same tokens; their layers, types and seeds may differ.
        args: defaults to `ProbeTrainingArguments()`.
        data_collator, compute_loss_func, compute_metrics: default to `collate_in_parts`, the `ProbeLoss` that `args` describe, and
            the metrics of the head's problem type. `compute_metrics` adds to these. With it the loss chooses a single head by
            default; of several heads it gets predictions `[rows, heads, num_labels]`.
        train_dataset, eval_dataset: a `datasets.Dataset`, a DataFrame, a dict of columns or a list of rows, with the columns
            of `rows_in_memory`, whose states are computed here unless `args.cache_states` is False; or a `PromptDataset` or
            `StateDataset`, which is taken as it is. Of several `eval_dataset` by name the first, or the one that
            `metric_for_best_model` names, chooses epochs and thresholds; the others are measured.
        processing_class: the backbone's tokenizer, for texts. `backbone` as a name brings its own.
        model_init: refused, as `hyperparameter_search` is: the `search` of a recipe tries configurations.
        callbacks, kwargs: as in `Trainer`.
        backbone: instead of `model`: a folder, a Hub id, `"demo"`, or a loaded LM. The head is then made for the labels.
        probe_config: fields of `ProbeConfig` of the head for `backbone`. Missing fields are chosen.
        column_mapping: names from the rows to the columns above, such as `{"review": "text"}`.
        head_args: head -> the training arguments of it that differ, some of `HEAD_ARGS` in `training/search.py`.
        left_out: head -> numbers of the training rows that it does not learn from.

    Attributes:
        heads: the heads by name; a single one has the name `"head"`.
        progress: how each head has done in the evaluations, by name.
        results: contents of `results.json` after training; of several heads a dict by name.
        logits (`[rows, num_labels]`): logits of the evaluation rows after training; of several heads a dict by name.

    Raises:
        ProbeError: the rows, the head and the arguments do not fit each other.
    """

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
        self.args = args = checked_arguments(args)
        check_model(model, backbone, probe_config, model_init)
        if backbone is not None:
            made = head_for_rows(backbone, dict(probe_config or {}), train_dataset, column_mapping, processing_class)
            model, train_dataset, processing_class = made
        self.model = group = HeadGroup(model)
        if is_tensor_parallel(group.backbone):
            raise ProbeError("a Trainer divides the rows, which a backbone with a tp_plan needs in all processes")
        self._best_epochs = BestEpochs(self.heads)
        self.logits: torch.Tensor | dict[str, torch.Tensor] | None = None
        self._own_metrics = compute_metrics

        self._encoder = encoder = RowEncoder(group, args, processing_class, column_mapping)
        train = encoder.label("train_dataset", train_dataset, learned=True)
        evaluated = EvaluationRows.read(encoder, eval_dataset, args.metric_for_best_model)
        self._chosen_by = evaluated.chosen_by
        self._head_args = self._fill_arguments(train, evaluated, head_args or {}, left_out or {})
        compute_loss_func = compute_loss_func or total_loss(group, args, self._head_args, train)
        learned = learned_rows(encoder, train, group, left_out or {}, args.token_loss)
        judged = evaluated.encode(encoder)
        with warnings.catch_warnings():
            # The parent does not smooth several labels a row; `ProbeLoss` does.
            warnings.filterwarnings("ignore", message="Label smoothing is not compatible")
            super().__init__(
                model=group,
                args=args,
                data_collator=data_collator or collate_in_parts,
                train_dataset=learned,
                eval_dataset=judged,
                processing_class=encoder.tokenizer,
                compute_loss_func=compute_loss_func,
                compute_metrics=self._measure,
                callbacks=[self._best_epochs, *(callbacks or ())],
                **kwargs,
            )

    @classmethod
    def from_recipe(
        cls,
        recipe: str | os.PathLike | Mapping[str, object] | Recipe,
        *,
        backbone: str | os.PathLike | PreTrainedModel,
        output_dir: str | os.PathLike = "head",
        settings: Sequence[str] = (),
        data_dir: str | os.PathLike | None = None,
        dtype: str = "auto",
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> RecipeTrainer:
        """Prepare a recipe: read its rows, load the backbone, compute the hidden states, and make the heads.

        `train()` then trains and calibrates, writes the head into `output_dir`, and measures it. `save_model()` writes the head
        with its recipe, results and card, and deletes the states and checkpoints in `output_dir`.

        Example:
            >>> trainer = ProbeTrainer.from_recipe("guard", backbone="Qwen/Qwen2.5-1.5B-Instruct", output_dir="my-guard")
            >>> trainer.train()
            >>> trainer.save_model()

        Args:
            recipe: name of a recipe of the package, a YAML file, a head folder, or its values; see `Recipe`.
            backbone: `"demo"`, a folder, a Hub id, or a loaded LM (with `processing_class`, its tokenizer).
            settings: fields of the recipe to change, such as `"seeds=3"` or `"licence=commercial"`.
            data_dir: folder of local copies of the sources: `DIR/NAME/SPLIT.jsonl.gz`.
            dtype: of the backbone's weights.
            kwargs: of `ProbeTrainer`.

        `train(resume_from_checkpoint=True)` also continues a run that was stopped before its first checkpoint, or after its
        training.

        Raises:
            ProbeError: a field of the recipe is wrong, a source cannot be read, or the disk is too small. Raised before the
                backbone is loaded.
        """
        meet()
        backbone = backbone if isinstance(backbone, nn.Module) else str(backbone)
        loaded = Recipe.load(recipe, settings)
        rows = read_rows(loaded, data_dir)
        output = Path(output_dir).expanduser()
        plan = make_plan(loaded, rows, output, backbone, processing_class, dtype)
        return RecipeTrainer(plan, compute_states(plan), **kwargs)

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
        train: LabelledTexts | Dataset | None,
        evaluated: EvaluationRows,
        head_args: Mapping[str, Mapping[str, object]],
        left_out: Mapping[str, Sequence[int]],
    ) -> dict[str, JSON]:
        """Choose the arguments that are open, and check the metric. Return the arguments of each head that differ."""
        args = self.args
        group = self.model
        if evaluated.chosen is None:
            args.eval_strategy = IntervalStrategy.NO
            args.do_eval = False
        if self._own_metrics is not None and group.is_single:  # the names of the user's metrics are not known
            args.metric_for_best_model = args.metric_for_best_model or "loss"
        differing = fill_arguments(group, args, len(train or ()), head_args, left_out)
        is_known = not group.is_single or (args.greater_is_better and self._own_metrics is None)
        if evaluated.chosen is not None and is_known:
            check_metric(self._metric, labels_of(evaluated.chosen), group.config)
        args.metric_for_best_model = "_".join(filter(None, (self._chosen_by, self._metric)))
        check_threshold_rule(group.config, args.max_false_positive_rate, args.threshold_rule)
        return differing

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs) -> TrainOutput:
        """Train the heads; see `Trainer.train`. Then `judge` them."""
        output = self._learn(resume_from_checkpoint, trial, **kwargs)
        self.judge()
        return output

    def _learn(self, resume_from_checkpoint: str | bool | None, trial: Any = None, **kwargs) -> TrainOutput:
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
        return super().train(resume_from_checkpoint, trial, **kwargs)

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
        # One number of the global generator a batch: the order of the rows does not depend on the number of parts.
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
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
        raise ProbeError(f"hyperparameter_search {NO_SEARCH}")

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
            head.results["inspection"] = inspection(head, "validation", validation, logits)
            head.results |= novelty(head, self.args, rows, train, validation)
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


class RecipeTrainer(ProbeTrainer):
    """The trainer of a recipe; see `ProbeTrainer.from_recipe`."""

    def __init__(self, plan: Plan, states: States, **kwargs: Any):
        head_args = {name: member.training for name, member in plan.members.items()}
        rows = {"train_dataset": training_rows(plan, states), "eval_dataset": validation_rows(plan, states)}
        super().__init__(create_heads(plan), plan.args, **rows, head_args=head_args, **kwargs)
        self._encoder.tokenizer = plan.prompts.tokenizer  # the parent would save a tokenizer with each checkpoint
        self.plan = plan
        self.states = states
        self.chosen: ChosenHead | None = None

    @property
    def results(self) -> JSON | None:
        """Results of the head that was chosen; None before it is chosen."""
        return None if self.chosen is None else self.chosen.results

    def train_heads(self, resume: bool = False) -> TrainedHeads:
        """Train the heads, or read those of a stopped run whose training has ended. None is chosen yet."""
        self._learn(resume)
        return TrainedHeads(self.heads, self.progress)

    def _learn(self, resume_from_checkpoint: str | bool | None, trial: Any = None, **kwargs) -> TrainOutput:
        folder = self.plan.folder
        trained = folder.read_trained() if resume_from_checkpoint else None
        if trained is not None:
            self._best_epochs.progress = trained
            self._best_epochs.load_weights()
            return TrainOutput(0, 0.0, {})
        folder.forget_training()
        if resume_from_checkpoint is True and last_checkpoint(folder.checkpoints) is None:
            resume_from_checkpoint = None
        output = super()._learn(resume_from_checkpoint, trial, **kwargs)
        # A head without evaluations has learned to the end.
        self._best_epochs.progress = {
            name: Progress(each.scores, each.epochs or self.state.epoch, self.heads[name].state_dict())
            for name, each in self.progress.items()
        }
        folder.write_trained(self.progress)
        return output

    def judge(self) -> None:
        """Choose the best head, write it into the folder of the run, and measure it."""
        trained = TrainedHeads(self.heads, self.progress)
        self.chosen = choose(self.plan, self.states, trained)
        save(self.plan, self.chosen)
        self.chosen = measure(self.plan, self.states, trained, self.chosen)

    def _save_heads(self, output_dir: str | None = None) -> Path:
        if self.chosen is None:
            raise ProbeError("the recipe has no head yet: call train() first")
        folder = Path(output_dir or self.plan.folder.path)
        save(self.plan, self.chosen, folder)
        self.plan.folder.clean(keep_states=self.plan.args.cache_dir is not None)
        return folder

    def _folder_to_push(self) -> Path:
        return self._save_heads()
