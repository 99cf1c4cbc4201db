"""From a recipe to a head folder: the work of `llama-probe train`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import ProgressCallback
from transformers.utils import logging

from ..distributed import claimed, on_main
from ..errors import ProbeError
from ..evaluation.resume import same_settings
from ..files import JSON
from ..hub.folder import check_output, is_head_folder
from .prepared import CHECKPOINTS, SETUP_NAME, PreparedRun
from .recipe import Recipe
from .trainer import RecipeTrainer


logger = logging.get_logger(__name__)


def train_recipe(
    recipe: Recipe,
    backbone: str,
    output: Path,
    dtype: str = "auto",
    data_dir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> JSON:
    """Train a head by a recipe, write it into a folder, measure it, and write the measurements. Return its `results`.

    A run that fails or is killed leaves states and checkpoints to resume from, and once it measures also the head. The processes
    of `torchrun` divide the rows and must see the same `output`; the first process writes.

    Args:
        resume: continue a stopped run from its checkpoints, or measure what is missing of its head. The number of processes
            may differ.
        overwrite: replace the head, or the stopped run, that `output` holds.
    """
    setup = output / CHECKPOINTS / SETUP_NAME

    def check_free() -> None:
        if overwrite or (resume and setup.is_file()):
            return
        if setup.is_file():
            raise ProbeError(f"{output} holds a stopped run: --resume continues it, --overwrite starts anew")
        if is_head_folder(output):
            raise ProbeError(f"{output} holds a finished head: --overwrite replaces it")

    def open_checkpoints() -> None:
        """Keep the checkpoints to resume from, or start with none. Checkpoints of another training are refused."""
        if not (resume and setup.is_file()):
            shutil.rmtree(setup.parent, ignore_errors=True)
        same_settings(setup, run.settings())

    check_output(output)
    on_main(check_free)
    with claimed(output):
        run = PreparedRun(recipe, output, backbone, data_dir=data_dir, dtype=dtype).prepare()
        on_main(open_checkpoints)  # an error here leaves the states for the run that can be resumed
        try:
            trainer = RecipeTrainer(run)
            if trainer.pop_callback(ProgressCallback) is not None:
                trainer.add_callback(_ProgressBar)
            trainer.train(resume)
            trainer.save_model()
        except Exception:
            logger.warning(
                f"{output} keeps what was done, and hidden states, which can reveal the texts: --resume goes on"
            )
            raise
        return trainer.results


class _ProgressBar(ProgressCallback):
    """Shows the metrics of the last epoch behind the bar, where the parent prints a dict for each."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the loss and the metric of the validation rows."""
        if self.training_bar is not None:
            numbers = {name.removeprefix("eval_"): value for name, value in (logs or {}).items()}
            self.training_bar.set_postfix({key: numbers[key] for key in ("loss", args.metric) if key in numbers})
