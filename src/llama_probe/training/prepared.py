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
from .estimate import Estimate, decide_caching, trial_speed
from .loss import ProbeLoss
from .recipe import Recipe
from .recipe_rows import RecipeRows, read_rows
from .row_encoder import STATES
from .rows import TrainingRows, learners
from .search import Candidate, draw_candidates


logger = logging.get_logger(__name__)

_STRATEGIES = ("save_strategy", "eval_strategy")
CHECKPOINTS = ".checkpoints"  # folder of a stopped run, beside the folder of its states
SETUP_NAME = "setup.json"  # settings of the run
TRAINED_NAME = "trained.safetensors"  # weights of all heads, once they are trained
JUDGED_NAME = "judged"  # a mark, once the head in the output folder has all results but the measurements of `measure`


class PreparedRun:
    """A recipe on a backbone, with the rows. `plan` loads the backbone; `prepare` also computes states and makes heads.

    `candidates` has a head a seed or a trial of a search; the best of them is kept. `members` are the candidates, each
    candidate again without each fold, and the ablations. `heads` are the heads of all members, and `datasets` the prompts or
    states of each part of the rows.

    Args:
        output: folder that gets the head, and meanwhile states and checkpoints.
        backbone: `"demo"`, a folder, a GGUF file, a Hub id, or a loaded LM with its `tokenizer`.

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
    ):
        self.recipe = recipe
        self.output = output
        self.dtype = dtype
        self.backbone = name = backbone if isinstance(backbone, str) else None
        # A recipe, which is saved and shared, cannot set these: an argument that is given twice is refused.
        own = {"output_dir": str(output / CHECKPOINTS), "seed": recipe.seed}
        own |= {"push_to_hub": False, "hub_model_id": None, "hub_token": None}
        # `no` in YAML is False.
        training = {name: value or "no" if name in _STRATEGIES else value for name, value in recipe.training.items()}
        try:
            self.args = args = ProbeTrainingArguments(**own, **training)
            args.check()
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise ProbeError(f"training: {first_line(error)}") from None
        if world_size() > 1:  # other ranks find the rows that the main rank has fetched
            on_main(lambda: bool(read_rows(recipe, data_dir)))
        self.rows = rows = read_rows(recipe, data_dir)
        count = rows.num_plain + rows.num_extra
        config = head_config({"prompt_format": "chat", **recipe.head}, rows.train, count, backbone)
        rows_of_step = args.per_device_train_batch_size
        args.per_device_train_batch_size = None
        args.fill(config, count, rows_of_step)
        _check(recipe, rows, config, args)
        if tokenizer is None and name is None:
            raise ProbeError("a loaded backbone needs processing_class=, its tokenizer")
        self.prompts = prompts = PromptFormat.from_config(config, tokenizer or load_tokenizer(name))
        self.config = config = config.replace(**prompts.config_fields())
        self.datasets: dict[str, Dataset] = {}
        for part, texts in rows.parts().items():
            places = texts.places if part == "train" else None
            self.datasets[part] = prompts.encode_for(config, texts.texts, texts.labels, places)
        self._prompts_once = {tuple(row["input_ids"]): row for part in self.datasets.values() for row in part}
        self._cache = cache = DiskStates(args.cache_dir or output / STATES)
        if args.cache_states is True:  # the states on the disk may all be of these rows
            least = cache.bytes_of(config, list(self._prompts_once.values())) - cache.bytes_on_disk()
            decide_caching(args, least, cache.folder)
        self._backbone = backbone

    def plan(self) -> Estimate:
        """Load the backbone, and return the estimate of the run. Nothing is written."""
        recipe = self.recipe
        args = self.args
        cache = self._cache
        is_named = isinstance(self._backbone, str)
        self.lm = lm = load_backbone(self._backbone, self.dtype)[0] if is_named else self._backbone.eval()
        self.config = config = describe(lm, self.config)
        if recipe.search.trials:
            self.candidates = draw_candidates(recipe.search, config, recipe.seed)
        else:
            seeds = range(recipe.seed, recipe.seed + recipe.seeds)
            self.candidates = {f"seed-{seed}": Candidate(seed, config) for seed in seeds}
        self._read = read = shared_config([candidate.config for candidate in self.candidates.values()])
        left = cache.missing(lm, read, self.datasets.values())
        needed = cache.bytes_of(read, left)
        self._is_cached = decide_caching(args, needed, cache.folder, further_passes=1)
        tokens = sum(map(len, self._prompts_once))
        left_share = sum(len(row["input_ids"]) for row in left) / tokens
        estimate = Estimate(
            rows=len(self._prompts_once),
            tokens=tokens,
            bytes=needed if self._is_cached else 0,
            tokens_per_second=world_size() * trial_speed(lm, self.datasets["train"].prompts, read.layer_indices),
            passes=left_share if self._is_cached else args.num_train_epochs + 1,
        )
        if is_main():
            logger.warning(f"{recipe.name or 'training'} on {config.base_model_name_or_path}: {estimate}")
        return estimate

    def prepare(self) -> PreparedRun:
        """Do as `plan` says: compute the hidden states of the rows, and make the heads."""
        self.plan()
        check_shared(self.output)
        if self._is_cached:
            parts = self.datasets.items()
            self.datasets = {part: self._cache.dataset(self.lm, self._read, texts) for part, texts in parts}
        if self.rows.folds:  # the plain rows of `train` are judged by heads that have not learned from them
            self.datasets["validation"] = TrainingRows(self.datasets["train"], range(self.rows.num_plain))
        self._create_heads(None if self._is_cached else self.lm)
        return self

    def _create_heads(self, lm: PreTrainedModel | None) -> None:
        self.members: dict[str, Candidate] = {}
        for name, candidate in self.candidates.items():
            self.members[name] = candidate
            for number, fold in enumerate(self.rows.folds):
                self.members[f"{name}-fold-{number}"] = replace(candidate, left_out=fold)
        for name, ablation in self.rows.ablations.items():
            self.members[f"ablation-{name}"] = Candidate(self.recipe.seed, self.config, left_out=ablation.left_out)
        self.heads: dict[str, ProbeModel] = {}
        for name, member in self.members.items():
            set_seed(member.seed)
            self.heads[name] = ProbeModel(member.config, backbone=lm)

    def train_dataset(self) -> TrainingRows:
        """Return the training rows of an epoch, with weights and the heads that learn from each row."""
        repeats = self.rows.repeats
        rows = [row for turn in range(max(repeats)) for row in range(len(repeats)) if turn < repeats[row]]
        row_weights = [self.rows.weights[row] for row in rows]
        learned_by = learners(rows, self.heads, {name: member.left_out for name, member in self.members.items()})
        return TrainingRows(self.datasets["train"], rows, self.args.replies, row_weights, learned_by)

    def validation_dataset(self) -> Dataset | None:
        """Return the validation rows, with the heads that are chosen by each row; None if there are folds."""
        if self.rows.validation is None:
            return None
        excluded = {f"ablation-{name}": part.excluded_from_validation for name, part in self.rows.ablations.items()}
        judged_by = learners(range(len(self.rows.validation)), self.heads, excluded)
        return TrainingRows(self.datasets["validation"], replies="tokens", learned_by=judged_by)

    def settings(self) -> JSON:
        """Return the values that must be the same if a run is resumed, for a JSON file."""
        return {
            "recipe": {name: value for name, value in self.recipe.values.items() if name not in ("card", "measure")},
            # The rows of a step depend on the number of processes, which may differ.
            "training": self.args.describe() | {"per_device_train_batch_size": None},
            # Measured anew by each run; `backbone_weights` tells whether the backbone is the same.
            "head": self.config.to_dict() | {"fingerprint": None},
            "backbone_weights": weights_digest(self.lm),
            "rows": self.rows.digest(),
        }

    def clean(self) -> None:
        """Delete states and checkpoints. Files of the loggers of `report_to` stay."""
        # States first: they can reveal the texts, and a run that is killed here can be resumed without them.
        if not is_main():
            return
        if self.args.cache_dir is None:
            shutil.rmtree(self.output / STATES, ignore_errors=True)  # an earlier run may have left some
        folder = self.output / CHECKPOINTS
        for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        for name in (JUDGED_NAME, TRAINED_NAME, SETUP_NAME):
            (folder / name).unlink(missing_ok=True)
        for place in (folder, self.output):  # the head may be saved elsewhere
            with suppress(OSError):
                place.rmdir()


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
