"""`ProbeTrainer`: the Trainer of transformers for heads, from labelled rows to a head that can be saved."""

from __future__ import annotations

import copy
import math
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import BestRun, EvalPrediction, HubStrategy, IntervalStrategy, TrainOutput
from transformers.utils import logging

from ..backbone.decoder import is_tensor_parallel
from ..backbone.loading import load_backbone
from ..data.batches import collate
from ..data.disk_states import DiskStates, cached_for
from ..data.labelled_texts import LabelledTexts, check_labels
from ..data.memory import is_tokenized, rows_in_memory
from ..data.prompts import PromptDataset, PromptFormat
from ..distributed import is_main, meet
from ..errors import ProbeError
from ..evaluation.calibration import check_threshold_rule
from ..evaluation.metrics import check_metric
from ..evaluation.metrics import compute_metrics as metrics_of
from ..evaluation.prediction import predict_together
from ..files import JSON
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.decision import NO_NUMBER_BECAUSE
from ..heads.probe import ProbeModel
from ..heads.rules import PROMPT_FORMATS
from ..hub.publish import push_folder
from .arguments import ProbeTrainingArguments
from .defaults import head_config
from .estimate import keeps_states
from .head_group import GroupLoss, HeadGroup
from .loss import ProbeLoss
from .prepared import STATES, PreparedRun
from .progress import Progress, last_checkpoint, read_progress, write_progress
from .recipe import Recipe
from .results import add_results, decide, finish, save_head
from .rows import TrainingRows, labels_of, learners
from .search import HEAD_ARGS, SEARCH_SPACE, draw


logger = logging.get_logger(__name__)

