"""The plan of a run: the rows of a recipe as prompts, the heads to train, and what the work takes; then the hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ..backbone.loading import load_backbone, load_tokenizer, weights_digest
from ..data.disk_states import DiskStates, shared_config
from ..data.prompts import PromptDataset, PromptFormat
from ..distributed import check_shared, is_main, world_size
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
from .estimate import Estimate, decide_caching, seconds_of_reading, trial_pace
from .loss import ProbeLoss
from .recipe import Recipe
from .recipe_rows import RecipeRows
from .rows import TrainingRows, learners
from .run_folder import RunFolder
from .search import Candidate, draw_candidates


logger = logging.get_logger(__name__)

_STRATEGIES = ("save_strategy", "eval_strategy")

# The rows of a recipe by the name of their part: hidden states, or prompts if the states are not cached.
States = Mapping[str, Dataset]


@dataclass(frozen=True)
class Plan:
    """All that a run needs before the hidden states are computed.

    Attributes:
        folder: the folder of the head, and meanwhile of states and checkpoints.
        backbone: name of the backbone; None for a loaded LM.
        dtype: of the weights of the backbone, as the user said it.
        lm: the frozen LM.
        config: config of a head. Those of a search differ from it.
        prompts: how texts become token ids.
        datasets: the prompts of each part of the rows.
        candidates: a head a seed, or a trial of a search, by name. The best of them is kept.
        members: the candidates, each candidate again without each fold, and the ablations.
        read: the config that tells which states are read, for all heads.
        is_cached: True if the hidden states are computed once and kept on disk.
    """

    recipe: Recipe
    rows: RecipeRows
    folder: RunFolder
    backbone: str | None
    dtype: str
    args: ProbeTrainingArguments
    lm: PreTrainedModel
    config: ProbeConfig
    prompts: PromptFormat
    datasets: Mapping[str, PromptDataset]
    candidates: Mapping[str, Candidate]
    members: Mapping[str, Candidate]
    cache: DiskStates
    read: ProbeConfig
    is_cached: bool
    estimate: Estimate

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


def make_plan(
    recipe: Recipe,
    rows: RecipeRows,
    output: Path,
    backbone: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
) -> Plan:
    """Check all settings, load the backbone, and decide what is trained and what is cached. Nothing is written.

    Args:
        output: folder that gets the head.
        backbone: `"demo"`, a folder, a GGUF file, a Hub id, or a loaded LM with its `tokenizer`.

    Raises:
        ProbeError: a setting does not fit the rows, or the disk is too small. Raised before the backbone is loaded.
    """
    folder = RunFolder(output)
    args = _arguments(recipe, folder)
    count = rows.num_plain + rows.num_extra
    config = head_config({"prompt_format": "chat", **recipe.head}, rows.train, count, backbone)
    rows_of_step = args.per_device_train_batch_size
    args.per_device_train_batch_size = None
    args.fill(config, count, rows_of_step)
    _check(recipe, rows, config, args)
    name = backbone if isinstance(backbone, str) else None
    if tokenizer is None and name is None:
        raise ProbeError("a loaded backbone needs processing_class=, its tokenizer")
    prompts = PromptFormat.from_config(config, tokenizer or load_tokenizer(name))
    config = config.replace(**prompts.config_fields())
    datasets: dict[str, PromptDataset] = {}
    for part, texts in rows.parts().items():
        places = texts.places if part == "train" else None
        datasets[part] = prompts.encode_for(config, texts.texts, texts.labels, places)
    prompts_once = {tuple(row["input_ids"]): row for part in datasets.values() for row in part}
    cache = DiskStates(args.cache_dir or folder.states)
    if args.cache_states is True:  # the states on the disk may all be of these rows
        least = cache.bytes_of(config, list(prompts_once.values())) - cache.bytes_on_disk()
        decide_caching(args, least, cache.folder)

    lm = load_backbone(backbone, dtype)[0] if isinstance(backbone, str) else backbone.eval()
    config = describe(lm, config)
    candidates = _candidates(recipe, config)
    read = shared_config([candidate.config for candidate in candidates.values()])
    left = cache.missing(lm, read, datasets.values())
    needed = cache.bytes_of(read, left)
    is_cached = decide_caching(args, needed, cache.folder, further_passes=1)
    tokens = sum(map(len, prompts_once))
    pace = trial_pace(lm, datasets["train"].prompts, read.layer_indices)
    seconds = seconds_of_reading(pace, lm, read, list(prompts_once.values()))
    seconds_left = seconds_of_reading(pace, lm, read, left) if len(left) < len(prompts_once) else seconds
    estimate = Estimate(
        rows=len(prompts_once),
        tokens=tokens,
        bytes=needed if is_cached else 0,
        tokens_per_second=world_size() * tokens / seconds,
        passes=seconds_left / seconds if is_cached else args.num_train_epochs + 1,
    )
    if is_main():
        logger.warning(f"{recipe.name or 'training'} on {config.base_model_name_or_path}: {estimate}")
    return Plan(
        recipe=recipe,
        rows=rows,
        folder=folder,
        backbone=name,
        dtype=dtype,
        args=args,
        lm=lm,
        config=config,
        prompts=prompts,
        datasets=datasets,
        candidates=candidates,
        members=_members(recipe, rows, config, candidates),
        cache=cache,
        read=read,
        is_cached=is_cached,
        estimate=estimate,
    )


def compute_states(plan: Plan) -> States:
    """Compute the hidden states of all rows that are not on disk, and return the rows as the heads read them."""
    check_shared(plan.folder.path)
    states: dict[str, Dataset] = dict(plan.datasets)
    if plan.is_cached:
        states |= plan.cache.datasets(plan.lm, plan.read, plan.datasets)
    if plan.rows.folds:  # the plain rows of `train` are judged by heads that have not learned from them
        states["validation"] = TrainingRows(states["train"], range(plan.rows.num_plain))
    return states


def create_heads(plan: Plan) -> dict[str, ProbeModel]:
    """Return the untrained heads of all members, by name. They have the LM if the states are not cached."""
    heads: dict[str, ProbeModel] = {}
    for name, member in plan.members.items():
        set_seed(member.seed)
        heads[name] = ProbeModel(member.config, backbone=None if plan.is_cached else plan.lm)
    return heads


def training_rows(plan: Plan, states: States) -> TrainingRows:
    """Return the training rows of an epoch, with weights and the heads that learn from each row."""
    repeats = plan.rows.repeats
    rows = [row for turn in range(max(repeats)) for row in range(len(repeats)) if turn < repeats[row]]
    row_weights = [plan.rows.weights[row] for row in rows]
    left_out = {name: member.left_out for name, member in plan.members.items()}
    learned_by = learners(rows, plan.members, left_out)
    return TrainingRows(states["train"], rows, plan.args.replies, row_weights, learned_by)


def validation_rows(plan: Plan, states: States) -> TrainingRows | None:
    """Return the validation rows, with the heads that are chosen by each row; None if there are folds."""
    if plan.rows.validation is None:
        return None
    excluded = {f"ablation-{name}": part.excluded_from_validation for name, part in plan.rows.ablations.items()}
    judged_by = learners(range(len(plan.rows.validation)), plan.members, excluded)
    return TrainingRows(states["validation"], replies="tokens", learned_by=judged_by)


def _arguments(recipe: Recipe, folder: RunFolder) -> ProbeTrainingArguments:
    # A recipe, which is saved and shared, cannot set these: an argument that is given twice is refused.
    own = {"output_dir": str(folder.checkpoints), "seed": recipe.seed}
    own |= {"push_to_hub": False, "hub_model_id": None, "hub_token": None}
    # `no` in YAML is False.
    training = {name: value or "no" if name in _STRATEGIES else value for name, value in recipe.training.items()}
    try:
        args = ProbeTrainingArguments(**own, **training)
        args.check()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ProbeError(f"training: {first_line(error)}") from None
    return args


def _candidates(recipe: Recipe, config: ProbeConfig) -> dict[str, Candidate]:
    if recipe.search.trials:
        return draw_candidates(recipe.search, config, recipe.seed)
    seeds: Iterable[int] = range(recipe.seed, recipe.seed + recipe.seeds)
    return {f"seed-{seed}": Candidate(seed, config) for seed in seeds}


def _members(
    recipe: Recipe, rows: RecipeRows, config: ProbeConfig, candidates: Mapping[str, Candidate]
) -> dict[str, Candidate]:
    members: dict[str, Candidate] = {}
    for name, candidate in candidates.items():
        members[name] = candidate
        for number, fold in enumerate(rows.folds):
            members[f"{name}-fold-{number}"] = replace(candidate, left_out=fold)
    for name, ablation in rows.ablations.items():
        members[f"ablation-{name}"] = Candidate(recipe.seed, config, left_out=ablation.left_out)
    return members


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
