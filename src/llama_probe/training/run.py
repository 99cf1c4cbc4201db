"""From labelled files to a head folder: what `llama-probe train` does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..backbone.loading import DEMO, DEMO_NOTE, load_backbone, model_id, weights_digest
from ..data.prompts import PromptFormat, split_reply
from ..data.sources import FOLDS, DataSources
from ..data.states import PromptDataset, StateCache, check_cache
from ..data.texts import LabelledTexts
from ..distributed import check_shared, claimed, is_main, on_main, process_group, world_size
from ..errors import ProbeError
from ..evaluation.calibration import calibrate, check_threshold_rule
from ..evaluation.detection import MAX_FALSE_HALTS, apply_rules, follow_replies, halting_rules
from ..evaluation.metrics import check_metric, default_metric, summarize
from ..evaluation.plots import write_plots
from ..evaluation.report import inspect_head, predict_logits, report
from ..files import environment, write_atomically
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.match import describe
from ..heads.probe import ProbeModel
from ..hub.card import CardFacts, write_card
from ..hub.folder import check_output
from .fitting import check_convex, fit_classifier
from .recipe import Recipe, complete
from .rows import Prepared
from .trainer import ProbeLoss, balanced_weights, create_trainer, training_arguments


CHECKPOINTS = ".checkpoints"
_SETUP_NAME = "setup.json"


@dataclass
class TrainingRun:
    """Trains one head a seed on the same rows, keeps the best by validation, and writes its folder.

    Attributes:
        backbone: `"demo"`, a folder or a Hub id. dtype: of its weights.
        data, recipe: see there.
        head: fields of `ProbeConfig` that say what is built and what it reads. What is left open here and in the recipe is
            filled in once the rows are read; see `llama_probe.training.recipe.complete`.
        prompt_format, system_prompt, max_length: see `PromptFormat`.
        output: the head's folder.
        seeds: one training each. Rows are split by the first. A kind that is fitted, and not trained, has no seed: the first
            alone is used.
        cache: keep hidden states on disk while training, so that the backbone runs once. cache_dir: keep them for later.
        resume: go on from the checkpoints of a run that was stopped. It may go on with another number of processes.
        card: what the card says beyond what was measured.
    """

    backbone: str
    data: DataSources
    output: Path
    head: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    prompt_format: str = "chat"
    system_prompt: str | None = None
    max_length: int | None = 512
    dtype: str = "auto"
    seeds: list[int] = field(default_factory=lambda: [0])
    cache: bool = True
    cache_dir: Path | None = None
    resume: bool = False
    card: CardFacts = field(default_factory=CardFacts)

    def __post_init__(self):
        if not self.seeds or min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise ProbeError(f"seeds={self.seeds} must be whole numbers from 0 and below 2**32, and at least one")
        check_cache(self.cache, self.cache_dir)

    def execute(self) -> dict[str, Any]:
        """Runs it.

        Processes that `torchrun` has started divide the rows: each runs the backbone over a share of them, and has a share
        of every training batch and of the rows that are scored. The first one writes. All must see the same `output`.

        Returns:
            What is also written to `results.json`: sources, recipe, metrics a seed, their mean and spread, and what
            `inspect_head` finds of the head that is kept.

        Raises:
            ProbeError: anything the user can mend, before the training starts; or another process of the run has ended.
        """
        with process_group():
            return self._execute()

    def _execute(self) -> dict[str, Any]:
        check_output(self.output)
        with claimed(self.output):
            prepared = self.prepare()
            try:
                results = self._train_all(prepared)
            except Exception:
                prepared.close()  # a run that is stopped, and may go on, keeps its states
                raise
            prepared.close()
            return results

    def _train_all(self, prepared: Prepared) -> dict[str, Any]:
        checkpoints = self.output / CHECKPOINTS
        self._begin(checkpoints, prepared)
        if get_probe_type(prepared.config.probe_type).convex:
            runs = [self._fit_classifier(self.seeds[0], prepared)]
        else:
            runs = [self._train(seed, prepared, checkpoints / f"seed-{seed}") for seed in self.seeds]
        best = max(runs, key=lambda run: run["result"]["validation"][prepared.metric])
        held_out = best["logits"] if prepared.folds else None
        results = self.save(best["probe"], prepared, [run["result"] for run in runs], best["result"]["seed"], held_out)
        if is_main():
            shutil.rmtree(checkpoints, ignore_errors=True)
        return results

    def _begin(self, checkpoints: Path, prepared: Prepared) -> None:
        """Makes the folder of the checkpoints, or finds that those in it are of this very training.

        Raises:
            ProbeError: they are of another.
        """
        setup = {
            "recipe": dataclasses.asdict(self.recipe),
            # The fingerprint is measured anew by each run, and says how much alike backbones are, not whether they are the same.
            "head": prepared.config.to_dict() | {"fingerprint": None},
            "backbone_weights": prepared.backbone_weights,
            "rows": {name: rows.digest() for name, rows in prepared.parts.items() if name != "test"},
            "extra_weights": prepared.extra_weights,
            # Which rows each head has not seen, so that none is validated on rows that it learned from.
            "folds": hashlib.sha256(json.dumps([held.tolist() for held in prepared.folds]).encode()).hexdigest(),
        }
        setup = json.loads(json.dumps(setup))
        path = checkpoints / _SETUP_NAME

        def begin() -> dict[str, Any]:
            if self.resume and path.is_file():
                return json.loads(path.read_text(encoding="utf-8"))
            shutil.rmtree(checkpoints, ignore_errors=True)
            checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically({path: lambda name: name.write_text(json.dumps(setup), encoding="utf-8")})
            return setup

        found = {"backbone_weights": prepared.backbone_weights} | on_main(begin)  # earlier versions did not note them
        if different := [name for name in setup if setup[name] != found.get(name)]:
            raise ProbeError(
                f"{self.output} holds the checkpoints of another training: its {', '.join(different)} are not these. Give what "
                "was given then, or leave resume out to begin anew"
            )

    def prepare(self) -> Prepared:
        """Reads the rows, loads the backbone, renders the prompts and, with a cache, computes their states.

        Raises:
            ProbeError: anything the user can mend.
        """
        check_output(self.output)
        parts = self.data.read(self.seeds[0])
        further = len(parts["extra"]) if "extra" in parts else 0
        self.recipe, self.head = complete(self.recipe, self.head, len(parts["train"]) + further)
        folded = parts["validation"] is parts["train"]
        folds = parts["train"].folds(self.data.folds or FOLDS, self.seeds[0]) if folded else []
        config = self._config(parts["train"])
        metric = self.recipe.metric or default_metric(config)
        check_metric(metric, parts["validation"].labels, config)
        check_threshold_rule(config, self.recipe.max_false_positive_rate, self.recipe.threshold_rule)
        self.loss(config, parts)
        kind, weights = get_probe_type(config.probe_type), self.data.extra_weights
        if len(weights) > kind.members(config):
            raise ProbeError(
                f"extra_weights={weights} are one for each of {len(weights)} members or more, and this {config.probe_type} head "
                f"has {kind.members(config)}: give a single weight, or use probe_type='multimax'"
            )
        if kind.convex:
            check_convex(self.recipe.focal_gamma)
            if further:
                raise ProbeError(
                    f"probe_type={config.probe_type!r} is fitted to the rows of {self.data.train} alone: leave extra out"
                )
        if config.reads_reply:
            for text in (text for rows in parts.values() for text in rows.texts):
                split_reply(text)  # which refuses what has none
        lm, tokenizer = load_backbone(self.backbone, self.dtype)
        prompts = PromptFormat.create(tokenizer, self.prompt_format, self.system_prompt, self.max_length)
        config = describe(lm, config.replace(**prompts.config_fields()))
        head = ProbeModel(config)
        head.bind(lm)
        check_shared(self.output)
        cache = StateCache(self.cache_dir or self.output / ".states") if self.cache else None
        datasets: dict[str, Dataset] = {}
        reply_lengths: dict[str, list[int] | None] = {}
        for name, rows in parts.items():
            ids, masks, reply_lengths[name] = prompts.encode_for(config, rows.texts)
            datasets[name] = (
                cache.dataset(lm, config, ids, rows.labels, masks=masks)
                if cache
                else PromptDataset(ids, rows.labels, masks)
            )
        passing = cache if self.cache_dir is None else None
        kept = None if cache else lm
        digest = weights_digest(lm)
        return Prepared(parts, config, metric, datasets, reply_lengths, kept, head, passing, folds, weights, digest)

    def save(
        self,
        probe: ProbeModel,
        prepared: Prepared,
        runs: list[dict[str, Any]],
        chosen: int,
        held_out: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Writes the folder of the head that was chosen, with the results of all runs, and returns these.

        Args:
            held_out (`[rows, num_labels]`): logits of the validation rows, where the head was trained on these.
        """
        results = self._results(prepared, runs, chosen)
        shown = "test" if "test" in prepared.parts else "validation"
        logits = held_out if shown == "validation" else None
        found = inspect_head(probe, prepared.datasets[shown], prepared.parts[shown].labels, logits=logits)
        results["inspection"] = {"split": shown, **found}
        probe.results = results
        if is_main():
            probe.save_pretrained(self.output)
            write_plots(self.output)
            write_card(self.output)
        return results

    def _config(self, rows: LabelledTexts) -> ProbeConfig:
        return ProbeConfig(
            **{"token_scope": "content", **self.head},
            id2label=dict(enumerate(rows.label_names)),
            problem_type=rows.problem_type,
            base_model_name_or_path=model_id(self.backbone),
        )

    def loss(self, config: ProbeConfig, parts: dict[str, LabelledTexts]) -> ProbeLoss:
        """The loss that the recipe asks for."""
        labels = np.concatenate([parts[name].labels for name in ("train", "extra") if name in parts])
        weights = self.recipe.class_weights
        if weights == "balanced":
            weights = balanced_weights(labels, config)
        elif weights is not None:
            try:
                weights = [float(value) for value in weights.split(",")]
            except ValueError:
                weights = []
            if not any(weights) or not all(0 <= weight < math.inf for weight in weights):
                raise ProbeError(
                    f"class_weights={self.recipe.class_weights!r} must be 'balanced', or numbers of at least 0 with commas, "
                    "not all of them 0"
                )
        return ProbeLoss(config, weights, self.recipe.label_smoothing, self.recipe.focal_gamma)

    def _train(self, seed: int, prepared: Prepared, checkpoints: Path) -> dict[str, Any]:
        """A head, what was measured of it, and the logits of the validation rows that it was judged by."""
        datasets, trained = prepared.datasets, prepared.trained
        if not prepared.folds:
            probe, epochs = self._fit(seed, prepared, trained, datasets["validation"], checkpoints)
            logits = predict_logits(probe, datasets["validation"])
        else:
            train = datasets["train"]
            logits = torch.empty(len(train), prepared.config.num_labels)
            for number, held in enumerate(
                tqdm(prepared.folds, desc="folds", unit=" folds", leave=False, disable=not is_main())
            ):
                rest = Subset(trained, np.setdiff1d(np.arange(len(trained)), held).tolist())
                part, _ = self._fit(seed, prepared, rest, None, checkpoints / f"fold-{number}")
                logits[torch.from_numpy(held)] = predict_logits(part, Subset(train, held.tolist()))
            probe, epochs = self._fit(seed, prepared, trained, None, checkpoints / "all")
        result = {"seed": seed, "epochs": epochs, **self.judge(probe, prepared, logits)}
        return {"probe": probe, "result": result, "logits": logits}

    def _fit_classifier(self, seed: int, prepared: Prepared) -> dict[str, Any]:
        """What `_train` gives, for a kind whose classifier is fitted."""
        probe, datasets = prepared.head, prepared.datasets
        if prepared.lm is not None:
            probe.to(prepared.lm.device).set_backbone(prepared.lm)
        loss = self.loss(prepared.config, prepared.parts)
        found = fit_classifier(
            probe, datasets["train"], datasets["validation"], loss, prepared.metric, prepared.lm, prepared.folds
        )
        result = {"seed": seed, **found.facts, **self.judge(probe, prepared, found.logits)}
        return {"probe": probe, "result": result, "logits": found.logits}

    def _fit(
        self, seed: int, prepared: Prepared, train: Dataset, validation: Dataset | None, checkpoints: Path
    ) -> tuple[ProbeModel, float]:
        """A head that was trained on some rows, and for how many epochs: the best one where there are validation rows."""
        set_seed(seed)
        recipe = self.recipe
        probe = ProbeModel(prepared.config, backbone=prepared.lm)
        args = training_arguments(
            checkpoints,
            prepared.metric,
            seed=seed,
            learning_rate=recipe.learning_rate,
            num_train_epochs=recipe.num_train_epochs,
            per_device_train_batch_size=math.ceil(recipe.per_device_train_batch_size / world_size()),
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            weight_decay=recipe.weight_decay,
            **({} if validation is not None else {"eval_strategy": "no", "load_best_model_at_end": False}),
        )
        loss = self.loss(prepared.config, prepared.parts)
        patience = recipe.patience if validation is not None else None
        trainer = create_trainer(probe, args, train, validation, loss, patience)
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints) if self.resume else None)
        return probe, trainer.state.epoch

    def judge(self, probe: ProbeModel, prepared: Prepared, logits: torch.Tensor) -> dict[str, Any]:
        """Fits the head's temperature and threshold on the validation rows, and measures it on these and the test rows.

        Args:
            logits (`[rows, num_labels]`): of the validation rows.
        """
        parts = prepared.parts
        labels = torch.from_numpy(parts["validation"].labels)
        recipe = self.recipe
        probe.config = calibrate(probe.config, logits, labels, recipe.max_false_positive_rate, recipe.threshold_rule)
        result = {
            "temperature": probe.config.temperature,
            "threshold": probe.config.threshold,
            "validation": report(probe.config, logits, parts["validation"].labels),
        }
        if "test" in parts:
            slices = {column: parts["test"].columns[column] for column in self.data.slice_columns}
            logits = predict_logits(probe, prepared.datasets["test"])
            result["test"] = report(probe.config, logits, parts["test"].labels, slices)
        if probe.config.reads_reply and not prepared.folds:  # the head was trained on the rows of its folds
            result["halting"] = self._halting(probe, prepared)
        return result

    def _halting(self, probe: ProbeModel, prepared: Prepared) -> dict[str, Any]:
        """Rules to end replies by, from the validation rows, and what they do to the test rows; see `halting_rules`."""
        rate = self.recipe.max_false_positive_rate
        limit = MAX_FALSE_HALTS if rate is None else rate
        followed = {
            name: follow_replies(probe, prepared.datasets[name], prepared.reply_lengths[name], prepared.lm)
            for name in ("validation", "test")
            if name in prepared.parts
        }
        labels = {name: prepared.parts[name].labels for name in followed}
        rules = halting_rules(probe.config, followed["validation"], labels["validation"], limit)
        if "test" in followed:
            rules = apply_rules(probe.config, rules, followed["test"], labels["test"])
        return {"max_false_halts": limit, "labels": rules}

    def _results(self, prepared: Prepared, runs: list[dict[str, Any]], chosen: int) -> dict[str, Any]:
        config, parts, metric = prepared.config, prepared.parts, prepared.metric
        sources = {"train": [self.data.train], "validation": [self.data.eval], "test": [self.data.test]}
        sources = {name: found for name, found in sources.items() if found != [None]} | {"extra": self.data.extra}
        folds, weights = len(prepared.folds), prepared.extra_weights
        held_out = {
            "validation": f"{folds} folds of train" if folds else f"{self.data.validation_share:.0%} of train",
            "test": f"{self.data.test_share or 0:.0%} of train",
        }
        head = ProbeModel(config)
        card = dataclasses.asdict(self.card)
        if self.backbone == DEMO:
            card["limits"].append(DEMO_NOTE)
        return {
            "backbone": config.base_model_name_or_path,
            "dtype": self.dtype,
            "probe_type": config.probe_type,
            "num_parameters": head.num_parameters(),
            "data": {
                name: {
                    # paths differ from machine to machine; the last two parts say which file it was
                    "source": ", ".join("/".join(Path(source).parts[-2:]) for source in sources[name])
                    if name in sources
                    else held_out[name],
                    "rows": len(rows),
                    **({"weights": weights} if name == "extra" and weights != [1.0] else {}),
                }
                for name, rows in parts.items()
            },
            "recipe": dataclasses.asdict(self.recipe) | {"metric": metric},
            "runs": runs,
            "chosen_seed": chosen,
            "summary": {
                name: summarize([run[name] for run in runs]) for name in ("validation", "test") if name in runs[0]
            },
            "card": card,
            "environment": environment() | ({"processes": world_size()} if world_size() > 1 else {}),
        }


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in which the Trainer has written its state, which comes last: a killed run may leave half of one."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(map(str, found), key=lambda path: int(path.rpartition("-")[2]), default=None)
