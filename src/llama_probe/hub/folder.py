"""The files of a head folder: their names, and its JSON, read with distrust."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import ProbeError
from ..files import JSON, check_writable, current_file


CONFIG_NAME = "probe_config.json"
WEIGHTS_NAME = "probe_model.safetensors"
RESULTS_NAME = "results.json"
CARD_NAME = "README.md"
PROBES_FOLDER = "probes"  # of the heads that are saved beside a model
RECIPE_NAME = "recipe.yaml"  # of a head that a recipe made
PLOT_NAMES = ("calibration.png", "layer_weights.png")

# All files of a head folder, and of a head on the Hub. A head needs its config and weights; the other files describe it.
HEAD_FILES = (CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME, RECIPE_NAME, CARD_NAME, *PLOT_NAMES)

# Keys of results.json that are written after training, or again after it: by `evaluate --record` and `calibrate`.
LATER_RESULTS = ("evaluations", "thresholds_from", "novelty", "measured")

MAX_BYTES = 4 * 2**20  # of a JSON file or a card, which people read


def head_name(text: str) -> str:
    """Return a text, such as a folder's name, as the name of a head, which must not have dots in torch."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)


def is_head_folder(folder: str | os.PathLike) -> bool:
    """Return True if a folder holds a head."""
    return os.path.isfile(current_file(folder, CONFIG_NAME))


def list_heads(folder: str | os.PathLike) -> dict[str, Path]:
    """Return the head folders inside a folder, by name; none if it is missing."""
    return {item.name: item for item in sorted(Path(folder).glob("[!.]*")) if is_head_folder(item)}


def default_label_names(count: int) -> list[str]:
    """Return the names of labels that nobody has named."""
    return [f"LABEL_{index}" for index in range(count)]


def flagged_by(config: JSON, label_names: Sequence[str]) -> list[str] | None:
    """Return the names of the labels that a head flags: the `flagged` of its config, or else the default. None if it flags none.

    The default is the second of two labels, if nobody has named the labels or the config has a threshold. A config of an earlier
    version has no field `flagged`: its head flags the second of two labels.

    Args:
        config: fields of a `ProbeConfig`.
        label_names: by index.
    """
    if config.get("flagged") or len(label_names) != 2 or config.get("problem_type") == "regression":
        return config.get("flagged")
    is_single = config.get("problem_type") in (None, "single_label_classification")
    has_threshold = config.get("threshold") is not None or config.get("thresholds")
    has_default = is_single and (has_threshold or list(label_names) == default_label_names(2))
    return list(label_names[1:]) if has_default or "flagged" not in config else None


def check_output(folder: str | os.PathLike) -> None:
    """Check that a head can be written into a folder, and that it would replace no file but those of a head."""
    folder = Path(folder)
    check_writable(folder, "the head")
    if is_head_folder(folder):
        return
    for name in HEAD_FILES:
        if (folder / name).exists():
            raise ProbeError(f"{folder} holds a {name} but no head; name another folder, or it would be overwritten")


def read_bytes(path: Path) -> bytes:
    """Read a file of at most `MAX_BYTES`."""
    try:
        # A file of /proc has the size 0, and reading it may never end.
        if path.stat().st_size == 0:
            return b""
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ProbeError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ProbeError(f"{path} is larger than {MAX_BYTES} bytes and is not read")
    return content


def read_json(path: Path) -> JSON:
    """Read a JSON object, in which no object names a key twice, from a file of limited size."""
    content = read_bytes(path)
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ProbeError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ProbeError(f"{path} must be a JSON object, not {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, object]]) -> JSON:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in values if keys.count(key) > 1)!r} occurs twice")
    return values


def read_config_values(folder: str | os.PathLike) -> JSON:
    """Read the config of a head folder as plain JSON values. `ProbeConfig` checks them."""
    code = Path(folder) / "probe_kind.py"  # heads of earlier versions could carry the code of their type
    if os.path.lexists(code):
        way = "move it out of the folder, read it, and register its head type with --import FILE.py or an import"
        raise ProbeError(f"{code} is code, and a head is never code: {way}")
    path = current_file(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        trained = os.path.isfile(os.path.join(folder, "training_args.bin"))
        hint = "; the Trainer wrote weights only, call probe.save_pretrained" if trained else ""
        raise ProbeError(f"{folder} is not a head folder: it has no {CONFIG_NAME}{hint}")
    return read_json(path)


def read_results(folder: str | os.PathLike) -> JSON | None:
    """Read the `results.json` of a head folder; None if the head was never evaluated."""
    path = current_file(folder, RESULTS_NAME)
    return _renamed(read_json(path)) if os.path.isfile(path) else None


def _renamed(results: JSON) -> JSON:
    """Give the keys that earlier versions wrote their present names."""
    if "recipe" in results and "training" not in results:
        results["training"] = results.pop("recipe")
    training = results.get("training")
    if isinstance(training, dict) and "label_smoothing" in training:
        training["label_smoothing_factor"] = training.pop("label_smoothing")
    measured = results.get("measured")
    parts = measured.get("parts") if isinstance(measured, dict) else None
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and "twin" in part:
            part["ablation"] = part.pop("twin")
    return results


def chosen_run(results: JSON) -> JSON:
    """Return the run that trained this head, of the runs with several seeds."""
    try:
        return next(run for run in results["runs"] if run["seed"] == results["chosen_seed"])
    except (LookupError, TypeError, StopIteration) as error:
        raise ProbeError(f"{RESULTS_NAME} has no run for chosen_seed; delete it to load the head without") from error


def training_results(results: JSON | None) -> JSON | None:
    """Return the results that training wrote, without `LATER_RESULTS`; None if there are none."""
    return {key: value for key, value in (results or {}).items() if key not in LATER_RESULTS} or None


def measured_rules(results: JSON | None) -> dict[str, list[JSON]]:
    """Return the halting rules in a head's results, by label; empty if none were measured."""
    results = training_results(results)
    return {} if results is None else chosen_run(results).get("halting", {}).get("labels", {})