# What scripts tell the card of the Trainer, and the card of a head says by itself.
_CARD_FACTS = {"model_name", "finetuned_from", "tasks", "language", "dataset", "dataset_tags", "dataset_args"}
# By folder. Trainers in one folder share its states, which go with the last of them: Python may free one while the next begins.
_CACHES: weakref.WeakValueDictionary[str, DiskStates] = weakref.WeakValueDictionary()


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
            ids. Heads by name read the same tokens; their layers, kinds and seeds may differ.
        args: defaults to `ProbeTrainingArguments()`.
        data_collator, compute_loss_func, compute_metrics: default to `collate`, the `ProbeLoss` that `args` describe, and
            the metrics of the head's problem type. With `compute_metrics` the loss chooses a single head by default. Of several
            heads it gets predictions `[rows, heads, num_labels]`, and adds to the metrics that choose them.
        train_dataset, eval_dataset: a `datasets.Dataset`, a DataFrame, a dict of columns or a list of rows, with the columns
            of `rows_in_memory`, whose states are computed here unless `args.cache_states` is False; or a `PromptDataset` or
            `StateDataset`, which is taken as it is. Of several `eval_dataset` by name the first, or the one that
            `metric_for_best_model` names, chooses epochs and thresholds; the others are measured.
        processing_class: the backbone's tokenizer, for texts. `backbone` as a name brings its own.
        model_init, callbacks, kwargs: as in `Trainer`.
        backbone: instead of `model`: a folder, a Hub id, `"demo"`, or a loaded LM. The head is then made for the labels.
        probe_config: fields of `ProbeConfig` of the head for `backbone`. Missing fields are chosen.
        column_mapping: names from the rows to the columns above, such as `{"review": "text"}`.
        head_args: head -> the training arguments of it that differ: `learning_rate`, `weight_decay`, `label_smoothing_factor`,
            `focal_gamma`, `class_weights`. For heads by name.
        left_out: head -> numbers of the training rows that it does not learn from. For heads by name.

    Attributes:
        heads: the heads by name; a single one has the name `"head"`.
        progress: how each head has done in the evaluations, by name.
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
        self.args = args = copy.copy(args) if args is not None else ProbeTrainingArguments()
        if not isinstance(args, ProbeTrainingArguments):
            raise ProbeError(f"args must be ProbeTrainingArguments, not {type(args).__name__}")
        args.check()
        if sum(source is not None for source in (model, model_init, backbone)) != 1:
            raise ProbeError("give one of model=ProbeModel(...), model_init= and backbone=")
        if probe_config is not None and backbone is None:
            raise ProbeError("probe_config needs backbone=; a model has its own config")
        if unknown := set(probe_config or ()) - {item.name for item in fields(ProbeConfig)}:
            raise ProbeError(f"probe_config has no {min(unknown)!r}; learning rates and the like go into args=")
        self._columns, self._tokenizer = column_mapping, processing_class
        self._recorded: JSON = {}
        self._run: PreparedRun | None = None
        self._chosen: ProbeModel | None = None
        self.logits: torch.Tensor | dict[str, torch.Tensor] | None = None
        if backbone is not None:
            model, train_dataset = self._create_head(backbone, dict(probe_config or {}), train_dataset)
            config, lm = model.config, model.backbone
            model_init = lambda: ProbeModel(config, backbone=lm)  # noqa: E731 - each run of the trainer starts anew
        elif model is None:
            self.model_init = model_init
            model = super().call_model_init()
        self.model = model = HeadGroup(model) if isinstance(model, Mapping) else model
        self._is_group = isinstance(model, HeadGroup)
        if not isinstance(model, ProbeModel | HeadGroup):
            raise ProbeError(f"model must be a ProbeModel, not {type(model).__name__}; backbone= takes an LM")
        self.progress = {name: Progress() for name in self.heads}
        by_kind = {name: args.by_kind(head.config) if self._is_group else {} for name, head in self.heads.items()}
        self._head_args = {name: values | dict((head_args or {}).get(name, {})) for name, values in by_kind.items()}
        if unknown := {*(head_args or ()), *(left_out or ())} - set(self.heads if self._is_group else ()):
            raise ProbeError(f"there is no head {min(unknown)!r} in model={{name: head}}: {', '.join(self.heads)}")
        if unknown := {name for values in self._head_args.values() for name in values} - set(HEAD_ARGS):
            raise ProbeError(f"head_args has {min(unknown)!r}; allowed: {', '.join(HEAD_ARGS)}")
        if is_tensor_parallel(model.backbone):
            raise ProbeError("a Trainer divides the rows, which a backbone with a tp_plan needs in all processes")
        train = self._label("train_dataset", train_dataset, learned=True)
        sets = eval_dataset if self._is_several(eval_dataset) else {"": eval_dataset}
        named = (args.metric_for_best_model or "").removeprefix("eval_")
        judging = max((name for name in sets if named.startswith(f"{name}_")), key=len, default=next(iter(sets)))
        self._judging = f"{judging}_" if judging else ""
        labelled = {name: self._label("eval_dataset", rows) for name, rows in sets.items()}
        validation = labelled[judging]
        if compute_metrics is not None and not self._is_group:  # whose names are not known
            args.metric_for_best_model = args.metric_for_best_model or "loss"
        if validation is None:
            args.eval_strategy, args.do_eval = IntervalStrategy.NO, False
        args.fill(model.config, len(train or ()))
        # Each of several heads is chosen by `_measure`, which knows no loss or error, whatever the user measures of them.
        if validation is not None and (self._is_group or (args.greater_is_better and compute_metrics is None)):
            check_metric(self._metric, labels_of(validation), model.config)
        if compute_metrics is not None and self._is_group:
            compute_metrics = partial(self._measure, further=compute_metrics)
        args.metric_for_best_model = self._judging + self._metric
        check_threshold_rule(model.config, args.max_false_positive_rate, args.threshold_rule)
        self._has_own_loss = compute_loss_func is None
        if compute_loss_func is None:
            compute_loss_func = self._create_loss(train)
        learned = self._encode("train_dataset", train, learned=True)
        if left_out:
            learned = TrainingRows(learned, learned_by=learners(range(len(learned)), self.heads, left_out))
        if args.token_loss is not None and getattr(learned, "reply_lengths", None) is None and learned is not None:
            raise ProbeError(f"token_loss={args.token_loss!r} needs training rows with replies: chats, or probe_mask")
        judged = {name: self._encode("eval_dataset", rows) for name, rows in labelled.items()}
        with warnings.catch_warnings():
            # The parent smooths no labels of several at once. The loss does.
            warnings.filterwarnings("ignore", message="Label smoothing is not compatible")
            super().__init__(
                model=model if model_init is None else None,
                args=args,
                data_collator=data_collator or collate,
                train_dataset=learned,
                eval_dataset=judged.get("", judged),
                processing_class=self._tokenizer,
                model_init=model_init,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics or self._measure,
                callbacks=list(callbacks or []),
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
        licence: str | None = None,
        dtype: str = "auto",
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> ProbeTrainer:
        """Prepare a recipe: read its rows, load the backbone, compute the hidden states, and make the heads.

        `train()` then trains, calibrates and measures, and `save_model()` writes the head into `output_dir` with its recipe,
        results and card. Checkpoints are in `output_dir` until then.

        Example:
            >>> trainer = ProbeTrainer.from_recipe("guard", backbone="Qwen/Qwen2.5-1.5B-Instruct", output_dir="my-guard")
            >>> trainer.train()
            >>> trainer.save_model()

        Args:
            recipe: name of a recipe of the package, a YAML file, a head folder, or its values; see `Recipe`.
            backbone: `"demo"`, a folder, a Hub id, or a loaded LM (with `processing_class`, its tokenizer).
            settings: fields to change, such as `"training.learning_rate=1e-3"`.
            data_dir: folder of local copies of the sources: `DIR/NAME/SPLIT.jsonl.gz`.
            licence: `"commercial"` leaves out the rows whose licence forbids commercial use, or is not known.
            dtype: of the backbone's weights.
            kwargs: of `ProbeTrainer`.

        Raises:
            ProbeError: a field of the recipe is wrong, a source cannot be read, or the disk is too small. Raised before the
                backbone is loaded.
        """
        meet()
        if licence is not None:
            settings = [*settings, f"licence={licence}"]
        backbone = backbone if isinstance(backbone, nn.Module) else str(backbone)
        loaded = Recipe.load(recipe, settings)
        run = PreparedRun(loaded, Path(output_dir).expanduser(), backbone, processing_class, data_dir, dtype)
        return cls.from_prepared(run, **kwargs)

    @classmethod
    def from_prepared(cls, run: PreparedRun, **kwargs) -> ProbeTrainer:
        """Return the trainer of a recipe that is ready to train. See `from_recipe`."""
        head_args = {name: member.training for name, member in run.members.items()}
        trainer = cls(run.heads, run.args, None, run.learned(), run.judged(), head_args=head_args, **kwargs)
        trainer._run, trainer._tokenizer = run, run.prompts.tokenizer  # the parent would save one with each checkpoint
        return trainer

    # Rows

    @property
    def heads(self) -> dict[str, ProbeModel]:
        """The heads by name; a single one has the name `"head"`."""
        return dict(self.model.heads) if self._is_group else {"head": self.model}

    @property
    def results(self) -> JSON | None:
        """Results of the head of a recipe, or of a single head; None before `judge`."""
        return (self._chosen or next(iter(self.heads.values()))).results

    @cached_property
    def _cache(self) -> DiskStates:
        if self.args.cache_dir is not None:
            return DiskStates(self.args.cache_dir)
        folder = os.path.abspath(Path(self.args.output_dir) / STATES)
        cache = _CACHES.setdefault(folder, DiskStates(folder))
        if is_main():  # now: at the end of the program the ranks may have left their group
            weakref.finalize(cache, shutil.rmtree, folder, ignore_errors=True)
        return cache

    def _create_head(self, backbone: Any, head: JSON, data: object) -> tuple[ProbeModel, LabelledTexts]:
        """Read the training rows, load the backbone, and make a head for the labels of the rows."""
        names = list(head["id2label"].values()) if head.get("id2label") else None
        rows = rows_in_memory("train_dataset", data, self._columns, names, head.get("problem_type"))
        backbone = backbone if isinstance(backbone, nn.Module) else str(backbone)
        config = head_config(head, rows, len(rows), backbone)
        if isinstance(backbone, str):
            backbone, tokenizer = load_backbone(backbone)
            self._tokenizer = self._tokenizer or tokenizer
        return ProbeModel(config, backbone=backbone), rows

    def _create_loss(self, train: LabelledTexts | Dataset | None) -> ProbeLoss | GroupLoss:
        losses = {}
        for name, head in self.heads.items():
            args = vars(self.args) | self._head_args[name]
            labels = None if train is None or args["class_weights"] != "balanced" else labels_of(train)
            losses[name] = ProbeLoss.create(head.config, args, labels)
        return GroupLoss(losses) if self._is_group else losses["head"]

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self._train_batch_size = self.args.train_batch_size  # the parent's is that of the last trial
        for head in self.heads.values():
            if head.config.weights_sha256 is not None:  # of a head that was loaded; its figures are of other weights
                fitted = {"temperature": 1.0, "threshold": None, "thresholds": None, "weights_sha256": None}
                head.config, head.results = head.config.replace(**fitted), None
        if self._has_own_loss:  # a trial, or the caller, may have changed what it depends on
            self.compute_loss_func = self._create_loss(self.train_dataset)

    def _label(self, name: str, data: object, learned: bool = False) -> LabelledTexts | Dataset | None:
        """Read a table with the labels of the heads, whose configs record what the labels of training rows are called."""
        if data is None or (isinstance(data, Dataset) and not isinstance(data, IterableDataset)):
            return data
        rows, config = data, self.model.config
        names = list(config.id2label.values())
        if not isinstance(rows, LabelledTexts):
            unnamed = learned and names == list(ProbeConfig(num_labels=len(names)).id2label.values())
            given = None if unnamed else names, config.problem_type
            rows = rows_in_memory(name, data, self._columns, *given, needs_labels=name != "test_dataset")
            if unnamed and len(rows.label_names) == len(names):
                # An alphabetical order does not say which label is flagged.
                flagged = config.flagged if rows.label_names == names else rows.flagged
                self._record(id2label=dict(enumerate(rows.label_names)), flagged=flagged)
            rows = rows.renamed(list(self.model.config.id2label.values()))
        if learned:
            check_labels(name, rows)
        return rows

    def _encode(self, name: str, rows: LabelledTexts | Dataset | None, learned: bool = False) -> Dataset | None:
        """Return rows as prompts, or as their hidden states."""
        if not isinstance(rows, LabelledTexts):
            return rows
        config, lm = self.model.config, self.model.backbone
        labels = rows.labels if len(rows.labels) else None
        if lm is None:
            raise ProbeError(f"{name} has texts or token ids, which need ProbeModel(config, backbone=lm)")
        if is_tokenized(rows):
            ids, masks = rows.texts, rows.columns.get("probe_mask")
            lengths = None if masks is None or not config.reads_reply else list(map(sum, masks))
            if lengths is not None:  # what follows a reply, such as the end of its turn, is no part of it
                stops = [max((i for i, counts in enumerate(mask) if counts), default=-1) + 1 for mask in masks]
                ids, masks = ([row[:stop] for row, stop in zip(part, stops, strict=True)] for part in (ids, masks))
            dataset = PromptDataset(ids, labels, masks, lengths)
        else:
            if self._tokenizer is None:
                raise ProbeError(f"{name} has texts: pass the backbone's tokenizer, processing_class=tokenizer")
            if config.prompt_format not in PROMPT_FORMATS:
                config = config.replace(prompt_format="chat" if self._tokenizer.chat_template else "raw")
            prompts = PromptFormat.from_config(config, self._tokenizer)
            self._record(**prompts.config_fields())
            dataset = prompts.encode_for(self.model.config, rows.texts, labels)
        needed = self._cache.bytes_of(self.model.config, self._cache.missing(lm, self.model.config, [dataset]))
        if keeps_states(self.args, needed, self._cache.folder):
            dataset = self._cache.dataset(lm, self.model.config, dataset)
        return TrainingRows(dataset, replies=self.args.replies if learned else "tokens")

    def _record(self, **changes) -> None:
        """Write fields into the configs of the heads, and of those that `model_init` makes."""
        self._recorded |= changes
        for module in (self.model, *self.heads.values()):
            module.config = module.config.replace(**changes)

    def _is_several(self, data: object) -> TypeGuard[Mapping[str, object]]:
        """Return True for several tables by name, False for a dict of columns."""
        names = {(self._columns or {}).get(name, name) for name in data} if isinstance(data, Mapping) else set()
        return bool(names) and names.isdisjoint(("label", "labels"))

    def _table(self, name: str, data: object) -> Dataset | None:
        return self._encode(name, self._label(name, data))

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the heads on a table as well, or on several by name; see `Trainer.evaluate`."""
        if not (isinstance(eval_dataset, str) or self._is_several(eval_dataset)):  # of these the parent evaluates each
            eval_dataset = self._table("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def get_test_dataloader(self, test_dataset: object) -> DataLoader:
        """Return the batches of `test_dataset`, a table without labels as well, in its order, which is that of `predict`."""
        dataset = self._table("test_dataset", test_dataset)
        return self._get_dataloader(dataset, "test", self.args.eval_batch_size, SequentialSampler)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if self.compute_metrics != self._measure:  # the user's may know the rows by their order
            return SequentialSampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset)

    # Training

    def call_model_init(self, trial: Any = None) -> ProbeModel:
        """Make a head with `model_init`. Its config records what the rows have told."""
        probe = super().call_model_init(trial)
        cached = cached_for(getattr(self, "train_dataset", None))
        reads = [
            (config.token_scope, get_probe_type(config.probe_type).reads, config.layer_indices)
            for config in (probe.config, cached or probe.config)
        ]
        if reads[0] != reads[1]:
            raise ProbeError(f"model_init gives heads that read {reads[0]}, not {reads[1]}: use cache_states=False")
        probe.config = probe.config.replace(**self._recorded)
        return probe

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs) -> TrainOutput:
        """Train the heads; see `Trainer.train`. Then `judge` them, if there are evaluation rows."""
        self.progress = {name: Progress() for name in self.heads}
        last = last_checkpoint(Path(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last or True  # the parent would take the half of one that a kill has left
        elif last and not resume_from_checkpoint and trial is None and self.args.should_save:
            logger.warning(f"{last} is of an earlier run: train(resume_from_checkpoint=True) continues it")
        output = super().train(resume_from_checkpoint, trial, **kwargs)
        if trial is None and (self.eval_dataset is not None or self._run is not None):
            self.judge()
        return output

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Do a step, in which dropout draws numbers of its own: a head learns the same beside others as alone."""
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng(devices=[]):  # the CPU's: each step seeds an accelerator anew
            torch.manual_seed(seed)
            return super().training_step(model, inputs, num_items_in_batch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with groups of parameters for each of several heads."""
        if self.optimizer is not None or not self._is_group:
            return super().create_optimizer(model)
        groups = []
        for name, head in self.heads.items():
            args, decayed = vars(self.args) | self._head_args[name], self.get_decay_parameter_names(head)
            for is_decayed, decay in ((True, args["weight_decay"]), (False, 0.0)):
                parameters = [p for key, p in head.named_parameters() if (key in decayed) == is_decayed]
                groups.append({"params": parameters, "weight_decay": decay, "lr": args["learning_rate"]})
        optimizer, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = optimizer(groups, **kwargs)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if not self._is_group:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        limit = self.args.max_grad_norm
        return torch.stack([nn.utils.clip_grad_norm_(head.parameters(), limit) for head in self.heads.values()]).max()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note the evaluation of each head, and stop when none improves any more. Evaluations of callbacks do not count.

        Raises:
            ProbeError: no head gives numbers.
        """
        args, is_best = self.args, super()._determine_best_metric(metrics, trial)
        if args.load_best_model_at_end:
            for name, head in self.heads.items():
                if not self.progress[name].has_stopped(args.patience):
                    value = metrics[f"eval_{self._judging}{self.metric_name(name, self._metric)}"]
                    is_number = value is not None and math.isfinite(value)
                    score = (value if args.greater_is_better else -value) if is_number else -math.inf
                    self.progress[name].note(score, self.state.epoch, head.state_dict())
            heads = self.progress.values()
            if all(head.best == -math.inf for head in heads):
                raise ProbeError(f"none of {len(heads)} heads gives numbers: {NO_NUMBER_BECAUSE}")
            self.control.should_training_stop |= all(head.has_stopped(args.patience) for head in heads)
        return is_best

    def _finalize_training(self, *args) -> TrainOutput:
        for name, head in self.heads.items():
            if self.args.load_best_model_at_end and self.progress[name].weights:
                head.load_state_dict(self.progress[name].weights)
        return super()._finalize_training(*args)

    def _load_best_model(self) -> None:
        pass  # each head has its own best epoch, which is loaded already

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.progress = read_progress(Path(resume_from_checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # a checkpoint is complete once the main rank has written the state

    def judge(self) -> JSON:
        """Fit temperature and threshold on the evaluation rows, fit novelty, and measure the heads on the evaluation rows.

        With a recipe: also calibrate and measure as it says, and choose the best head.

        Returns:
            The head's `results`, which `save_model` writes into `results.json` and the card; of several heads a dict by name.
        """
        if self._run is not None:
            self._chosen = finish(self._run, self.progress, self.state.epoch)
            return self._chosen.results
        train, validation = self.train_dataset, self.eval_dataset
        if isinstance(validation, dict):
            validation = validation[self._judging.removesuffix("_")]
        parts = {"train": train, "validation": validation}
        rows = {name: {"source": "own rows", "rows": len(part)} for name, part in parts.items() if part is not None}
        all_logits = predict_together(list(self.heads.values()), validation)
        for (name, probe), logits in zip(self.heads.items(), all_logits, strict=True):
            if self._is_group and not bool(logits.isfinite().all()):
                continue  # it diverged, and has no results
            probe.config, decided = decide(probe.config, logits, labels_of(validation), self.args)
            add_results(
                probe,
                self.args,
                rows=rows,
                head_args=self._head_args[name],
                runs=[{"seed": self.args.seed, "epochs": self.state.epoch, **decided}],
                inspected=("validation", validation, logits),
                novelty=(train, validation, logits),
            )
        if not self._is_group:
            (self.logits,) = all_logits
            return self.model.results
        self.logits = dict(zip(self.heads, all_logits, strict=True))
        return {name: probe.results for name, probe in self.heads.items() if probe.results}

    @property
    def _metric(self) -> str:
        """The metric that chooses a head, without the name of the rows that it is measured on."""
        return self.args.metric.removeprefix(self._judging)

    def metric_name(self, head: str, metric: str) -> str:
        """Return the name of a head's metric in an evaluation."""
        return f"{head}_{metric}" if self._is_group else metric

    def _measure(self, evaluated: EvalPrediction, further: Callable | None = None) -> dict[str, float | None]:
        # The configs change when the heads are judged.
        if not self._is_group:
            return metrics_of(self.model.config)(evaluated)
        metric, values = self._metric, {}
        for place, (name, head) in enumerate(self.heads.items()):
            predictions, labels = evaluated.predictions[:, place], evaluated.label_ids
            rows = ~np.isnan(predictions).any(axis=-1)  # other rows are not for this head; see `HeadGroup`
            is_number = bool(rows.any() and np.isfinite(predictions[rows]).all())
            part = EvalPrediction(predictions=predictions[rows], label_ids=labels[rows])
            value = metrics_of(head.config)(part)[metric] if is_number else -math.inf
            values[self.metric_name(name, metric)] = value
        values[metric] = max(-math.inf if value is None else value for value in values.values())
        return values if further is None else values | further(evaluated)

    def hyperparameter_search(
        self, hp_space: Callable | None = None, compute_objective: Callable | None = None, n_trials: int = 20, **kwargs
    ) -> BestRun | list[BestRun]:
        """Search hyper-parameters; see `Trainer.hyperparameter_search`. It needs `model_init` or `backbone`.

        Args:
            hp_space: defaults to learning rate, weight decay and batch size, in the ranges of arXiv 2601.13288.
            compute_objective: defaults to the best `metric_for_best_model` of a trial, whose epoch is kept.
        """
        sign, name = 1 if self.args.greater_is_better else -1, f"eval_{self.args.metric}"
        best = compute_objective or (lambda metrics: sign * max(sign * metrics[name], self.progress["head"].best))
        kwargs.setdefault("direction", "maximize" if self.args.greater_is_better else "minimize")
        return super().hyperparameter_search(hp_space or self._suggest, best, n_trials, **kwargs)

    def _suggest(self, trial: Any) -> JSON:
        space = SEARCH_SPACE | get_probe_type(self.model.config.probe_type).search_space
        names = ("learning_rate", "weight_decay")
        return draw(trial, {name: space[name] for name in names} | {"per_device_train_batch_size": [8, 16, 32, 64]})

    # Files and the Hub

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the head into a folder: config, weights, results and card. Checkpoints have the Trainer's own files."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                write_progress(Path(output_dir or self.args.output_dir), self.progress)
            return
        if self.args.should_save:
            self._save_heads(output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def _save_heads(self, output_dir: str | None) -> Path:
        """Write the head of a recipe, a single head, or several heads into folders of their names. Return the folder."""
        folder = Path(output_dir or (self.args.output_dir if self._run is None else self._run.output))
        if self._run is None:
            for name, head in self.heads.items():
                head.save_pretrained(folder / name if self._is_group else folder)
        elif self._chosen is None:
            raise ProbeError("the recipe has no head yet: call train() first")
        else:
            save_head(self._run, self._chosen, folder)
            self._run.clean()
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
        if self._is_group and self._run is None:
            raise ProbeError("push each of several heads by itself: trainer.heads[name].push_to_hub(repo_id)")
        folder = self._save_heads(None)  # before the Hub can refuse
        repo_id = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
        kwargs = {"private": self.args.hub_private_repo} | {k: v for k, v in kwargs.items() if k not in _CARD_FACTS}
        kwargs |= {"revision": kwargs.get("revision") or self.args.hub_revision, "token": token or self.args.hub_token}
        return push_folder(folder, repo_id, commit_message=commit_message, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the head with its own card into its folder: the parent's replaces it, and knows no labels."""
        if self.args.should_save:
            self._save_heads(None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent would upload training_args.bin, a pickle, and weights without a config.
        if self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(f"Training in progress, epoch {self.state.epoch:.0f}")
