"""From a recipe to a head folder: the work of `llama-probe train`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..distributed import claimed, on_main, process_group
from ..errors import ProbeError
from ..evaluation.resume import same_settings
from ..hub.folder import check_output, is_head_folder
from .estimate import Estimate
from .prepared import CHECKPOINTS, SETUP_NAME, PreparedRun
from .recipe import Recipe
from .trainer import ProbeTrainer


@dataclass(kw_only=True)
class TrainingRun:
    """A recipe, a backbone, and the folder that gets the head.

    Attributes:
        recipe: see `Recipe.load`.
        backbone: `"demo"`, a folder, a GGUF file, or a Hub id. dtype: of its weights.
        data_dir: folder of local copies of the sources.
        resume: from the checkpoints of a stopped run. The number of processes may differ.
        overwrite: replace the head, or the stopped run, that `output` holds.
    """

    recipe: Recipe | Mapping[str, Any] | str
    backbone: str
    output: Path
    dtype: str = "auto"
    data_dir: str | os.PathLike | None = None
    resume: bool = False
    overwrite: bool = False

    def run(self) -> dict[str, Any]:
        """Train, calibrate, measure and save.

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
            with claimed(self.output):
                prepared = self._prepare()
                try:
                    on_main(lambda: self._open_checkpoints(prepared))
                    return self._train(prepared)
                except Exception:
                    prepared.clean_states()
                    raise

    def estimate(self) -> Estimate:
        """Return how much there is to do: rows, tokens, time and bytes. Nothing is written."""
        return self._prepare(only_estimate=True).estimate

    def check_free(self) -> None:
        """Raise `ProbeError` if `output` holds a head or a stopped run that may not be replaced."""
        stopped = (self.output / CHECKPOINTS / SETUP_NAME).is_file()
        if self.overwrite or (self.resume and stopped):
            return
        if is_head_folder(self.output):
            raise ProbeError(f"{self.output} holds a finished head: --overwrite replaces it")
        if stopped:
            raise ProbeError(f"{self.output} holds a stopped run: --resume continues it, --overwrite starts anew")

    def _prepare(self, only_estimate: bool = False) -> PreparedRun:
        places = {"data_dir": self.data_dir, "dtype": self.dtype, "only_estimate": only_estimate}
        return PreparedRun.create(Recipe.load(self.recipe), Path(self.output), self.backbone, **places)

    def _open_checkpoints(self, prepared: PreparedRun) -> None:
        """Keep the checkpoints of this very training, or start with none; `ProbeError` if they are of another one."""
        path = prepared.output / CHECKPOINTS / SETUP_NAME
        if not (self.resume and path.is_file()):
            shutil.rmtree(path.parent, ignore_errors=True)
        same_settings(path, prepared.settings())

    def _train(self, prepared: PreparedRun) -> dict[str, Any]:
        trainer = ProbeTrainer.from_prepared(prepared)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(_ProgressBar)
        trainer.train(last_checkpoint(prepared.output / CHECKPOINTS) if self.resume else None)
        trainer.save_model()
        return trainer.results


class _ProgressBar(ProgressCallback):
    """Shows the metrics of the last epoch behind the bar, where the parent prints a dict for each."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show what was measured of the validation rows."""
        if self.training_bar is not None:
            numbers = {name.removeprefix("eval_"): value for name, value in (logs or {}).items()}
            self.training_bar.set_postfix({key: numbers[key] for key in ("loss", args.metric) if key in numbers})


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint: the Trainer writes its state last, so a kill leaves one without it."""
    whole = [str(path.parent) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.rpartition("-")[2]), default=None)
