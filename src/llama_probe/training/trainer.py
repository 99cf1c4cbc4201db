"""`ProbeTrainer`: the Trainer of transformers for heads, from labelled rows to a head that can be saved."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction, HubStrategy, IntervalStrategy, TrainOutput

from ..backbone.decoder import is_tensor_parallel
from ..backbone.loading import load_backbone
from ..data.memory import is_tokenized, rows_in_memory
from ..data.prompts import EncodedTexts, PromptFormat
from ..data.states import ProbeCollator, StateCache
from ..data.texts import LabelledTexts, check_labels, ends_with_reply
from ..errors import ProbeError
from ..evaluation.calibration import check_threshold_rule
from ..evaluation.metrics import check_metric, default_metric
from ..evaluation.metrics import compute_metrics as metrics_of
from ..evaluation.prediction import predict_logits
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from ..heads.rules import PROMPT_FORMATS
from ..hub.card import CardFacts
from .arguments import ProbeTrainingArguments
from .loss import ProbeLoss
from .options import MAX_LENGTH
from .recipe import COMMON, Recipe, complete, head_config
from .results import add_results, decide
from .rows import CutReplies, as_dataset, labels_of


STATES = ".states"


class ProbeTrainer(Trainer):
    """A `Trainer` for heads on a frozen backbone. Takes texts, chats or token ids with labels.

    After training it fits temperature and threshold on the rows of `eval_dataset`, and novelty on all rows. `save_model` and
    `push_to_hub` then write a head with its results and its card. Under `torchrun` it trains with DDP, which synchronises
    only the head. The frozen backbone may be sharded with FSDP: apply `fully_shard` to each layer and to the decoder
    (`lm.model`), which is what heads run.

    Example:
        >>> trainer = ProbeTrainer(backbone="HuggingFaceTB/SmolLM2-135M-Instruct", train_dataset=[("Well done!", "good"), ...])
        >>> trainer.train()
        >>> trainer.save_model("mood")

    Args:
        model: a head; with a backbone if the rows are texts or token ids.
        args: defaults to `ProbeTrainingArguments()`.
        data_collator, compute_loss_func, compute_metrics: default to `ProbeCollator`, the `ProbeLoss` that `args` describe, and
            the metrics of the head's problem type.
        train_dataset, eval_dataset: a `datasets.Dataset`, a DataFrame, a dict of columns or a list of rows, with the columns
            of `rows_in_memory`, whose states are computed here unless `args.cache_states` is False; or a `PromptDataset` or
            `StateDataset`, which is taken as it is.
        processing_class: the backbone's tokenizer, for texts. `backbone` as a name brings its own.
        model_init, callbacks, kwargs: as in `Trainer`.
        backbone: instead of `model`: a folder, a Hub id, `"demo"`, or a loaded LM. The head is then made for the labels.
        probe_config: fields of `ProbeConfig` of the head for `backbone`. Missing fields are chosen.
        column_mapping: names from the rows to the columns above, such as `{"review": "text"}`.

    Attributes:
        logits (`[rows, num_labels]`): logits of the evaluation rows after training.

    Raises:
        ProbeError: the rows, the head and the arguments do not fit each other.
    """

    def __init__(
        self,
        model: ProbeModel | None = None,
        args: ProbeTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., ProbeModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        *,
        backbone: str | os.PathLike | PreTrainedModel | None = None,
        probe_config: Mapping[str, Any] | None = None,
        column_mapping: Mapping[str, str] | None = None,
        **kwargs,
    ):
        self.args = args = copy.copy(args) if args is not None else ProbeTrainingArguments()
        if not isinstance(args, ProbeTrainingArguments):
            raise ProbeError(f"args must be ProbeTrainingArguments, not {type(args).__name__}")
        if sum(given is not None for given in (model, model_init, backbone)) != 1:
            raise ProbeError("give one of model=ProbeModel(...), model_init= and backbone=")
        if probe_config is not None and backbone is None:
            raise ProbeError("probe_config needs backbone=; a model has its own config")
        known = [item.name for item in fields(ProbeConfig)]
        if unknown := [name for name in probe_config or {} if name not in known]:
            raise ProbeError(f"probe_config has no {unknown[0]!r}; learning rates and the like go into args=")
        self._columns, self._tokenizer = column_mapping, processing_class
        self._recorded: dict[str, Any] = {}
        self.logits: torch.Tensor | None = None
        if backbone is not None:
            model, train_dataset = self._create_head(backbone, dict(probe_config or {}), train_dataset)
            config, lm = model.config, model.backbone
            model_init = lambda: ProbeModel(config, backbone=lm)  # noqa: E731 - each run of the trainer starts anew
        elif model is None:
            self.model_init = model_init
            model = super().call_model_init()
        if not isinstance(model, ProbeModel):
            kind = type(model).__name__
            raise ProbeError(f"model must be a ProbeModel, not {kind}; backbone= takes a language model")
        if is_tensor_parallel(model.backbone):
            raise ProbeError("a Trainer divides the rows, which a backbone with a tp_plan needs in all processes")
        train = self._label("train_dataset", train_dataset, model, learned=True)
        validation = self._label("eval_dataset", eval_dataset, model)
        recipe = self._complete(model.config, train, validation, compute_metrics is not None)
        if compute_loss_func is None:
            balanced = recipe.class_weights == "balanced" and train is not None
            labels = labels_of(train) if balanced else np.empty(0)
            compute_loss_func = ProbeLoss.create(recipe, model.config, labels)
        callbacks = list(callbacks or [])
        if args.patience is not None and args.load_best_model_at_end:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=args.patience))
        super().__init__(
            model=model if model_init is None else None,
            args=args,
            data_collator=data_collator or ProbeCollator(),
            train_dataset=self._encode("train_dataset", train, model, learned=True),
            eval_dataset=self._encode("eval_dataset", validation, model),
            processing_class=self._tokenizer,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics or self._measure,
            callbacks=callbacks,
            **kwargs,
        )

    # Rows

    @cached_property
    def _cache(self) -> StateCache | None:
        if not self.args.cache_states:
            return None
        cache = StateCache(self.args.cache_dir or Path(self.args.output_dir) / STATES)
        if self.args.cache_dir is None:
            weakref.finalize(self, cache.delete)
        return cache

    def _create_head(self, backbone: Any, head: dict[str, Any], data: Any) -> tuple[ProbeModel, LabelledTexts]:
        """Read the training rows, load the backbone, and make a head for the labels of the rows."""
        names = list(head["id2label"].values()) if head.get("id2label") else None
        rows = rows_in_memory("train_dataset", data, self._columns, names, head.get("problem_type"))
        _, head = complete(self.args.recipe(), head, len(rows))
        has_replies = not is_tokenized(rows) and ends_with_reply(rows.texts[0])
        scope = {"token_scope": "response"} if has_replies else {}
        name = None if isinstance(backbone, nn.Module) else str(backbone)
        config = head_config({"max_length": MAX_LENGTH, **scope, **head}, rows, name)
        if name is not None:
            backbone, tokenizer = load_backbone(name)
            self._tokenizer = self._tokenizer or tokenizer
        return ProbeModel(config, backbone=backbone), rows

    def _label(self, name: str, data: Any, probe: ProbeModel, learned: bool = False) -> LabelledTexts | Dataset | None:
        """Read a table with the labels of the head, whose config records what the labels of training rows are called."""
        rows = data
        if not isinstance(data, LabelledTexts):
            if data is None or isinstance(data, Dataset):
                return data
            names = list(probe.config.id2label.values())
            unnamed = learned and names == list(ProbeConfig(num_labels=len(names)).id2label.values())
            given = None if unnamed else names
            rows = rows_in_memory(name, data, self._columns, given, probe.config.problem_type)
            # An alphabetical order does not say which label is flagged.
            flagged = probe.config.flagged if rows.label_names == names else rows.flagged
            if unnamed and len(rows.label_names) == len(names):
                self._record(probe, id2label=dict(enumerate(rows.label_names)), flagged=flagged)
            rows = rows.renamed(list(probe.config.id2label.values()))
        if learned:
            check_labels(name, rows)
        return rows

    def _encode(self, name: str, rows: Any, probe: ProbeModel, learned: bool = False) -> Dataset | None:
        """Return rows as prompts, or as their hidden states."""
        if not isinstance(rows, LabelledTexts):
            return rows
        if probe.backbone is None:
            raise ProbeError(f"{name} has texts or token ids, which need ProbeModel(config, backbone=lm)")
        if is_tokenized(rows):
            masks = rows.columns.get("probe_mask")
            follows = masks is not None and probe.config.reads_reply
            encoded = EncodedTexts(rows.texts, masks, list(map(sum, masks)) if follows else None)
        else:
            encoded = self._format(name, probe).encode_for(probe.config, rows.texts)
        dataset = as_dataset(encoded, rows.labels, probe.config, probe.backbone, self._cache)
        return CutReplies(dataset, encoded.reply_lengths) if learned and encoded.reply_lengths else dataset

    def _format(self, name: str, probe: ProbeModel) -> PromptFormat:
        """Return the head's own format of prompts; one that is not known is the template of the tokenizer."""
        if self._tokenizer is None:
            raise ProbeError(f"{name} has texts: pass the backbone's tokenizer, processing_class=tokenizer")
        config = probe.config
        if config.prompt_format not in PROMPT_FORMATS:
            config = config.replace(prompt_format="chat" if self._tokenizer.chat_template else "raw")
        prompts = PromptFormat.from_config(config, self._tokenizer)
        self._record(probe, **prompts.config_fields())
        return prompts

    def _record(self, probe: ProbeModel, **fields) -> None:
        """Write fields into the config of this head, and of those that `model_init` makes."""
        self._recorded |= fields
        probe.config = probe.config.replace(**fields)

    def _complete(self, config: ProbeConfig, train: Any, validation: Any, own_metrics: bool) -> Recipe:
        """Fill in what the arguments leave open, and check them against the rows."""
        args = self.args
        if validation is None:
            args.eval_strategy, args.do_eval, args.load_best_model_at_end = IntervalStrategy.NO, False, False
        recipe, _ = complete(args.recipe(), {"probe_type": config.probe_type}, len(train or ()))
        self._label_smoothing = recipe.label_smoothing
        args.fill(recipe)
        metric = args.metric_for_best_model = args.metric_for_best_model or default_metric(config)
        if args.greater_is_better is None:
            args.greater_is_better = not metric.endswith("loss")
            if args.greater_is_better and validation is not None and not own_metrics:
                check_metric(metric.removeprefix("eval_"), labels_of(validation), config)
        check_threshold_rule(config, recipe.max_false_positive_rate, recipe.threshold_rule)
        return recipe

    def _table(self, name: str, data: Any) -> Dataset | None:
        return self._encode(name, self._label(name, data, self.model), self.model)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the batches of `eval_dataset`, a table as well, or of the trainer's own."""
        return super().get_eval_dataloader(self._table("eval_dataset", eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the batches of `test_dataset`, a table as well."""
        return super().get_test_dataloader(self._table("test_dataset", test_dataset))

    # Training

    def call_model_init(self, trial: Any = None) -> ProbeModel:
        """Make a head with `model_init`. Its config records what the rows have told."""
        probe = super().call_model_init(trial)
        probe.config = probe.config.replace(**self._recorded)
        return probe

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *, judge: bool = True, **kwargs
    ) -> TrainOutput:
        """Train the head; see `Trainer.train`. Then `judge` it, if there are evaluation rows and unless `judge` is False."""
        output = super().train(resume_from_checkpoint, trial, **kwargs)
        if judge and trial is None and self.eval_dataset is not None:
            self.judge()
        return output

    def judge(self) -> dict[str, Any]:
        """Fit temperature and threshold on the evaluation rows, fit novelty, and measure the head on the evaluation rows.

        Returns:
            The head's `results`, which `save_model` writes into `results.json` and the card.
        """
        probe, train, validation = self.model, self.train_dataset, self.eval_dataset
        recipe = replace(
            self.args.recipe(),
            label_smoothing=self._label_smoothing,
            per_device_train_batch_size=self.args.train_batch_size * self.args.world_size,
        )
        self.logits = predict_logits(probe, validation)
        probe.config, found = decide(probe.config, self.logits, labels_of(validation), recipe)
        parts = {"train": train, "validation": validation}
        add_results(
            probe,
            rows={name: {"source": "own rows", "rows": len(part)} for name, part in parts.items() if part is not None},
            recipe=recipe,
            runs=[{"seed": self.args.seed, "epochs": self.state.epoch, **found}],
            inspected=("validation", validation, self.logits),
            novelty=(train, validation, self.logits) if self.args.novelty and train is not None else None,
            dtype=probe.config.base_model_dtype,
            card=CardFacts(),
        )
        return probe.results

    def _measure(self, evaluated: EvalPrediction) -> dict[str, float | None]:
        return metrics_of(self.model.config)(evaluated)  # the config changes when the head is judged

    def hyperparameter_search(
        self, hp_space: Callable | None = None, compute_objective: Callable | None = None, n_trials: int = 20, **kwargs
    ) -> Any:
        """Search hyper-parameters; see `Trainer.hyperparameter_search`. It needs `model_init` or `backbone`.

        Args:
            hp_space: defaults to learning rate, weight decay and batch size, in the ranges of arXiv 2601.13288.
            compute_objective: defaults to `metric_for_best_model`, which is maximised.
        """
        metric = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"
        compute_objective = compute_objective or (lambda metrics: metrics[metric])
        kwargs.setdefault("direction", "maximize")
        return super().hyperparameter_search(hp_space or self._suggest, compute_objective, n_trials, **kwargs)

    def _suggest(self, trial: Any) -> dict[str, Any]:
        space = COMMON | get_probe_type(self.model.config.probe_type).search_space
        return {
            "learning_rate": trial.suggest_float("learning_rate", *space["learning_rate"], log=True),
            "weight_decay": trial.suggest_float("weight_decay", *space["weight_decay"]),
            "per_device_train_batch_size": trial.suggest_categorical(
                "per_device_train_batch_size", space["batch_size"]
            ),
        }

    # Files and the Hub

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the head into a folder: config, weights, results and card. Checkpoints have the Trainer's own files."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None, **kwargs
    ) -> CommitInfo | None:
        """Write the head into `args.output_dir`, and upload it in one commit: config, weights, results and card, and no pickle.

        The repository is `args.hub_model_id`, or the user's with the name of `args.output_dir`.

        Args:
            blocking: has no effect; heads are small.
            kwargs: `revision`, `private`, `tags`, `license` and the like; see `push_folder`.
        """
        token, repo_id = token or self.args.hub_token, self.hub_model_id or self.args.hub_model_id
        if repo_id is None or "/" not in repo_id:
            self.init_hf_repo(token=token, private=kwargs.get("private"))  # it asks the Hub for the user's name
            repo_id = self.hub_model_id
        if not self.is_world_process_zero():
            return None
        self.model.save_pretrained(self.args.output_dir)  # before the Hub can refuse
        kwargs["revision"] = kwargs.get("revision") or self.args.hub_revision
        return self.model.push_to_hub(repo_id, token=token, commit_message=commit_message, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent would upload training_args.bin, a pickle, and weights without a config.
        if self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(f"Training in progress, epoch {self.state.epoch:.0f}")
