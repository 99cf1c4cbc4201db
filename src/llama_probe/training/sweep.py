"""A search over head kinds and their hyper-parameters on shared passes of the backbone: `llama-probe sweep`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed import claimed, is_main, on_main, process_group, world_size
from ..errors import ProbeError
from ..evaluation.plots import write_sensitivity_plot
from ..evaluation.prediction import predict_logits
from ..evaluation.resume import same_settings
from ..files import remove_leftovers, write_atomically
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..hub.folder import is_head_folder
from .learners import Candidate, Learner
from .options import HEAD_FOLDER, SWEEP_NAME, SweepOptions
from .recipe import AUTO, COMMON, Recipe
from .results import judge
from .rows import TrainingData
from .run import TrainingRun
from .shared import CHECKPOINT_NAME, SharedTraining


SETUP_NAME = "setup.json"
_RECIPE_FIELDS = {item.metadata.get("option", item.name): item.name for item in fields(Recipe)}


@dataclass(kw_only=True)
class Sweep(SweepOptions):
    """A search that draws configurations, trains them side by side, and keeps the best by validation.

    The processes of `torchrun` divide rows and configurations, and find what one process finds; see `SharedTraining`.

    Attributes:
        training: backbone, data, prompts and output. Its `recipe` gives epochs, metric and patience, its `head` the fields that
            all configurations share.
    """

    training: TrainingRun

    def run(self) -> dict[str, Any]:
        """Draw, train, rank and save.

        The folder gets `sensitivity.png`, the best head in `head`, and `sweep.json`, whose contents are returned: the
        configurations with their parameters and scores, best first. Those that failed come last, with score None.

        Raises:
            ProbeError: a setting or a row is wrong, raised before training.
        """
        output, epochs = self.training.output, self.training.recipe.num_train_epochs
        if epochs is not None and not (epochs >= 1 and float(epochs).is_integer()):
            raise ProbeError(f"num_train_epochs={epochs} must be a whole number from 1")
        with process_group(), claimed(output):
            if not self.resume and on_main(lambda: any((output / name).exists() for name in (SETUP_NAME, SWEEP_NAME))):
                raise ProbeError(f"{output} holds a sweep already: continue with --resume, or give another folder")
            # A config of the default kind; each draw replaces its kind.
            head = {**self.training.head, "probe_type": AUTO}
            training = replace(self.training, output=output / HEAD_FOLDER, head=head)
            with training.prepare() as data:
                return self._search(output, training, data)

    def _search(self, output: Path, run: TrainingRun, data: TrainingData) -> dict[str, Any]:
        seed, epochs, recipe = run.seeds[0], int(data.recipe.num_train_epochs), data.recipe
        drawn = [draw(self.probe_types, data.config, number, seed) for number in range(self.trials)]
        settings = {"trials": self.trials, "keep": self.keep, "seed": seed, **data.settings(), "drawn": drawn}
        on_main(lambda: same_settings(output / SETUP_NAME, settings))
        if finished := on_main(lambda: _read_finished(output)):
            return finished
        candidates = []
        for number, values in enumerate(drawn):
            head, own = split_drawn(values)
            config = data.config.replace(**head)
            candidates.append(Candidate.create(number, config, replace(recipe, **own), data.labels, seed))
        training = SharedTraining(
            candidates,
            data.trained,
            data.datasets["validation"],
            recipe.metric,
            epochs,
            output,
            data.lm,
            self.keep,
            recipe.patience or epochs,
            seed,
        )
        ranked = training.run(self.resume)
        result = {
            "metric": recipe.metric,
            "processes": world_size(),
            "rows": {name: len(part) for name, part in data.parts.items() if name != "test"},
            "trials": [_describe_trial(learner, drawn[learner.candidate.number]) for learner in ranked],
        }
        _, best = split_drawn(drawn[ranked[0].candidate.number])
        _save_best(ranked[0], run, replace(data, recipe=replace(recipe, **best)))
        if is_main():
            remove_leftovers(output)
            write_atomically({output / SWEEP_NAME: json.dumps(result, indent=2) + "\n"})
            write_sensitivity_plot(output / SWEEP_NAME)
            (output / CHECKPOINT_NAME).unlink(missing_ok=True)
        return result


def draw(probe_types: Sequence[str], base: ProbeConfig, number: int, seed: int) -> dict[str, Any]:
    """Draw a configuration at random, over `COMMON` and the kind's own `Aggregator.search_space`. Kinds take turns.

    Args:
        base: config that the choices must fit.
        number, seed: of the draw. It does not depend on other draws.

    Returns:
        `probe_type` and the hyper-parameters by name: fields of `ProbeConfig`, options of the kind, and options of
        `llama-probe train`.
    """
    rng = np.random.default_rng((seed, number))
    kind = probe_types[number % len(probe_types)]
    space = {"probe_type": [kind], **COMMON, **get_probe_type(kind).search_space}
    choices = {name: values for name, values in space.items() if isinstance(values, list)}
    combined = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    rng.shuffle(combined)
    for drawn in combined:
        with suppress(ProbeError):
            base.replace(**split_drawn(drawn)[0])
            break
    else:
        raise ProbeError(f"probe_type={kind!r} has no choices that fit hidden_size={base.hidden_size}: {choices}")
    for name in [name for name in space if name not in choices]:
        if name == "learning_rate":
            drawn[name] = float(np.exp(rng.uniform(*np.log(space[name]))))
        else:
            drawn[name] = float(rng.uniform(*space[name]))
    return {name: drawn[name] for name in space}


def split_drawn(drawn: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a drawn configuration into fields of `ProbeConfig` and fields of `Recipe`."""
    head, recipe, options = {}, {}, {}
    for name, value in drawn.items():
        if name in _RECIPE_FIELDS:
            recipe[_RECIPE_FIELDS[name]] = value
        elif name in get_probe_type(drawn["probe_type"]).options:
            options[name] = value
        else:
            head[name] = value
    return {**head, "options": options}, recipe


