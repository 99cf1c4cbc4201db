"""`llama-probe sweep`: a search over head kinds and their hyper-parameters, on shared passes of the backbone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..distributed import check_shared, claimed, is_main, on_main, process_group, world_size
from ..errors import ProbeError
from ..evaluation.plots import write_sensitivity_plot
from ..evaluation.report import predict_logits
from ..files import write_atomically
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..hub.folder import is_head_folder
from .learners import Candidate, Learner
from .rows import Prepared
from .run import TrainingRun
from .shared import CHECKPOINT_NAME, SharedTraining, check_keep


STUDY_NAME, SWEEP_NAME, HEAD_FOLDER = "study.log", "sweep.json", "head"

# Kinds that learn few numbers from normalised states want larger steps than those that learn projections.
_LEARNING_RATES = {"pooling": (1e-4, 3e-2), "gate": (1e-4, 3e-2)}


@dataclass
class SearchSpace:
    """What is searched: the ranges of arXiv 2601.13288, and regularisation.

    Attributes:
        probe_types: kinds.
        learning_rate: range, on a log scale; `pooling` and `gate` have one of their own.
        batch_sizes, weight_decay, pools, downcasts, num_attention_heads: as in the paper. Numbers of attention heads that
            do not divide `hidden_size / downcast` are left out, and 1 to 3 added for those that no larger one divides.
        dropout, layer_dropout, label_smoothing: ranges.
    """

    probe_types: Sequence[str] = ("pooling", "gate", "mha")
    learning_rate: tuple[float, float] = (1e-5, 3e-3)
    batch_sizes: Sequence[int] = (8, 16, 32, 64)
    weight_decay: tuple[float, float] = (0.0, 0.05)
    pools: Sequence[str] = ("mean", "max")
    downcasts: Sequence[int] = (4, 8, 16, 32, 64)
    num_attention_heads: Sequence[int] = (1, 2, 3, 4, 8, 16)
    dropout: tuple[float, float] = (0.0, 0.4)
    layer_dropout: tuple[float, float] = (0.0, 0.3)
    label_smoothing: tuple[float, float] = (0.0, 0.1)

    def __post_init__(self):
        if not self.probe_types:
            raise ProbeError("there is no kind of head to search: name some with probe_types")
        for kind in self.probe_types:
            if get_probe_type(kind).convex:
                raise ProbeError(
                    f"probe_type={kind!r} has nothing to search: it is fitted, and llama-probe train chooses the strength of "
                    "its penalty by validation rows"
                )

    def suggest(self, trial: optuna.Trial, hidden_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A configuration: fields of `ProbeConfig`, and of `Recipe`."""
        kind = trial.suggest_categorical("probe_type", list(self.probe_types))
        head: dict[str, Any] = {"probe_type": kind}
        low, high = _LEARNING_RATES.get(kind, self.learning_rate)
        # A name for each range: optuna wants one range a name.
        name = f"{kind}_learning_rate" if kind in _LEARNING_RATES else "learning_rate"
        recipe: dict[str, Any] = {
            "learning_rate": trial.suggest_float(name, low, high, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("batch_size", list(self.batch_sizes)),
            "weight_decay": trial.suggest_float("weight_decay", *self.weight_decay),
            "label_smoothing": trial.suggest_float("label_smoothing", *self.label_smoothing),
        }
        head["dropout"] = trial.suggest_float("dropout", *self.dropout)
        head["layer_dropout"] = trial.suggest_float("layer_dropout", *self.layer_dropout)
        if kind in ("pooling", "mha"):
            head["pool"] = trial.suggest_categorical("pool", list(self.pools))
        if kind == "mha":
            fitting = [downcast for downcast in self.downcasts if hidden_size % downcast == 0]
            if not fitting:
                raise ProbeError(f"none of downcasts={list(self.downcasts)} divides hidden_size={hidden_size}")
            head["downcast"] = trial.suggest_categorical("downcast", fitting)
            inner = hidden_size // head["downcast"]
            numbers = [number for number in self.num_attention_heads if inner % number == 0] or [1]
            head["num_attention_heads"] = trial.suggest_categorical(f"num_attention_heads_of_{inner}", numbers)
        if kind == "attentive":
            queries = trial.suggest_categorical("num_queries", [1, 2, 4, 8])
            head["options"] = {
                "num_queries": queries,
                "value_rank": queries * trial.suggest_categorical("ranks_a_query", [1, 2, 4]),
            }
        if kind == "multimax":
            head["options"] = {
                "num_maxima": trial.suggest_categorical("num_maxima", [1, 2, 4, 8]),
                "num_members": trial.suggest_categorical("num_members", [1, 4, 8, 16]),
            }
        return head, recipe


@dataclass
class Sweep:
    """Draws configurations, trains them side by side, and keeps the best by validation.

    Processes that `torchrun` has started divide rows and configurations, see `SharedTraining`; what is found is what one
    process finds.

    Attributes:
        run: backbone, data, prompts and output; its `recipe` says how many epochs, which metric and what patience, and its
            `head` what all candidates share.
        space: what is searched.
        trials: number of configurations.
        keep: share that goes on after the epochs 1, 2, 4, ...; see `SharedTraining`.
        resume: go on with a sweep that was stopped.
    """

    run: TrainingRun
    space: SearchSpace = field(default_factory=SearchSpace)
    trials: int = 100
    keep: float = 0.5
    resume: bool = False

    def execute(self) -> dict[str, Any]:
        """Runs it.

        Returns:
            What is also written to `sweep.json`: the ranked configurations with their parameters and scores, those that
            failed last and without a score. Beside it
            lie the optuna study (`study.log`), `sensitivity.png`, and the best head in the folder `head`.

        Raises:
            ProbeError: anything the user can mend, before the training starts.
        """
        with process_group(), claimed(Path(self.run.output)):
            return self._execute()

    def _execute(self) -> dict[str, Any]:
        if self.trials < 1:
            raise ProbeError(f"trials={self.trials} must be at least 1")
        check_keep(self.keep)  # before anything is written that a sweep with another one would be refused for
        epochs = self.run.recipe.num_train_epochs
        if epochs is not None and epochs < 1:
            raise ProbeError(f"num_train_epochs={epochs} must be at least 1: a sweep trains whole epochs")
        output = Path(self.run.output)
        if not self.resume and on_main(lambda: any((output / name).exists() for name in (STUDY_NAME, SWEEP_NAME))):
            raise ProbeError(f"{output} holds a sweep already: go on with --resume, or give another folder")
        check_shared(output)
        self.run.output = output / HEAD_FOLDER
        # What a kind needs of the config is decided by each draw; pooling needs nothing.
        self.run.head = {**self.run.head, "probe_type": "pooling"}
        prepared = self.run.prepare()
        try:
            result = self._search(output, prepared)
        except Exception:
            prepared.close()  # a run that is stopped, and may go on, keeps its states
            raise
        prepared.close()
        return result

    def _search(self, output: Path, prepared: Prepared) -> dict[str, Any]:
        params = on_main(lambda: self._draw(output, prepared))
        if on_main(lambda: self._is_finished(output)):
            return on_main(lambda: read_sweep(output))
        epochs = int(self.run.recipe.num_train_epochs)
        candidates = [self._candidate(number, drawn, prepared) for number, drawn in params.items()]
        training = SharedTraining(
            candidates,
            prepared.trained,
            prepared.datasets["validation"],
            prepared.metric,
            epochs,
            output,
            prepared.lm,
            self.keep,
            self.run.recipe.patience or epochs,
            self.run.seeds[0],
        )
        ranked = training.run(self.resume)
        result = self._result(ranked, prepared, params)
        self._save_best(ranked[0], prepared)
        if is_main():
            self._tell(output, ranked)
            text = json.dumps(result, indent=2) + "\n"
            write_atomically({output / SWEEP_NAME: lambda path: path.write_text(text, encoding="utf-8")})
            write_sensitivity_plot(output / SWEEP_NAME)
            (output / CHECKPOINT_NAME).unlink(missing_ok=True)
        return result

    def _study(self, output: Path) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        output.mkdir(parents=True, exist_ok=True)
        path = output / STUDY_NAME
        try:
            for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
                if not line.endswith(b"\n"):  # optuna would write on in the same line
                    raise ValueError("its last line is not complete")
                json.loads(line)
            return optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name="sweep",
                sampler=optuna.samplers.RandomSampler(seed=self.run.seeds[0]),
                direction="maximize",
                load_if_exists=True,
            )
        except (ValueError, LookupError, TypeError) as error:
            raise ProbeError(
                f"{path} is damaged: {error}. Remove it: the same options draw the same configurations again"
            ) from None

    def _draw(self, output: Path, prepared: Prepared) -> dict[int, dict[str, Any]]:
        """Parameters by the number of the trial, from the study where a sweep goes on. All are drawn before any is trained."""
        study = self._study(output)
        known = study.get_trials(deepcopy=False)
        setup = json.loads(json.dumps(self._setup(prepared)))
        if "setup" in study.user_attrs:  # set when all had been drawn
            # Earlier versions did not note the weights.
            found = {"backbone_weights": prepared.backbone_weights} | json.loads(study.user_attrs["setup"])
            if different := [name for name in setup if setup[name] != found.get(name)]:
                raise ProbeError(
                    f"{output} holds another sweep: its {', '.join(different)} are not these. Give what was given then, or "
                    "another folder"
                )
            return {trial.number: trial.params for trial in known}
        if known:  # stopped while it drew: nothing is lost by drawing anew
            (output / STUDY_NAME).unlink()
            study = self._study(output)
        # Kinds in turn: of a few draws at random one kind may get none.
        for number in range(self.trials):
            study.enqueue_trial({"probe_type": self.space.probe_types[number % len(self.space.probe_types)]})
        trials = [study.ask() for _ in range(self.trials)]
        for trial in trials:
            self.space.suggest(trial, prepared.config.hidden_size)
        study.set_user_attr("setup", json.dumps(setup))
        return {trial.number: trial.params for trial in trials}

    def _is_finished(self, output: Path) -> bool:
        """Whether all that was drawn is trained, and what comes of it is written: the checkpoint goes last."""
        told = all(trial.state.is_finished() for trial in self._study(output).get_trials(deepcopy=False))
        written = (output / SWEEP_NAME).is_file() and is_head_folder(output / HEAD_FOLDER)
        return told and written and not (output / CHECKPOINT_NAME).exists()

    def _setup(self, prepared: Prepared) -> dict[str, Any]:
        """What must be the same when a sweep goes on."""
        run = self.run
        data = {key: value for key, value in vars(run.data).items() if key != "data_dir"}
        return {
            "space": dataclasses.asdict(self.space),
            "trials": self.trials,
            "keep": self.keep,
            "recipe": dataclasses.asdict(run.recipe),
            "data": {key: value for key, value in data.items() if key != "test"},
            "rows": {name: rows.digest() for name, rows in prepared.parts.items() if name != "test"},
            "backbone": run.backbone,
            "dtype": run.dtype,
            "backbone_weights": prepared.backbone_weights,
            "prompts": [run.prompt_format, run.system_prompt, run.max_length],
            "head": run.head,
            "seed": run.seeds[0],
        }

    def _candidate(self, number: int, params: dict[str, Any], prepared: Prepared) -> Candidate:
        head, recipe = self.space.suggest(optuna.trial.FixedTrial(params), prepared.config.hidden_size)
        config = prepared.config.replace(**head)
        full = dataclasses.replace(self.run.recipe, **recipe)
        loss = dataclasses.replace(self.run, recipe=full).loss(config, prepared.parts)
        return Candidate(
            number,
            config,
            loss,
            full.learning_rate,
            full.weight_decay,
            full.per_device_train_batch_size,
            seed=self.run.seeds[0],
        )

    def _tell(self, output: Path, ranked: Sequence[Learner]) -> None:
        study = self._study(output)
        open_trials = {trial.number for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished()}
        for learner in ranked:
            if learner.candidate.number in open_trials:
                score = _score(learner)
                state = TrialState.FAIL if score is None else TrialState.COMPLETE
                study.tell(learner.candidate.number, score, state)

    def _result(self, ranked: Sequence[Learner], prepared: Prepared, params: dict[int, dict]) -> dict[str, Any]:
        return {
            "metric": prepared.metric,
            "processes": world_size(),
            "rows": {name: len(part) for name, part in prepared.parts.items() if name != "test"},
            "trials": [
                {
                    "number": learner.candidate.number,
                    "score": _score(learner),
                    "scores": learner.history.scores,
                    "best_epoch": learner.history.best_epoch,
                    "status": learner.history.status,
                    "num_parameters": learner.probe.num_parameters(),
                    "params": params[learner.candidate.number],
                    "options": _train_options(learner.candidate),
                }
                for learner in ranked
            ],
        }

    def _save_best(self, learner: Learner, prepared: Prepared) -> None:
        """The best head as a folder, with its card. Its test rows are scored here for the first time."""
        candidate, run = learner.candidate, self.run
        run.recipe = dataclasses.replace(
            run.recipe,
            learning_rate=candidate.learning_rate,
            weight_decay=candidate.weight_decay,
            per_device_train_batch_size=candidate.batch_size,
            label_smoothing=candidate.loss.label_smoothing,
        )
        if prepared.lm is not None:
            learner.probe.set_backbone(prepared.lm)
        result = run.judge(learner.probe, prepared, predict_logits(learner.probe, prepared.datasets["validation"]))
        single = {"seed": candidate.seed, "epochs": learner.history.best_epoch, **result}
        prepared.config = learner.probe.config
        run.save(learner.probe, prepared, [single], candidate.seed)


