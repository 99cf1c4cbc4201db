"""`RecipeTrainer`: trains the heads of a recipe, and saves the best before anything is measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from ..distributed import on_main
from ..errors import ProbeError
from ..files import JSON, make_folder, write_atomically
from ..heads.probe import ProbeModel
from ..hub.folder import is_head_folder
from .head_trainer import HeadTrainer
from .measurements import measure
from .prepared import JUDGED_NAME, TRAINED_NAME, PreparedRun
from .progress import Progress, last_checkpoint, read_progress, write_progress
from .results import calibrated_ablations, choose_head, complete_results, save_head


class RecipeTrainer(HeadTrainer):
    """The trainer of a recipe that is prepared; see `ProbeTrainer.from_recipe`."""

    def __init__(self, run: PreparedRun, **kwargs: Any):
        head_args = {name: member.training for name, member in run.members.items()}
        rows = {"train_dataset": run.train_dataset(), "eval_dataset": run.validation_dataset()}
        super().__init__(run.heads, run.args, **rows, head_args=head_args, **kwargs)
        self._encoder.tokenizer = run.prompts.tokenizer  # the parent would save one with each checkpoint
        self.run = run
        self.chosen: ProbeModel | None = None
        checkpoints = Path(self.args.output_dir)
        self._trained, self._judged = checkpoints / TRAINED_NAME, checkpoints / JUDGED_NAME

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
        on_main(self._forget_earlier_run)
        if resume_from_checkpoint is True and last_checkpoint(Path(self.args.output_dir)) is None:
            resume_from_checkpoint = None
        return super().train(resume_from_checkpoint, trial, **kwargs)

    def judge(self) -> None:
        """Choose the best head and write it into the folder of the run. Then measure it, and write it after each measurement.

        A run that is stopped in between has its head. If it resumes, it measures what is missing.
        """
        run = self.run
        logits = None
        on_main(self._write_trained)
        if on_main(lambda: self._judged.is_file() and is_head_folder(run.output)):
            self.chosen = ProbeModel.from_pretrained(run.output, backbone=run.lm).to(self.args.device)
        else:
            choice = choose_head(run, self.progress, self.state.epoch)
            self.chosen = choice.head
            logits = choice.logits
            on_main(lambda: save_head(run, choice.head, run.output))
            complete_results(run, choice)
            on_main(lambda: save_head(run, choice.head, run.output))
            on_main(lambda: write_atomically(self._judged, ""))
        if run.rows.measured or run.rows.ablations:
            head = self.chosen
            for measured in measure(run, head, calibrated_ablations(run, logits), head.results.get("measured")):
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

    def _forget_earlier_run(self) -> None:
        for path in (self._judged, self._trained):
            path.unlink(missing_ok=True)

    def _save_heads(self, output_dir: str | None = None) -> Path:
        if self.chosen is None:
            raise ProbeError("the recipe has no head yet: call train() first")
        folder = Path(output_dir or self.run.output)
        save_head(self.run, self.chosen, folder)
        self.run.clean()
        return folder

    def _folder_to_push(self) -> Path:
        return self._save_heads()
