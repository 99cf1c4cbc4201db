"""A recipe on a backbone, ready to train: rows as states, heads, and the rows that each head learns from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ..backbone.loading import load_backbone, load_tokenizer, weights_digest
from ..data.cached_states import StateCache
from ..data.prompts import PromptFormat, split_reply
from ..data.row_files import MAX_TEXT
from ..distributed import check_shared, is_main, on_main, world_size
from ..errors import ProbeError
from ..evaluation.calibration import check_rates, check_threshold_rule
from ..evaluation.metrics import check_metric, default_metric
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.match import describe
from ..heads.probe import ProbeModel
from .arguments import ARGUMENT_NAMES, ProbeTrainingArguments
from .defaults import MAX_LENGTH, complete_head, head_config, schedule
from .estimate import Estimate, free_bytes, trial_speed
from .loss import ProbeLoss
from .recipe import Recipe
from .recipe_rows import RecipeRows, read_rows
from .rows import TrainingRows, as_dataset
from .search import Trial, draw_trials


logger = logging.get_logger(__name__)

_OUTPUT_FIELDS = {"output_dir", "push_to_hub", "hub_model_id", "hub_token"}
CHECKPOINTS, STATES, SETUP_NAME = ".checkpoints", ".states", "setup.json"  # what a stopped run leaves in its folder


@dataclass(kw_only=True)
class PreparedRun:
    """A recipe on a backbone.

    Attributes:
        recipe, rows: the recipe and its rows.
        backbone: name of the backbone, None for a loaded one. lm, prompts: the frozen LM, and the format of its prompts.
        config: config of a new head.
        args: arguments of the `ProbeTrainer`.
        heads: heads by name: one a seed or a trial of a search; for each fold a head without it; and the twins.
        left_out: head -> places of the training rows that it does not learn from.
        trials: the trials of a search, by head.
        datasets, reply_lengths: prompts or states of each part of the rows, and tokens of their replies.
        cache: states that are deleted after the run.
        command: the command that made the head, for the card.
    """

    recipe: Recipe
    rows: RecipeRows
    output: Path
    backbone: str | None
    dtype: str
    lm: PreTrainedModel
    prompts: PromptFormat
    config: ProbeConfig
    args: ProbeTrainingArguments
    estimate: Estimate
    heads: dict[str, ProbeModel] = field(default_factory=dict)
    left_out: dict[str, np.ndarray] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    reply_lengths: dict[str, list[int] | None] = field(default_factory=dict)
    cache: StateCache | None = None
    command: str | None = None

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        output: Path,
        backbone: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        data_dir: str | os.PathLike | None = None,
        dtype: str = "auto",
        commercial: bool = False,
        max_text: int = MAX_TEXT,
        command: str | None = None,
        only_estimate: bool = False,
    ) -> PreparedRun:
        """Read the rows, check them and the settings, load the backbone, say what is to be done, and compute the states.

        Raises:
            ProbeError: a setting or a row is wrong, or the disk is too small. Raised before the backbone is loaded.
        """
        if unknown := sorted(set(recipe.training) - (ARGUMENT_NAMES - _OUTPUT_FIELDS)):
            raise ProbeError(f"training has no {unknown[0]!r}; it takes fields of ProbeTrainingArguments")
        rows = _read_on_all(lambda: read_rows(recipe, data_dir, max_text, commercial))
        name = None if isinstance(backbone, torch.nn.Module) else str(backbone)
        count = rows.num_plain + rows.num_extra
        head = complete_head(recipe.head, count)
        if name is None:
            target = backbone.config.get_text_config(decoder=True)
            head |= {"hidden_size": target.hidden_size, "num_hidden_layers": target.num_hidden_layers}
        config = head_config({"max_length": MAX_LENGTH, **head}, rows.train, name)
        args = _arguments(recipe, output, config, count)
        _check(recipe, rows, config, args)
        tokenizer = load_tokenizer(name) if tokenizer is None and name is not None else tokenizer
        if tokenizer is None:
            raise ProbeError("a loaded backbone needs processing_class=, its tokenizer")
        kind = config.prompt_format if config.prompt_format in ("chat", "raw") else "chat"
        prompts = PromptFormat.create(tokenizer, kind, config.system_prompt, config.max_length)
        config = config.replace(**prompts.config_fields())
        encoded = {part: prompts.encode_for(config, texts.texts) for part, texts in rows.parts().items()}
        cache = StateCache(args.cache_dir or output / STATES)
        tokens = sum(len(ids) for part in encoded.values() for ids in part.ids)
        count = sum(len(part.ids) for part in encoded.values())
        estimate = _plan(args, Estimate(count, tokens, cache.bytes_of(config, tokens)), cache.folder)
        if name is not None:
            lm, _ = load_backbone(name, dtype)
        else:
            lm = backbone.eval()
        config = describe(lm, config)
        estimate.tokens_per_second = world_size() * trial_speed(lm, encoded["train"].ids, config.layer_indices)
        if is_main():
            logger.warning(f"{recipe.name or 'training'} on {config.base_model_name_or_path}: {estimate}")
        run = cls(
            recipe=recipe,
            rows=rows,
            output=output,
            backbone=name,
            dtype=dtype,
            lm=lm,
            prompts=prompts,
            config=config,
            args=args,
            estimate=estimate,
            cache=cache if estimate.bytes else None,
            command=command,
        )
        if only_estimate:
            return run
        check_shared(output)
        for part, texts in rows.parts().items():
            run.reply_lengths[part] = encoded[part].reply_lengths
            run.datasets[part] = as_dataset(encoded[part], texts.labels, config, lm, run.cache)
        run._create_heads()
        return run

    def _create_heads(self) -> None:
        """Make the heads that train side by side, each with its own seed."""
        recipe, lm = self.recipe, None if self.cache is not None else self.lm
        repeated = self.places
        row_of = np.asarray(repeated)

        def create(name: str, seed: int, config: ProbeConfig, without: np.ndarray | None = None) -> None:
            set_seed(seed)
            self.heads[name] = ProbeModel(config, backbone=lm)
            if without is not None:
                self.left_out[name] = np.flatnonzero(np.isin(row_of, without))

        if recipe.search.trials:
            self.trials = draw_trials(recipe.search, self.config, recipe.seed)
            for name, trial in self.trials.items():
                create(name, recipe.seed, trial.config)
        else:
            for seed in range(recipe.seed, recipe.seed + recipe.seeds):
                create(f"seed-{seed}", seed, self.config)
                for number, fold in enumerate(self.rows.folds):
                    create(f"seed-{seed}-fold-{number}", seed, self.config, fold)
        for twin, without in self.rows.held_out.items():
            create(f"twin-{twin}", recipe.seed, self.config, without)

    @property
    def places(self) -> list[int]:
        """Row numbers of `rows.train`, in the order and as often as they are learned in an epoch."""
        repeats = self.rows.repeats
        return [row for turn in range(max(repeats)) for row in range(len(repeats)) if turn < repeats[row]]

    def learned(self) -> TrainingRows:
        """Return the training rows with their weights, and the heads that learn from each."""
        places, weights = self.places, self.rows.weights
        learned_by = None
        if self.left_out:
            learned_by = np.ones((len(places), len(self.heads)), dtype=bool)
            for column, name in enumerate(self.heads):
                learned_by[self.left_out.get(name, []), column] = False
        row_weights = None if weights is None else [weights[row] for row in places]
        return TrainingRows(self.datasets["train"], places, self.reply_lengths["train"], row_weights, learned_by)

    def judged(self) -> Dataset | None:
        """Return the validation rows, and the heads that are chosen by each; None if there are folds."""
        if not self.rows.unjudged:
            return self.datasets.get("validation")
        judged_by = np.ones((len(self.rows.validation), len(self.heads)), dtype=bool)
        for column, name in enumerate(self.heads):
            judged_by[self.rows.unjudged.get(name.removeprefix("twin-"), []), column] = False
        return TrainingRows(self.datasets["validation"], learned_by=judged_by)

    def loss(self, name: str) -> ProbeLoss:
        """Return the loss of a head."""
        args = {"label_smoothing_factor": self.args.label_smoothing_factor} | self.training_of(name)
        learned = self.rows.train.labels[: self.rows.num_plain + self.rows.num_extra]
        settings = self.args.class_weights, args["label_smoothing_factor"], self.args.focal_gamma
        return ProbeLoss.create(self.heads[name].config, learned, *settings)

    def training_of(self, name: str) -> dict[str, Any]:
        """Return the training arguments of a head that differ from those of the run."""
        return self.trials[name].training if name in self.trials else {}

    @property
    def candidates(self) -> list[str]:
        """Names of the heads of which the best is kept."""
        if self.trials:
            return list(self.trials)
        return [f"seed-{seed}" for seed in range(self.recipe.seed, self.recipe.seed + self.recipe.seeds)]

    def seed_of(self, name: str) -> int:
        """Return the seed of a candidate."""
        return self.recipe.seed if name in self.trials else int(name.rpartition("-")[2])

    def settings(self) -> dict[str, Any]:
        """Return what must be the same if a run is resumed, as JSON values."""
        return {
            "recipe": {name: value for name, value in self.recipe.values.items() if name not in ("card", "measure")},
            "training": self.args.describe(),
            # Measured anew by each run; `backbone_weights` tells whether the backbone is the same.
            "head": self.config.to_dict() | {"fingerprint": None},
            "backbone_weights": weights_digest(self.lm),
            "rows": self.rows.digest(),
        }

    def clean(self) -> None:
        """Delete states that were not asked to be kept, and checkpoints."""
        # In this order: a kill between them leaves a run to resume, and not states, which can reveal the texts.
        self.clean_states()
        self.clean_checkpoints()
        if is_main() and self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()  # the head was saved elsewhere

    def clean_checkpoints(self) -> None:
        """Delete the checkpoints."""
        if is_main():
            shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)

    def clean_states(self) -> None:
        """Delete the hidden states, unless they were asked to be kept."""
        if self.cache is not None and self.args.cache_dir is None:
            self.cache.delete()


def _read_on_all(read: Callable[[], RecipeRows]) -> RecipeRows:
    """Read the rows on every rank: the main one first, so that the others find what it has fetched."""
    if world_size() > 1:
        on_main(lambda: (read(), None)[1])
    return read()


def _arguments(recipe: Recipe, output: Path, config: ProbeConfig, rows: int) -> ProbeTrainingArguments:
    training = dict(recipe.training)
    batch_size = training.pop("per_device_train_batch_size", None) or schedule(rows)[1]
    metric = training.pop("metric_for_best_model", None) or default_metric(config)
    args = ProbeTrainingArguments(
        str(output / CHECKPOINTS),
        seed=recipe.seed,
        metric_for_best_model=metric,
        per_device_train_batch_size=-(-batch_size // world_size()),
        **training,
    )
    args.fill(config.probe_type, rows)
    return args


def _check(recipe: Recipe, rows: RecipeRows, config: ProbeConfig, args: ProbeTrainingArguments) -> None:
    """Raise `ProbeError` for settings that do not fit the rows, before the backbone is loaded."""
    check_metric(args.metric_for_best_model, rows.judged.labels, config)
    check_threshold_rule(config, args.max_false_positive_rate, args.threshold_rule)
    ProbeLoss.create(config, rows.train.labels, args.class_weights, args.label_smoothing_factor, args.focal_gamma)
    if rows.calibration is not None:
        check_rates(config, recipe.calibration.rates, len(rows.calibration))
    members = get_probe_type(config.probe_type).members(config)
    for source in recipe.train:
        if source.weights is not None and len(source.weights) > members:
            raise ProbeError(
                f"weights={source.weights} must have 1 value: probe_type={config.probe_type!r} has {members} members"
            )
    if config.reads_reply:
        for part in rows.parts().values():
            for text in part.texts:
                split_reply(text)  # raises for a text without a reply


def _plan(args: ProbeTrainingArguments, estimate: Estimate, folder: Path) -> Estimate:
    """Decide if the states are kept on disk, and return the estimate of that."""
    free = free_bytes(folder)
    fits = estimate.bytes < 0.9 * free
    if args.cache_states is True and not fits:
        raise ProbeError(
            f"the hidden states need {estimate.bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "training.cache_states=false runs the backbone each epoch"
        )
    if args.cache_states is False or (args.cache_states == "auto" and not fits):
        estimate.bytes, estimate.passes = 0, args.num_train_epochs + 1
    return estimate
