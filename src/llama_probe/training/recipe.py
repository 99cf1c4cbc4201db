"""`Recipe`: how a head is made, as a YAML file says it, and the sections of such a file."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from ..data.augmentation import AUGMENTATIONS, DOCUMENT_WORDS, SHARE
from ..data.known import Benchmark, find_benchmark
from ..data.labelled_texts import Labels
from ..data.row_files import MAX_TEXT
from ..data.row_sources import Source, benchmark_splits
from ..errors import ProbeError, first_line
from ..files import JSON, short_path
from ..heads import get_probe_type
from ..heads.configuration import ProbeConfig
from ..heads.rules import Rule, check_fields
from ..hub.folder import RECIPE_NAME
from .defaults import AUTO
from .search import Search


FEW_ROWS, FOLDS, VALIDATION_SHARE = 400, 5, 0.15
_FOLDER = Path(__file__).resolve().parents[1] / "recipes"
# Fields of a head that follow from its labels and its backbone.
_DERIVED = {"id2label", "num_labels", "problem_type", "flagged", "hidden_size", "num_hidden_layers"}

_HELD_RULES: dict[str, Rule] = {
    "share": ("between 0 and 1", lambda value: 0 < value < 1),
    "folds": ("0 (hold a part back) or at least 2", lambda value: value == 0 or value >= 2),
}
_AUGMENTATION_RULES: dict[str, Rule] = {
    "names": (f"some of {', '.join(AUGMENTATIONS)}", lambda value: set(value) <= set(AUGMENTATIONS)),
    "share": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "document_words": (
        "two numbers from 1, the first one not larger",
        lambda value: len(value) == 2 and 1 <= value[0] <= value[1],
    ),
    "document_weight": ("above 0", lambda value: 0 < value < math.inf),
}
_CALIBRATION_RULES: dict[str, Rule] = {"documents": ("at least 0", lambda value: 0 <= value < math.inf)}
# Names of augmentations in recipes that were written by earlier code.
_EARLIER_NAMES = {"quote": "document", "document": "record"}


@dataclass(kw_only=True)
class Held:
    """Rows that a head does not learn from: to choose by (`validation`), or to measure on (`test`).

    Args:
        share: share of the training rows that is held back. For `validation` with the augmentation `document`, documents are added,
            of texts that no training row has.
        folds: number of parts, each judged by a head that has not learned from it; 0 holds a part back. For `validation` alone.
        sources: sources of rows, instead of training rows that are held back.
        max_rows: rows at most, drawn at random.
    """

    share: float | int | None = None
    folds: int | None = None
    sources: list[Source] = field(default_factory=list)
    max_rows: int | None = None

    def __post_init__(self):
        check_fields(self, _HELD_RULES)
        if len(names := [name for name in ("share", "folds", "sources") if getattr(self, name)]) > 1:
            raise ProbeError(f"{' and '.join(names)} cannot be used together: leave one out")


@dataclass(kw_only=True)
class Augmentations:
    """Training rows once more, wrapped or changed as users and deployers do.

    Args:
        names: some of `lead_in`, `document`, `record`, `layout`, `disguise`, `noise`, `earlier_turns`, `later_turns` and
            `system_prompt`. A name may occur again.
        share: augmentations of each name, as a share of the training rows.
        system_prompts: source of the system prompts for `system_prompt`.
        documents: sources of harmless texts for `document`. Defaults to the training rows without a flagged label.
        document_words: the least and the most words of a document. The lengths are drawn log-uniformly.
        document_weight: weight of the documents in the loss. Other augmentations have the weight 1.
    """

    names: list[str] = field(default_factory=list)
    share: float | int = SHARE
    system_prompts: Source | None = None
    documents: list[Source] = field(default_factory=list)
    document_words: list[int] = field(default_factory=lambda: list(DOCUMENT_WORDS))
    document_weight: float | int = 1

    def __post_init__(self):
        if "quote" in self.names:
            self.names = [_EARLIER_NAMES.get(name, name) for name in self.names]
        check_fields(self, _AUGMENTATION_RULES)
        if "system_prompt" in self.names and self.system_prompts is None:
            raise ProbeError("names=['system_prompt'] draws from system_prompts: give some")
        if self.documents and "document" not in self.names:
            raise ProbeError("documents has sources, and names has no 'document' that draws from them")


@dataclass(kw_only=True)
class Calibration:
    """Rows that should rarely be flagged. Their labels do not count.

    Args:
        sources: sources that the head does not learn from, or another `part` of one.
        rates: shares of the rows that may be flagged. The first gives the head's own threshold; the last are left out if no
            threshold fits them. A head with windows keeps to them among the rows of up to 4 windows, and among the others.
        documents: documents to add for a head with windows, made of the rows as the augmentation `document` makes them without
            a request: their number, or a share of the rows, such as 0.5.
    """

    sources: list[Source] = field(default_factory=list)
    rates: list[float | int] = field(default_factory=lambda: [0.02, 0.01, 0.005])
    documents: float | int = 0

    def __post_init__(self):
        check_fields(self, _CALIBRATION_RULES)


@dataclass(kw_only=True)
class Measure:
    """Further measurements, for the card.

    Args:
        sources: sources to measure on, each by itself, without the rows whose text the head learns from.
        slice_columns: columns to report by, such as `language`, of these sources and of those that ablations leave out.
        wrappings: name of a source: count the labels that stay if its rows are wrapped in twelve ways.
        attacks: name of a source: count the labels that stay if its rows are disguised, or hidden in 1,300 to 7,500 tokens of
            the calibration rows.
        tfidf: also measure TF-IDF with logistic regression on the same rows.
        quantised: also measure the first source on copies of the backbone whose weights are rounded to these types. A copy
            that needs too much memory is left out, with a warning.
    """

    sources: list[Source] = field(default_factory=list)
    slice_columns: list[str] = field(default_factory=list)
    wrappings: str | None = None
    attacks: str | None = None
    tfidf: bool = True
    quantised: list[Literal["int8", "int4"]] = field(default_factory=list)


@dataclass
class CardFacts:
    """Facts for a card beside the measurements.

    Args:
        license: SPDX id for the head: the stricter one of the backbone's and the data's.
        dataset: Hub id of the training data.
        dataset_name: name of the training data in a sentence.
        data_note: origin and licence of the data, as a sentence.
        language: language of the data.
        limits: cases that the head was not tested on, a line each.
        command: command that made the head; a file cannot set it.
    """

    license: str | None = None
    dataset: str | None = None
    dataset_name: str | None = None
    data_note: str | None = None
    language: str | None = None
    limits: list[str] = field(default_factory=list)
    command: str | None = None


@dataclass(kw_only=True)
class Recipe:
    """The making of a head: all that a run needs beside a backbone, an output folder and a device.

    Args:
        name: name of the recipe.
        about: what the head tells, in a sentence.
        labels: labels of the head.
        train: sources to learn from.
        max_rows: training rows at most, drawn at random from all sources that are not `extra`.
        max_text: characters of the longest text.
        licence: `commercial` leaves out the rows whose licence forbids commercial use, or is not known.
        validation: rows to choose by.
        test: rows to measure on, with the fields of `validation`.
        slice_columns: columns of the test rows to report by.
        augmentations: training rows once more, wrapped or changed.
        head: fields of `ProbeConfig`.
        training: fields of `ProbeTrainingArguments`, and all others of `TrainingArguments`.
        seeds: number of heads to train side by side, each from its own seed.
        seed: first seed, also of draws and splits.
        search: configurations to try instead of `seeds`.
        calibration: rows that should rarely be flagged.
        hold_out: ablations by name: the sources of `train` and of `augmentations.documents` that a second head does not learn from.
        measure: further rows to measure on.
        card: facts for the card.
        values: the recipe as it was written, with the settings that were changed; no field of a file.
    """

    name: str | None = None
    about: str | None = None
    labels: Labels = field(default_factory=Labels)
    train: list[Source] = field(default_factory=list)
    max_rows: int | None = None
    max_text: int = MAX_TEXT
    licence: Literal["commercial"] | None = None
    validation: Held = field(default_factory=Held)
    test: Held = field(default_factory=Held)
    slice_columns: list[str] = field(default_factory=list)
    augmentations: Augmentations = field(default_factory=Augmentations)
    head: JSON = field(default_factory=dict)
    training: JSON = field(default_factory=dict)
    seeds: int = 1
    seed: int = 0
    search: Search = field(default_factory=Search)
    calibration: Calibration = field(default_factory=Calibration)
    hold_out: dict[str, list[str]] = field(default_factory=dict)
    measure: Measure = field(default_factory=Measure)
    card: CardFacts = field(default_factory=CardFacts)
    values: JSON = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, source: str | os.PathLike | Mapping[str, object] | Recipe, settings: Sequence[str] = ()) -> Recipe:
        """Read a recipe.

        Args:
            source: name of a recipe of the package, a YAML file, a head folder with a `recipe.yaml`, or the values themselves.
            settings: fields to change, `head.pool=max`; values are YAML.

        Raises:
            ProbeError: there is no such recipe, or a field or a value is not allowed. The message names it.
        """
        if isinstance(source, Recipe):
            source = source.values
        values = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read_yaml(find_recipe(source))
        for setting in settings:
            _set(values, setting)
        if "copies" in values:  # of a recipe that was written by earlier code
            values["augmentations"] = values.pop("copies")
        recipe = _parse(cls, "", values)
        recipe.values = values
        return recipe

    def __post_init__(self):
        if not self.train:
            raise ProbeError("train must have at least one source of training rows")
        names = [source.name for source in self.train]
        measured = [source.name for source in self.measure.sources]
        for part in (names, measured):
            if twice := next((name for name in part if part.count(name) > 1 or "+" in name), None):
                raise ProbeError(f"the name {twice!r} must be of one source, without a plus: --set train.0.name=OTHER")
        for ablation, held in self.hold_out.items():
            if not re.fullmatch(r"[\w-]+", ablation):
                raise ProbeError(f"hold_out: the name {ablation!r} must have letters, digits, - and _ alone")
            known = [*names, *(source.name for source in self.augmentations.documents)]
            if unknown := [name for name in held if name not in known]:
                raise ProbeError(
                    f"hold_out.{ablation} names {unknown[0]!r}, no source of train or of documents: {', '.join(known)}"
                )
        for name in ("wrappings", "attacks"):
            if (source := getattr(self.measure, name)) not in (None, *measured):
                raise ProbeError(f"measure.{name}={source!r} must be in measure.sources: {', '.join(measured)}")
        if self.test.folds is not None:
            raise ProbeError("test.folds is not allowed: folds are for validation; use test.share or test.sources")
        if self.search.trials and self.hold_out:
            raise ProbeError("hold_out cannot be used with search: an ablation is trained as the head that is found")
        if self.seeds < 1 or not 0 <= self.seed <= 2**32 - self.seeds:
            raise ProbeError(f"seeds={self.seeds} and seed={self.seed} must be at least 1 and 0, and below 2**32")
        self._check_head()
        self._fill_from_name()

    def _check_head(self) -> None:
        if unknown := sorted(set(self.head) - ({item.name for item in fields(ProbeConfig)} - _DERIVED)):
            raise ProbeError(f"head has no {unknown[0]!r}; it takes fields of ProbeConfig, and labels are a section")
        if (name := self.head.get("probe_type", AUTO)) != AUTO:
            get_probe_type(name)  # raises
        if self.calibration.documents and not self.head.get("window"):
            documents = self.calibration.documents
            raise ProbeError(f"calibration.documents={documents} needs a head that judges windows: head.window=16")
        scope = self.head.get("token_scope", "last_user")
        turns = sorted({"earlier_turns", "later_turns", "system_prompt"} & set(self.augmentations.names))
        if turns and scope == "tool":
            raise ProbeError(
                f"token_scope='tool' reads no turns of a chat, so augmentations.names={turns} is not allowed"
            )
        if "later_turns" in self.augmentations.names and scope in ("last_user", "response"):
            raise ProbeError(f"token_scope={scope!r} does not read the turns that later_turns adds: use 'user'")

    def _fill_from_name(self) -> None:
        """Take facts for the card from a single source that is known by name."""
        if self._known is not None:
            benchmark, _ = self._known
            facts = {"license": benchmark.license, "dataset": benchmark.hub_id, "dataset_name": benchmark.title}
            facts |= {"data_note": benchmark.note, "language": "en"}
            self.card = CardFacts(**facts | {name: value for name, value in vars(self.card).items() if value})

    @property
    def _known(self) -> tuple[Benchmark, str | None] | None:
        """The data set and its split, if `train` is a single source that is known by name."""
        return find_benchmark(self.train[0].rows) if len(self.train) == 1 else None

    def named_parts(self, data_dir: str | os.PathLike | None) -> tuple[Held, Held]:
        """Return `validation` and `test`, with the further splits of a single `train` that is known by name."""
        if self._known is None:
            return self.validation, self.test
        benchmark, split = self._known
        splits = set(benchmark_splits(benchmark, data_dir)) - {split or "train"}
        parts = {"validation": self.validation, "test": self.test}
        for name, held in parts.items():
            if name in splits and not (held.share or held.folds or held.sources):
                parts[name] = replace(held, sources=[Source(rows=f"{benchmark.name}:{name}")])
        return parts["validation"], parts["test"]

    def write(self) -> str:
        """Return the recipe as YAML, without folders of this machine."""
        written = _without_folders(self.values)
        return yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def recipe_names() -> list[str]:
    """Return the names of the recipes of the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_recipe(source: str | os.PathLike) -> Path:
    """Return the file of a recipe: a name of the package, a YAML file, or a head folder."""
    path = Path(source)
    if path.is_dir() and (path / RECIPE_NAME).is_file():
        return path / RECIPE_NAME
    if path.suffix in (".yaml", ".yml"):
        return path
    if str(source) not in recipe_names():
        raise ProbeError(f"there is no recipe {source}: give a .yaml file, or one of {', '.join(recipe_names())}")
    return _FOLDER / f"{source}.yaml"


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as in YAML 1.2, and no key occurs twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {twice!r} occurs twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _read_yaml(path: Path) -> JSON:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ProbeError(f"{path} cannot be read as YAML: {first_line(error)}") from None


