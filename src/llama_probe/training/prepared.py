"""A recipe on a backbone, ready to train: rows as states, heads, and the rows that each head learns from."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..backbone.loading import load_backbone, load_tokenizer, weights_digest
from ..data.disk_states import DiskStates, shared_config
from ..data.prompts import PromptFormat
from ..distributed import check_shared, is_main, on_main, world_size
from ..errors import ProbeError, first_line
from ..evaluation.calibration import check_rates, check_threshold_rule
from ..evaluation.metrics import check_metric
from ..evaluation.transformations import check_transformable
from ..files import JSON
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.match import describe
from ..heads.probe import ProbeModel
from .arguments import ProbeTrainingArguments
from .defaults import head_config
from .estimate import Estimate, keeps_states, trial_speed
from .loss import ProbeLoss
from .recipe import Recipe
from .recipe_rows import RecipeRows, read_rows
from .rows import TrainingRows, learners
from .search import Candidate, draw_candidates


logger = logging.get_logger(__name__)

_STRATEGIES = ("save_strategy", "eval_strategy")
CHECKPOINTS, STATES, SETUP_NAME = ".checkpoints", ".states", "setup.json"  # what a stopped run leaves in its folder


class PreparedRun:
    """A recipe on a backbone: its rows are read, its states computed, its heads made.

    Args:
        output: folder that gets the head, and meanwhile states and checkpoints.
        backbone: `"demo"`, a folder, a GGUF file, a Hub id, or a loaded LM.
        tokenizer: of a loaded backbone.
        only_estimate: stop when `estimate` is known. Nothing is written then.

    Attributes:
        backbone: name of the backbone, None for a loaded one.
        lm, prompts: the frozen LM, and the format of its prompts.
        candidates: one a seed or a trial of a search, by name. The best of their heads is kept.
        members: the candidates; for each fold of each one without it; and the twins.
        heads: the heads of all members, by name.
        datasets: prompts or states of each part of the rows.

    Raises:
        ProbeError: a setting or a row is wrong, or the disk is too small. Raised before the backbone is loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        backbone: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        data_dir: str | os.PathLike | None = None,
        dtype: str = "auto",
        only_estimate: bool = False,
    ):
        self.recipe, self.output, self.dtype = recipe, output, dtype
        self.backbone = name = backbone if isinstance(backbone, str) else None
        # Not those of a recipe, which is saved and shared.
        own = {"output_dir": str(output / CHECKPOINTS), "seed": recipe.seed}
        own |= dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token"))
        # `no` in YAML is False.
        training = {name: value or "no" if name in _STRATEGIES else value for name, value in recipe.training.items()}
        try:
            self.args = args = ProbeTrainingArguments(**own, **training)
            args.check()
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise ProbeError(f"training: {first_line(error)}") from None
        if world_size() > 1:  # the other ranks find what the main one has fetched
            on_main(lambda: bool(read_rows(recipe, data_dir)))
        self.rows = rows = read_rows(recipe, data_dir)
        count = rows.num_plain + rows.num_extra
        config = head_config({"prompt_format": "chat", **recipe.head}, rows.train, count, backbone)
        rows_of_step, args.per_device_train_batch_size = args.per_device_train_batch_size, None
        args.fill(config, count, rows_of_step)
        _check(recipe, rows, config, args)
        if tokenizer is None and name is None:
            raise ProbeError("a loaded backbone needs processing_class=, its tokenizer")
        self.prompts = prompts = PromptFormat.from_config(config, tokenizer or load_tokenizer(name))
        config = config.replace(**prompts.config_fields())
        self.datasets: dict[str, Dataset] = {
            part: prompts.encode_for(config, texts.texts, texts.labels) for part, texts in rows.parts().items()
        }
        prompts_once = {tuple(row["input_ids"]): row for part in self.datasets.values() for row in part}
        cache = DiskStates(args.cache_dir or output / STATES)
        if args.cache_states is True:  # the states on the disk may all be of these rows
            least = cache.bytes_of(config, list(prompts_once.values())) - cache.bytes_on_disk()
            keeps_states(args, least, cache.folder)
        self.lm = lm = load_backbone(name, dtype)[0] if isinstance(backbone, str) else backbone.eval()
        self.config = config = describe(lm, config)
        if recipe.search.trials:
            self.candidates = draw_candidates(recipe.search, config, recipe.seed)
        else:
            seeds = range(recipe.seed, recipe.seed + recipe.seeds)
            self.candidates = {f"seed-{seed}": Candidate(seed, config) for seed in seeds}
        read = shared_config([candidate.config for candidate in self.candidates.values()])
        left = cache.missing(lm, read, self.datasets.values())
        needed = cache.bytes_of(read, left)
        is_cached = keeps_states(args, needed, cache.folder, further_passes=1)
        tokens = sum(map(len, prompts_once))
        self.estimate = Estimate(
            rows=len(prompts_once),
            tokens=tokens,
            bytes=needed if is_cached else 0,
            tokens_per_second=world_size() * trial_speed(lm, self.datasets["train"].prompts, read.layer_indices),
            passes=sum(len(row["input_ids"]) for row in left) / tokens if is_cached else args.num_train_epochs + 1,
        )
        if is_main():
            logger.warning(f"{recipe.name or 'training'} on {config.base_model_name_or_path}: {self.estimate}")
        if only_estimate:
            return
        check_shared(output)
        if is_cached:
            self.datasets = {part: cache.dataset(lm, read, texts) for part, texts in self.datasets.items()}
        if rows.folds:  # the plain rows of `train` are judged by heads that have not learned from them
            self.datasets["validation"] = TrainingRows(self.datasets["train"], range(rows.num_plain))
        self._create_heads(None if is_cached else lm)

    def _create_heads(self, lm: PreTrainedModel | None) -> None:
        self.members: dict[str, Candidate] = {}
        for name, candidate in self.candidates.items():
            self.members[name] = candidate
            for number, fold in enumerate(self.rows.folds):
                self.members[f"{name}-fold-{number}"] = replace(candidate, left_out=fold)
        for name, twin in self.rows.twins.items():
            self.members[f"twin-{name}"] = Candidate(self.recipe.seed, self.config, left_out=twin.left_out)
        self.heads: dict[str, ProbeModel] = {}
        for name, member in self.members.items():
            set_seed(member.seed)
            self.heads[name] = ProbeModel(member.config, backbone=lm)

    def learned(self) -> TrainingRows:
        """Return the training rows, as often as they are learned in an epoch, with weights and the heads that learn from each."""
        repeats = self.rows.repeats
        rows = [row for turn in range(max(repeats)) for row in range(len(repeats)) if turn < repeats[row]]
        row_weights = [self.rows.weights[row] for row in rows]
        learned_by = learners(rows, self.heads, {name: member.left_out for name, member in self.members.items()})
        return TrainingRows(self.datasets["train"], rows, self.args.replies, row_weights, learned_by)

    def judged(self) -> Dataset | None:
        """Return the validation rows, and the heads that are chosen by each; None if there are folds."""
        if self.rows.validation is None:
            return None
        unjudged = {f"twin-{name}": twin.unjudged for name, twin in self.rows.twins.items()}
        judged_by = learners(range(len(self.rows.validation)), self.heads, unjudged)
        return TrainingRows(self.datasets["validation"], replies="tokens", learned_by=judged_by)

    def settings(self) -> JSON:
        """Return what must be the same if a run is resumed, as JSON values."""
        return {
            "recipe": {name: value for name, value in self.recipe.values.items() if name not in ("card", "measure")},
            # The rows of a step are those of the recipe, rounded up to a multiple of the processes.
            "training": self.args.describe() | {"per_device_train_batch_size": None},
            # Measured anew by each run; `backbone_weights` tells whether the backbone is the same.
            "head": self.config.to_dict() | {"fingerprint": None},
            "backbone_weights": weights_digest(self.lm),
            "rows": self.rows.digest(),
        }

    def clean(self) -> None:
        """Delete states and checkpoints. What loggers of `report_to` have written beside these stays."""
        # In this order: a kill between them leaves a run to resume, and not states, which can reveal the texts.
        self.clean_states()
        if is_main():
            folder = self.output / CHECKPOINTS
            for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
            (folder / SETUP_NAME).unlink(missing_ok=True)
            for place in (folder, self.output):  # the head may be saved elsewhere
                with suppress(OSError):
                    place.rmdir()

    def clean_states(self) -> None:
        """Delete the hidden states, unless they were asked to be kept."""
        if self.args.cache_dir is None and is_main():
            shutil.rmtree(self.output / STATES, ignore_errors=True)  # an earlier run may have left some


def _check(recipe: Recipe, rows: RecipeRows, config: ProbeConfig, args: ProbeTrainingArguments) -> None:
    """Raise `ProbeError` for settings that do not fit the rows, before the backbone is loaded."""
    check_metric(args.metric, rows.judged.labels, config)
    check_threshold_rule(config, args.max_false_positive_rate, args.threshold_rule)
    ProbeLoss.create(config, vars(args), rows.train.labels)
    if rows.calibration is not None:
        check_rates(config, recipe.calibration.rates, len(rows.calibration))
    for name in ("wrappings", "attacks"):
        if getattr(recipe.measure, name) is not None:
            check_transformable(f"measure.{name}", config)
    members = get_probe_type(config.probe_type).members(config)
    for source in recipe.train:
        if source.weights is not None and len(source.weights) > members:
            raise ProbeError(f"weights={source.weights}: probe_type={config.probe_type!r} takes {members} at most")
