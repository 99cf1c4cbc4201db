"""From a recipe to a head folder: the work of `llama-probe train`."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import ProgressCallback
from transformers.utils import logging

from ..distributed import claimed, on_main
from ..files import JSON
from ..hub.folder import check_output
from ..progress_bar import ProgressBar
from .choosing import TrainedHeads, choose, save
from .measuring import measure
from .plan import Plan, States, compute_states, make_plan
from .recipe import Recipe
from .recipe_rows import read_rows
from .run_folder import RunFolder
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
    check_output(output)
    on_main(lambda: RunFolder(output).check_free(resume, overwrite))
    with claimed(output):
        rows = read_rows(recipe, data_dir)
        plan = make_plan(recipe, rows, output, backbone, dtype=dtype)
        states = compute_states(plan)
        on_main(
            lambda: plan.folder.open(plan.settings(), resume)
        )  # an error here leaves the states of the stopped run
        try:
            heads = train(plan, states, resume)
            chosen = choose(plan, states, heads)
            save(plan, chosen)
            measured = measure(plan, states, heads, chosen)
            save(plan, measured)
        except Exception:
            logger.warning(
                f"{output} keeps what was done, and hidden states, which can reveal the texts: --resume goes on"
            )
            raise
        plan.folder.clean(keep_states=plan.args.cache_dir is not None)
        return measured.results


def train(plan: Plan, states: States, resume: bool) -> TrainedHeads:
    """Train the heads of a plan side by side, or read the heads of a stopped run whose training has ended."""
    trainer = RecipeTrainer(plan, states)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_ProgressBar)
    return trainer.train_heads(resume)


class _ProgressBar(ProgressCallback):
    """Shows `ProgressBar`s, and the metrics of the last epoch behind the bar, where the parent prints a dict for each."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar, and say how many steps a stopped run has done."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            if state.global_step:
                logger.warning(f"training: {state.global_step:,} of {state.max_steps:,} steps are done")
            self.training_bar = ProgressBar(state.max_steps, "training", "steps", initial=state.global_step)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Open the bar of an evaluation, and move it."""
        if state.is_world_process_zero and self.prediction_bar is None:
            self.prediction_bar = ProgressBar(len(eval_dataloader), "evaluating", "batches")
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the loss and the metric of the validation rows."""
        if self.training_bar is not None:
            numbers = {name.removeprefix("eval_"): value for name, value in (logs or {}).items()}
            shown = {key: numbers[key] for key in ("loss", args.metric) if key in numbers}
            self.training_bar.set_postfix(shown, refresh=False)
