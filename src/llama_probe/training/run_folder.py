"""`RunFolder`: the folder of a head while a run fills it, and what a stopped run leaves in it to resume from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..distributed import is_main, on_main
from ..errors import ProbeError
from ..evaluation.resume import same_settings
from ..files import JSON, make_folder, write_atomically
from ..hub.folder import is_head_folder
from .progress import Progress, read_progress, write_progress
from .row_encoder import STATES


CHECKPOINTS = ".checkpoints"  # folder of a stopped run, beside the folder of its states


@dataclass(frozen=True)
class RunFolder:
    """The folder `path` of a head. A stopped run has its states and its checkpoints in it.

    The files of `checkpoints` tell how far the run has come: `setup.json`, the settings of the run; `trained.safetensors`, the
    weights of all heads once they are trained; and `judged`, an empty file, once the head that was chosen has all results but the
    measurements of `measure`.
    """

    path: Path

    @property
    def states(self) -> Path:
        return self.path / STATES

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def _setup(self) -> Path:
        return self.checkpoints / "setup.json"

    @property
    def _trained(self) -> Path:
        return self.checkpoints / "trained.safetensors"

    @property
    def _judged(self) -> Path:
        return self.checkpoints / "judged"

    def check_free(self, resume: bool, overwrite: bool) -> None:
        """Raise `ProbeError` if the folder holds a head or a stopped run that is neither resumed nor overwritten."""
        if overwrite or (resume and self._setup.is_file()):
            return
        if self._setup.is_file():
            raise ProbeError(f"{self.path} holds a stopped run: --resume continues it, --overwrite starts anew")
        if is_head_folder(self.path):
            raise ProbeError(f"{self.path} holds a finished head: --overwrite replaces it")

    def open(self, settings: JSON, resume: bool) -> None:
        """Keep the checkpoints to resume from, or start with none. Checkpoints of another training are refused."""
        if not (resume and self._setup.is_file()):
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        same_settings(self._setup, settings)

    def read_trained(self) -> dict[str, Progress] | None:
        """Return the progress of the heads whose training has ended, with their weights; None before its end."""
        return read_progress(self._trained) if on_main(self._trained.is_file) else None

    def write_trained(self, progress: Mapping[str, Progress]) -> None:
        """Keep the progress of the heads, whose training has ended."""

        def write() -> None:
            make_folder(self.checkpoints)
            write_progress(self._trained, progress)

        on_main(write)

    def has_judged_head(self) -> bool:
        """Return True if the folder has the head of this run with all results but the measurements of `measure`."""
        return on_main(lambda: self._judged.is_file() and is_head_folder(self.path))

    def mark_judged(self) -> None:
        """Note that the head in the folder has all results but the measurements of `measure`."""
        on_main(lambda: write_atomically(self._judged, ""))

    def forget_training(self) -> None:
        """Delete the marks of an earlier training that has ended."""

        def delete() -> None:
            self._judged.unlink(missing_ok=True)
            self._trained.unlink(missing_ok=True)

        on_main(delete)

    def clean(self, keep_states: bool) -> None:
        """Delete states and checkpoints. Files of the loggers of `report_to` stay."""
        # States first: they can reveal the texts, and a run that is killed here can be resumed without them.
        if not is_main():
            return
        if not keep_states:
            shutil.rmtree(self.states, ignore_errors=True)
        for checkpoint in self.checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        for path in (self._judged, self._trained, self._setup):
            path.unlink(missing_ok=True)
        for place in (self.checkpoints, self.path):  # the head may be saved elsewhere
            with suppress(OSError):
                place.rmdir()