def _save_best(learner: Learner, run: TrainingRun, data: TrainingData) -> None:
    """Write the best head as a folder with its card. Only now are the test rows scored."""
    probe, seed = learner.probe, learner.candidate.seed
    if data.lm is not None:
        probe.set_backbone(data.lm)
    logits = predict_logits(probe, data.datasets["validation"])
    data = replace(data, config=probe.config)
    single = {"seed": seed, "epochs": learner.history.best_epoch, **judge(probe, data, logits)}
    run.save(probe, data, [single], seed, logits)


def read_sweep(folder: Path) -> dict[str, Any]:
    """Read the `sweep.json` of a finished sweep."""
    return json.loads((folder / SWEEP_NAME).read_text(encoding="utf-8"))


def _read_finished(folder: Path) -> dict[str, Any] | None:
    """Read the `sweep.json` if all is trained and written: the checkpoint is removed last."""
    written = (folder / SWEEP_NAME).is_file() and is_head_folder(folder / HEAD_FOLDER)
    return read_sweep(folder) if written and not (folder / CHECKPOINT_NAME).exists() else None


def _describe_trial(learner: Learner, drawn: dict[str, Any]) -> dict[str, Any]:
    history, options = learner.history, []
    for name, value in drawn.items():
        text = f"{value:.3g}" if isinstance(value, float) else value
        is_own = name in get_probe_type(drawn["probe_type"]).options
        options.append(f"--option {name}={text}" if is_own else f"--{name.replace('_', '-')} {text}")
    return {
        "number": learner.candidate.number,
        "score": None if history.status == "failed" else history.best,
        "scores": history.scores,
        "best_epoch": history.best_epoch,
        "status": history.status,
        "num_parameters": learner.probe.num_parameters(),
        "params": drawn,
        "options": " ".join(options),
    }