def read_sweep(folder: Path) -> dict[str, Any]:
    """What a finished sweep has found.

    Raises:
        ProbeError: its file is not what a sweep writes.
    """
    path = folder / SWEEP_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kinds = [trial["params"]["probe_type"] for trial in found["trials"] if {"score", "status"} <= trial.keys()]
        if not found["metric"] or not kinds:
            raise ValueError("it holds no configurations")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ProbeError(
            f"{path} is not what a sweep writes ({type(error).__name__}: {error}): do the sweep anew"
        ) from None
    return found


def _score(learner: Learner) -> float | None:
    """What a configuration is ranked by; `None` where its training ran away."""
    return None if learner.history.status == "failed" else learner.history.best


def _train_options(candidate: Candidate) -> str:
    """The options of `llama-probe train` that train this configuration by itself."""
    config: ProbeConfig = candidate.config
    values: dict[str, Any] = {
        "probe-type": config.probe_type,
        "learning-rate": f"{candidate.learning_rate:.3g}",
        "batch-size": candidate.batch_size,
        "weight-decay": f"{candidate.weight_decay:.3g}",
        "label-smoothing": f"{candidate.loss.label_smoothing:.3g}",
        "dropout": f"{config.dropout:.3g}",
        "layer-dropout": f"{config.layer_dropout:.3g}",
    }
    if config.probe_type in ("pooling", "mha"):
        values["pool"] = config.pool
    if config.probe_type == "mha":
        values |= {"downcast": config.downcast, "num-attention-heads": config.num_attention_heads}
    words = [f"--{name} {value}" for name, value in values.items()]
    return " ".join([*words, *(f"--option {name}={value}" for name, value in config.options.items())])