def _set(values: Any, setting: str) -> None:
    """Change a field of a recipe: `head.pool=max`, `train.0.max_rows=100`."""
    path, equals, text = setting.partition("=")
    *parents, last = path.split(".")
    try:
        if not equals:
            raise ValueError("there is no value")
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        for name in parents:
            if isinstance(values, dict) and values.get(name) is None:
                values[name] = {}
            if isinstance(values, list):
                name = int(name)
                if isinstance(values[name], str):  # a source that has its `rows` alone
                    values[name] = {"rows": values[name]}
            values = values[name]
        values[int(last) if isinstance(values, list) else last] = value
    except (LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = f"must be FIELD=VALUE, such as head.pool=max: {first_line(error)}"
        raise ProbeError(f"--set {setting!r} {reason}") from None


def _parse(owner: type, at: str, values: object) -> Any:
    """Return a dataclass of the values of a section. Errors begin with the path of the field."""
    if owner is Source and isinstance(values, str):
        values = {"rows": values}
    if not isinstance(values, Mapping):
        raise ProbeError(f"{at or 'the recipe'} must have fields, not the value {values!r}")
    allowed = [item.name for item in fields(owner) if item.name != "values"]
    if unknown := [name for name in values if name not in allowed]:
        raise ProbeError(f"{at or 'the recipe'} has no field {unknown[0]!r}; it has: {', '.join(allowed)}")
    inside = f"{at}." if at else ""
    parsed = {}
    hints = get_type_hints(owner)
    for name, value in values.items():
        if value is None:
            continue  # the default
        hint = hints[name]
        section = next(filter(is_dataclass, (hint, *get_args(hint))), None)  # a section may be optional, or in a list
        if section is not None and get_origin(hint) is list:
            items = value if isinstance(value, list) else [value]
            value = [_parse(section, f"{inside}{name}[{i}]", item) for i, item in enumerate(items)]
        elif section is not None:
            value = _parse(section, inside + name, value)
        else:
            try:
                type_validator(name, value, hint)
            except TypeError:
                kind = re.sub(r"typing\.|<class '|'>|NoneType", "", str(hint)).strip(" |")
                raise ProbeError(f"{inside}{name}={value!r} must be {kind}") from None
        parsed[name] = value
    try:
        return owner(**parsed)
    except (TypeError, ValueError) as error:
        raise ProbeError(f"{at}: {first_line(error)}" if at else error) from None


def _without_folders(value: object, name: str = "") -> object:
    """Return values in which absolute paths of this machine have their last two parts alone."""
    if isinstance(value, dict):
        return {key: _without_folders(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part, name) for part in value]
    is_place = name in ("rows", "train", "sources", "cache_dir") and isinstance(value, str) and os.path.isabs(value)
    return short_path(value) if is_place else value
