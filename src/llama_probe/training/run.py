"""From labelled rows to a head folder: the work of `llama-probe train`."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm
from transformers import ProgressCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..backbone.loading import DEMO, DEMO_NOTE, load_backbone, weights_digest
from ..data.prompts import PromptFormat, split_reply
from ..data.sources import FOLDS, DataSources
from ..data.states import StateCache
from ..data.texts import LabelledTexts
from ..distributed import check_shared, claimed, is_main, on_main, process_group, world_size
from ..errors import ProbeError
from ..evaluation.calibration import check_threshold_rule
from ..evaluation.metrics import check_metric, default_metric
from ..evaluation.plots import write_plots
from ..evaluation.prediction import predict_logits
from ..evaluation.resume import same_settings
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.match import describe
from ..heads.probe import ProbeModel
from ..hub.card import CardFacts, write_card
from ..hub.folder import check_output
from .arguments import SHARED, ProbeTrainingArguments
from .loss import ProbeLoss
from .options import CHECKPOINTS, SETUP_NAME, RunOptions
from .recipe import Recipe, complete, head_config
from .results import add_results, describe_rows, judge
from .rows import TrainingData, as_dataset
from .trainer import STATES, ProbeTrainer


@dataclass(kw_only=True)
class TrainingRun(RunOptions):
    """A run that trains one head a seed on the same rows, keeps the best by validation, and writes its folder.

    Attributes:
        data: the rows; see `DataSources`.
        head: fields of `ProbeConfig`. Open fields here and in `recipe` are filled in by `complete`.
        recipe: hyper-parameters; see `Recipe`.
        seeds: one head each. The first also splits the rows.
        card: facts for the card that are not measured.

    Raises:
        ProbeError: the seeds or another value are not allowed, or `head` cannot learn from `data.augment`.
    """

    data: DataSources
    head: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    seeds: list[int] = field(default_factory=lambda: [0])
    card: CardFacts = field(default_factory=CardFacts)

    def __post_init__(self):
        super().__post_init__()
        if not self.seeds or min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise ProbeError(f"seeds={self.seeds} must be at least one whole number from 0 and below 2**32")
        scope = self.head.get("token_scope", "last_user")
        if "later_turns" in self.data.augment and scope in ("last_user", "response"):
            raise ProbeError(f"token_scope={scope!r} does not read augment=['later_turns']: use 'user'")

    def run(self) -> dict[str, Any]:
        """Train, measure and save.

        The processes of `torchrun` divide the rows: each runs the backbone on a share of them, and gets a share of every
        batch. The first one writes. All must see the same `output`.

        Returns:
            The contents of `results.json`; see `add_results`.

        Raises:
            ProbeError: a setting or a row is wrong, or `output` holds a head (raised before training), or another process of
                the run has ended.
        """
        with process_group():
            check_output(self.output)
            on_main(self.check_free)
            with claimed(self.output), self.prepare() as data:
                return self._train_all(data)

    def _train_all(self, data: TrainingData) -> dict[str, Any]:
        checkpoints = self.output / CHECKPOINTS
        on_main(lambda: self._open_checkpoints(checkpoints, data))
        trained = [self._train(seed, data, checkpoints / f"seed-{seed}") for seed in self.seeds]
        runs = [run for _, run, _ in trained]
        probe, run, logits = max(trained, key=lambda one: one[1]["validation"][data.recipe.metric])
        results = self.save(probe, data, runs, run["seed"], logits)
        if is_main():
            shutil.rmtree(checkpoints, ignore_errors=True)
        return results

    def _open_checkpoints(self, folder: Path, data: TrainingData) -> None:
        """Keep the checkpoints of this very training, or start with none; `ProbeError` if they are of another one."""
        path = folder / SETUP_NAME
        if not (self.resume and path.is_file()):
            shutil.rmtree(folder, ignore_errors=True)
        same_settings(path, data.settings())

    def prepare(self) -> TrainingData:
        """Read the rows, load the backbone, render the prompts and, with a cache, compute their states."""
        check_output(self.output)
        parts = self.data.read(self.seeds[0])
        labels = np.concatenate([parts[name].labels for name in ("train", "extra") if name in parts])
        recipe, head = complete(self.recipe, self.head, len(labels))
        train, folds = parts["train"], []
        if parts["validation"] is train:
            folds = train.folds(self.data.folds or FOLDS, self.seeds[0])
        config = head_config(head, train, self.backbone)
        recipe = replace(recipe, metric=recipe.metric or default_metric(config))
        self._check(parts, recipe, config, labels)
        lm, tokenizer = load_backbone(self.backbone, self.dtype)
        prompts = PromptFormat.create(tokenizer, self.prompt_format, self.system_prompt, self.max_length)
        config = describe(lm, config.replace(**prompts.config_fields()))
        ProbeModel(config)  # raises
        check_shared(self.output)
        cache = StateCache(self.cache_dir or self.output / STATES) if self.cache else None
        datasets: dict[str, Dataset] = {}
        reply_lengths: dict[str, list[int] | None] = {}
        for name, rows in parts.items():
            encoded = prompts.encode_for(config, rows.texts)
            reply_lengths[name] = encoded.reply_lengths
            datasets[name] = as_dataset(encoded, rows.labels, config, lm, cache)
        return TrainingData(
            parts=parts,
            datasets=datasets,
            reply_lengths=reply_lengths,
            labels=labels,
            config=config,
            recipe=recipe,
            lm=lm if cache is None else None,
            cache=cache if self.cache_dir is None else None,
            folds=folds,
            sources=self.data,
            backbone_weights=weights_digest(lm),
        )

    def _check(self, parts: dict[str, LabelledTexts], recipe: Recipe, config: ProbeConfig, labels: np.ndarray) -> None:
        """Raise `ProbeError` for settings that do not fit the rows, before the backbone is loaded."""
        check_metric(recipe.metric, parts["validation"].labels, config)
        check_threshold_rule(config, recipe.max_false_positive_rate, recipe.threshold_rule)
        ProbeLoss.create(recipe, config, labels)
        kind, weights = get_probe_type(config.probe_type), self.data.extra_weights
        if len(weights) > (members := kind.members(config)):
            raise ProbeError(
                f"extra_weights={weights} must have 1 value: probe_type={config.probe_type!r} has {members} members"
            )
        if config.reads_reply:
            for rows in parts.values():
                for text in rows.texts:
                    split_reply(text)  # raises for a text without a reply

    def _train(
        self, seed: int, data: TrainingData, checkpoints: Path
    ) -> tuple[ProbeModel, dict[str, Any], torch.Tensor]:
        """Return a head, its results, and logits of the validation rows by heads that have not learned from them."""
        datasets, trained = data.datasets, data.trained
        if data.folds:
            logits = torch.empty(len(datasets["train"]), data.config.num_labels)
            bar = tqdm(data.folds, desc="folds", unit=" folds", leave=False, disable=not is_main())
            for number, held in enumerate(bar):
                rest = Subset(trained, np.setdiff1d(np.arange(len(trained)), held).tolist())
                part = self._fit(seed, data, rest, None, checkpoints / f"fold-{number}").model
                logits[torch.from_numpy(held)] = predict_logits(part, Subset(datasets["train"], held.tolist()))
            trainer = self._fit(seed, data, trained, None, checkpoints / "all")
        else:
            trainer = self._fit(seed, data, trained, datasets["validation"], checkpoints)
            logits = predict_logits(trainer.model, datasets["validation"])
        probe = trainer.model
        return probe, {"seed": seed, "epochs": trainer.state.epoch, **judge(probe, data, logits)}, logits

    def _fit(
        self, seed: int, data: TrainingData, train: Dataset, validation: Dataset | None, checkpoints: Path
    ) -> ProbeTrainer:
        """Train a head. With validation rows its best epoch is loaded."""
        set_seed(seed)
        recipe = data.recipe
        args = ProbeTrainingArguments(
            str(checkpoints),
            seed=seed,
            metric_for_best_model=recipe.metric,
            per_device_train_batch_size=math.ceil(recipe.per_device_train_batch_size / world_size()),
            label_smoothing_factor=recipe.label_smoothing,
            **{name: getattr(recipe, name) for name in SHARED if name != "per_device_train_batch_size"},
        )
        probe, loss = ProbeModel(data.config, backbone=data.lm), ProbeLoss.create(recipe, data.config, data.labels)
        trainer = ProbeTrainer(probe, args, None, train, validation, compute_loss_func=loss)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(_Progress)
        trainer.train(_last_checkpoint(checkpoints) if self.resume else None, judge=False)
        return trainer

    def save(
        self, probe: ProbeModel, data: TrainingData, runs: list[dict[str, Any]], chosen: int, logits: torch.Tensor
    ) -> dict[str, Any]:
        """Write the folder of the chosen head: weights, results, plots and card.

        Args:
            runs: results of each seed. chosen: seed of `probe`.
            logits (`[rows, num_labels]`): of the validation rows, by heads that have not learned from them.

        Returns:
            The results.
        """
        limits = [*self.card.limits, *([DEMO_NOTE] if self.backbone == DEMO else [])]
        shown = "test" if "test" in data.parts else "validation"
        add_results(
            probe,
            rows=describe_rows(data),
            recipe=data.recipe,
            runs=runs,
            inspected=(shown, data.datasets[shown], logits if shown == "validation" else None),
            novelty=data.novelty_rows(logits) if self.novelty else None,
            dtype=self.dtype,
            card=replace(self.card, limits=limits),
            chosen=chosen,
        )
        if is_main():
            probe.save_pretrained(self.output)
            if write_plots(self.output):
                write_card(self.output)  # shows the plots
        return probe.results


class _Progress(ProgressCallback):
    """Shows the metrics of the last epoch behind the bar, where the parent prints a dict for each."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show what was measured of the validation rows."""
        if self.training_bar is not None:
            numbers = {name.removeprefix("eval_"): value for name, value in (logs or {}).items()}
            metric = args.metric_for_best_model.removeprefix("eval_")
            self.training_bar.set_postfix({key: value for key, value in numbers.items() if key in ("loss", metric)})


def _last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint: the Trainer writes its state last, so a kill leaves one without it."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(map(str, found), key=lambda path: int(path.rpartition("-")[2]), default=None)
