"""A search over head kinds and their hyper-parameters on shared passes of the backbone: `llama-probe sweep`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..distributed import claimed, is_main, on_main, process_group, world_size
from ..errors import ProbeError
from ..evaluation.plots import write_sensitivity_plot
from ..evaluation.report import predict_logits
from ..evaluation.resume import same_settings
from ..files import remove_leftovers, write_atomically
from ..heads import get_probe_type
from ..hub.folder import is_head_folder
from .learners import Candidate, Learner
from .options import HEAD_FOLDER, SWEEP_NAME, SweepOptions
from .recipe import AUTO
from .results import judge
from .rows import TrainingData
from .run import TrainingRun
from .search_space import SearchSpace, split_drawn
from .shared import CHECKPOINT_NAME, SharedTraining


SETUP_NAME = "setup.json"


@dataclass(kw_only=True)
class Sweep(SweepOptions):
    """A search that draws configurations, trains them side by side, and keeps the best by validation.

    The processes of `torchrun` divide rows and configurations, and find what one process finds; see `SharedTraining`.

    Attributes:
        training: backbone, data, prompts and output. Its `recipe` gives epochs, metric and patience, its `head` the fields that
            all configurations share.
        space: kinds to search.
    """

    training: TrainingRun
    space: SearchSpace = field(default_factory=SearchSpace)

    def run(self) -> dict[str, Any]:
        """Draw, train, rank and save.

        The folder gets `sensitivity.png`, the best head in `head`, and `sweep.json`.

        Returns:
            The contents of `sweep.json`: the ranked configurations with their parameters and scores. Those that failed come
            last, with score None.

        Raises:
            ProbeError: a setting or a row is wrong, raised before training.
        """
        output = self.training.output
        with process_group(), claimed(output):
            self._check()
            # A config of the default kind; each draw replaces its kind.
            head = {**self.training.head, "probe_type": AUTO}
            with replace(self.training, output=output / HEAD_FOLDER, head=head).prepare() as data:
                return self._search(output, data)

    def _check(self) -> None:
        epochs = self.training.recipe.num_train_epochs
        if epochs is not None and not (epochs >= 1 and float(epochs).is_integer()):
            raise ProbeError(f"num_train_epochs={epochs} must be a whole number from 1")
        output = self.training.output
        if not self.resume and on_main(lambda: any((output / name).exists() for name in (SETUP_NAME, SWEEP_NAME))):
            raise ProbeError(f"{output} holds a sweep already: continue with --resume, or give another folder")

    def _search(self, output: Path, data: TrainingData) -> dict[str, Any]:
        seed = self.training.seeds[0]
        drawn = [self.space.draw(data.config, number, seed) for number in range(self.trials)]
        settings = {"trials": self.trials, "keep": self.keep, "seed": seed, **data.settings(), "drawn": drawn}
        on_main(lambda: same_settings(output / SETUP_NAME, settings))
        if finished := on_main(lambda: _read_finished(output)):
            return finished
        epochs = int(data.recipe.num_train_epochs)
        training = SharedTraining(
            [self._candidate(number, values, data) for number, values in enumerate(drawn)],
            data.trained,
            data.datasets["validation"],
            data.recipe.metric,
            epochs,
            output,
            data.lm,
            self.keep,
            data.recipe.patience or epochs,
            seed,
        )
        ranked = training.run(self.resume)
        result = {
            "metric": data.recipe.metric,
            "processes": world_size(),
            "rows": {name: len(part) for name, part in data.parts.items() if name != "test"},
            "trials": [_describe_trial(learner, drawn[learner.candidate.number]) for learner in ranked],
        }
        self._save_best(output / HEAD_FOLDER, ranked[0], drawn[ranked[0].candidate.number], data)
        if is_main():
            remove_leftovers(output)
            write_atomically({output / SWEEP_NAME: json.dumps(result, indent=2) + "\n"})
            write_sensitivity_plot(output / SWEEP_NAME)
            (output / CHECKPOINT_NAME).unlink(missing_ok=True)
        return result

    def _candidate(self, number: int, drawn: dict[str, Any], data: TrainingData) -> Candidate:
        head, own = split_drawn(drawn)
        recipe, seed = replace(data.recipe, **own), self.training.seeds[0]
        return Candidate.create(number, data.config.replace(**head), recipe, data.labels, seed)

    def _save_best(self, folder: Path, learner: Learner, drawn: dict[str, Any], data: TrainingData) -> None:
        """Write the best head as a folder with its card. Only now are the test rows scored."""
        candidate, probe = learner.candidate, learner.probe
        recipe = replace(data.recipe, **split_drawn(drawn)[1])
        data = replace(data, recipe=recipe, config=probe.config)
        if data.lm is not None:
            probe.set_backbone(data.lm)
        logits = predict_logits(probe, data.datasets["validation"])
        result = judge(probe, data, logits)
        single = {"seed": candidate.seed, "epochs": learner.history.best_epoch, **result}
        replace(self.training, output=folder).save(probe, data, [single], candidate.seed, logits)


def read_sweep(folder: Path) -> dict[str, Any]:
    """Read the `sweep.json` of a finished sweep."""
    return json.loads((folder / SWEEP_NAME).read_text(encoding="utf-8"))


def _read_finished(folder: Path) -> dict[str, Any] | None:
    """Read the `sweep.json` if all is trained and written: the checkpoint is removed last."""
    written = (folder / SWEEP_NAME).is_file() and is_head_folder(folder / HEAD_FOLDER)
    return read_sweep(folder) if written and not (folder / CHECKPOINT_NAME).exists() else None


def _describe_trial(learner: Learner, drawn: dict[str, Any]) -> dict[str, Any]:
    return {
        "number": learner.candidate.number,
        "score": None if learner.history.status == "failed" else learner.history.best,
        "scores": learner.history.scores,
        "best_epoch": learner.history.best_epoch,
        "status": learner.history.status,
        "num_parameters": learner.probe.num_parameters(),
        "params": drawn,
        "options": _train_options(drawn),
    }


def _train_options(drawn: dict[str, Any]) -> str:
    known, words = get_probe_type(drawn["probe_type"]).options, []
    for name, value in drawn.items():
        text = f"{value:.3g}" if isinstance(value, float) else value
        words.append(f"--option {name}={text}" if name in known else f"--{name.replace('_', '-')} {text}")
    return " ".join(words)
