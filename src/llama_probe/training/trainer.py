"""`ProbeTrainer`, the Trainer of transformers for heads, and `RecipeTrainer`, the `ProbeTrainer` of a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from ..distributed import meet, on_main
from ..errors import ProbeError
from ..files import JSON, make_folder, write_atomically
from ..heads.probe import ProbeModel
from ..hub.folder import is_head_folder
from .head_trainer import HeadTrainer
from .measurements import measure
from .prepared import JUDGED_NAME, TRAINED_NAME, PreparedRun
from .progress import Progress, last_checkpoint, read_progress, write_progress
from .recipe import Recipe
from .results import calibrated_ablations, choose_head, complete_results, save_head


class ProbeTrainer(HeadTrainer):
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

        Raises:
            ProbeError: a field of the recipe is wrong, a source cannot be read, or the disk is too small. Raised before the
                backbone is loaded.
        """
        meet()
        backbone = backbone if isinstance(backbone, nn.Module) else str(backbone)
        loaded = Recipe.load(recipe, settings)
        run = PreparedRun(loaded, Path(output_dir).expanduser(), backbone, processing_class, data_dir, dtype)
        return RecipeTrainer(run.prepare(), **kwargs)


class RecipeTrainer(ProbeTrainer):
    """The trainer of a recipe that is prepared; see `ProbeTrainer.from_recipe`."""

    def __init__(self, run: PreparedRun, **kwargs: Any):
        head_args = {name: member.training for name, member in run.members.items()}
        rows = {"train_dataset": run.train_dataset(), "eval_dataset": run.validation_dataset()}
        super().__init__(run.heads, run.args, **rows, head_args=head_args, **kwargs)
        self._encoder.tokenizer = run.prompts.tokenizer  # the parent would save a tokenizer with each checkpoint
        self.run = run
        self.chosen: ProbeModel | None = None
        checkpoints = Path(self.args.output_dir)
        self._trained = checkpoints / TRAINED_NAME
        self._judged = checkpoints / JUDGED_NAME

    @property
    def results(self) -> JSON | None:
        """Results of the head that was chosen; None before `judge`."""
        return None if self.chosen is None else self.chosen.results

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs) -> TrainOutput:
        """Train the heads; see `Trainer.train`. Then `judge` them.

        Args:
            resume_from_checkpoint: True also continues a run that was stopped after its training, which is not trained again,
                or before its first checkpoint.
        """
        if resume_from_checkpoint and on_main(self._trained.is_file):
            self._best_epochs.progress = read_progress(self._trained)
            self._best_epochs.load_weights()
            self.judge()
            return TrainOutput(0, 0.0, {})
        for earlier in (self._judged, self._trained):
            on_main(partial(earlier.unlink, missing_ok=True))
        if resume_from_checkpoint is True and last_checkpoint(Path(self.args.output_dir)) is None:
            resume_from_checkpoint = None
        return super().train(resume_from_checkpoint, trial, **kwargs)

    def judge(self) -> None:
        """Choose the best head and write it into the folder of the run. Measure the head, and write it after each measurement.

        A run that is stopped while it measures has its head. A run that resumes makes the missing measurements.
        """
        run = self.run
        on_main(self._write_trained)
        if on_main(lambda: self._judged.is_file() and is_head_folder(run.output)):
            self.chosen = ProbeModel.from_pretrained(run.output, backbone=run.lm).to(self.args.device)
        else:
            choice = choose_head(run, self.progress, self.state.epoch)
            self.chosen = choice.head
            on_main(lambda: save_head(run, choice.head, run.output))
            complete_results(run, choice)
            on_main(lambda: save_head(run, choice.head, run.output))
            on_main(lambda: write_atomically(self._judged, ""))
        if run.rows.measured or run.rows.ablations:
            head = self.chosen
            for measured in measure(run, head, calibrated_ablations(run), head.results.get("measured")):
                head.results["measured"] = measured
                on_main(lambda: bool(head.save_pretrained(run.output)))

    def _write_trained(self) -> None:
        if self._trained.is_file():
            return
        trained = {
            name: Progress(each.scores, each.epochs or self.state.epoch, self.heads[name].state_dict())
            for name, each in self.progress.items()
        }
        make_folder(self._trained.parent)
        write_progress(self._trained, trained)

    def _save_heads(self, output_dir: str | None = None) -> Path:
        if self.chosen is None:
            raise ProbeError("the recipe has no head yet: call train() first")
        folder = Path(output_dir or self.run.output)
        save_head(self.run, self.chosen, folder)
        self.run.clean()
        return folder

    def _folder_to_push(self) -> Path:
        return self._save_heads()
