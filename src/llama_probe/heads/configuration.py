"""`ProbeConfig`: how a head is built, what it was trained on, and how its scores become labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, TypedDict

from transformers.utils import logging

from ..errors import ProbeError
from ..files import JSON, current_file, make_folder, write_atomically
from ..hub.folder import CONFIG_NAME, check_output, flagged_by, read_config_values
from ..hub.resolve import resolve_head, with_subfolder
from ..hub.transport import HubOptions
from .registry import get_probe_type
from .rules import (
    NOT_SCORED,
    REPLY_SCOPES,
    UNKNOWN_FORMAT,
    Normalize,
    Pool,
    ProblemType,
    TokenScope,
    check_fields,
    named_labels,
)
from .turns import TurnMarker


logger = logging.get_logger(__name__)


class NoveltySettings(TypedDict):
    """Settings of a head's `Novelty`; see `ProbeConfig.novelty`."""

    layers: list[int]
    rank: int


class _AnyToken(list[int]):
    def __contains__(self, token: object) -> bool:
        return True


def filled_later() -> Any:
    """Return a field of a dataclass that the constructor, or the caller, sets before it is read."""
    return field(default=None)


@dataclass
class ProbeConfig:
    """Configuration of a probe head.

    Args:
        probe_type: type of the head: `"pooling"`, `"gate"`, `"multimax"`, `"mha"`, `"last"`, or one of your own.
        num_labels: number of outputs. Defaults to the length of `id2label`, else 2.
        id2label: label names by index. JSON turns the indices into strings; both are accepted.
        problem_type: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        pool: `"mean"` or `"max"`, for `pooling` and `mha`.
        num_attention_heads: heads of `mha`; must divide `hidden_size / downcast`.
        downcast: `mha` works in `hidden_size / downcast` dimensions.
        normalize: how a hidden state is normalised before the token stage: `"none"`, `"layernorm"` (without
            parameters) or `"rms"`. Defaults to the head type's choice.
        dropout: dropout on the layer summaries and on the pooled vector in training.
        layer_dropout: probability in training that a layer's summary is replaced by zeros.
        layers: `"all"` or a list of state indices. 0 is the embedding output, `num_hidden_layers` the last state
            after the final norm, as in `output_hidden_states`.
        token_scope: tokens that count.

            - `"prompt"`: the whole prompt. `"content"`: the prompt without `prefix_ids`.
            - `"last_user"`: the user's last turn and all text behind it. `"turns"`: all turns.
            - `"user"`: the text of users, tools and documents, in all turns.
            - `"tool"`: the text of tools and documents. A prompt without such a text gets no flagged label.
            - `"response"`: the reply. `"all"`: `"content"` and the reply. These heads score each token of the reply.

            Turns are found by `turn_markers`. Heads with `"user"` or `"tool"` also judge each turn by itself; see
            `judges_segments`.
        window: number of tokens of a window, an even number; 0 for none. A head with windows judges each window of the tokens that
            count, and the strongest window counts. Each window begins half a window behind the one before it. Needs a head that
            flags one of two labels, or a multi-label head, and that reads all tokens of a prompt.
        causal: if True, what the token stage computes of a token does not depend on later tokens. Defaults to True for scopes
            with the reply, which need it, else to False. Of the head types here only `mha` depends on it.
        prefix_ids: token ids of the constant beginning of every prompt.
        turn_markers: what opens a turn, by role: `"user"` and `"assistant"`, and `"system"`, `"tool"` and `"document"` if the
            chat template has them. An entry is `{"ids": [...], "skip": n}`: token ids, and the number of tokens behind them
            that belong to the marker but may merge with the text. None if the template has no markers: a turn scope then
            reads the whole prompt.
        prompt_format: how the training prompts were rendered: `"chat"` (by the tokenizer's chat template), `"raw"`, or
            `"unknown"` if the user tokenised them.
        system_prompt: system turn of the training prompts; with None the template decides.
        max_length: number of tokens to which training prompts were cut; None for no limit.
        chat_template_hash: sha256 of the chat template in training.
        hidden_size, num_hidden_layers, vocab_size: sizes of the backbone.
        base_model_name_or_path, base_model_revision, base_model_type, base_model_class: Hub id or folder of the
            backbone, its commit on the Hub, its `model_type` and its class.
        base_model_dtype, base_model_quantization: format of the backbone's weights in training; None if not quantised.
        fingerprint: 32 numbers that summarise the backbone's states for a fixed input.
        flagged: names of the labels that the head is there to find, such as `["harmful"]`. `halt_on` halts on them. For a head
            of two labels, thresholds and metrics are about the flagged label. Defaults to the second of two labels if the
            labels have no names, or if a threshold is given. Otherwise defaults to None, and `halt_on` must name a label.
        threshold: for two labels, the probability from which the head gives the flagged label (None: the label with the larger
            probability). For multi-label heads one value, or one value a label (None: 0.5).
        thresholds: further thresholds of a head of two labels, by name, such as `{"fpr-2%": 0.31}`.
        temperature: logits are divided by it before they become probabilities. Positive.
        novelty: `{"layers": [...], "rank": n}` if the head measures how unlike its training data a prompt is: the layers, which
            must be among those that the head reads, and the number of directions of `Novelty`. None without a fitted `Novelty`.
        options: hyper-parameters of a head type that have no field of their own: `num_maxima` and `num_members` of `multimax`.
        weights_sha256: digest of the weights file. `save_pretrained` sets this, `llama_probe_version` and
            `transformers_version`.

    Raises:
        ProbeError: a value is not allowed. The message names the field and what is allowed.
    """

    probe_type: str = "mha"
    num_labels: int = filled_later()
    id2label: dict[int, str] = filled_later()
    problem_type: ProblemType = "single_label_classification"

    pool: Pool = "mean"
    num_attention_heads: int = 2
    downcast: int = 32
    normalize: Normalize = filled_later()
    dropout: float = 0.0
    layer_dropout: float = 0.0
    layers: Literal["all"] | list[int] = "all"

    token_scope: TokenScope = "prompt"
    window: int = 0
    causal: bool = filled_later()
    prefix_ids: list[int] = field(default_factory=list)
    turn_markers: dict[str, TurnMarker] | None = None
    prompt_format: str = UNKNOWN_FORMAT
    system_prompt: str | None = None
    max_length: int | None = None
    chat_template_hash: str | None = None

    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    vocab_size: int | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_type: str | None = None
    base_model_class: str | None = None
    base_model_dtype: str | None = None
    base_model_quantization: str | None = None
    fingerprint: list[float] | None = None

    flagged: list[str] | None = None
    threshold: float | list[float] | None = None
    thresholds: dict[str, float] | None = None
    temperature: float = 1.0
    novelty: NoveltySettings | None = None

    options: JSON = field(default_factory=dict)
    weights_sha256: str | None = None
    llama_probe_version: str | None = None
    transformers_version: str | None = None

    # Outputs for the loss, which a Trainer does not gather.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "by_head",
        "token_logits",
        "token_mask",
        "spans",
        "segment_logits",
        "segment_mask",
        "holds_request",
        "touches_request",
    ]

    def __post_init__(self):
        head_type = get_probe_type(self.probe_type)
        check_fields(self)
        self.num_labels, self.id2label = named_labels(self.num_labels, self.id2label)
        self.normalize = self.normalize or head_type.normalize
        self.causal = self.reads_reply if self.causal is None else self.causal
        if self.reads_reply and not self.causal:
            raise ProbeError(f"causal=False is not allowed with token_scope={self.token_scope!r}: replies grow")
        self._check_flagged()
        self._check_thresholds()
        if self.layers != "all":
            self.layers = sorted(self.layers)
            if self.num_hidden_layers is not None and self.layers[-1] > self.num_hidden_layers:
                raise ProbeError(
                    f"layers={self.layers!r} must be from 0 to num_hidden_layers={self.num_hidden_layers}"
                )
        if self.novelty is not None:
            self.check_supports_novelty()
            sized = self.layers != "all" or self.num_hidden_layers is not None
            if sized and not set(self.novelty["layers"]) <= set(self.layer_indices):
                raise ProbeError(f"novelty={self.novelty!r} must name layers of the head: {self.layer_indices}")
        self._check_window()
        head_type.check(self)

    def _check_window(self) -> None:
        if not self.window:
            return
        reads = get_probe_type(self.probe_type).reads
        if self.reads_reply or reads != "all":
            head = f"probe_type={self.probe_type!r}, token_scope={self.token_scope!r}"
            raise ProbeError(f"window={self.window} needs a head that reads all tokens of a prompt, not {head}")
        if self.flagged_index is None and self.problem_type != "multi_label_classification":
            needed = "a head that flags one of two labels, or a multi-label head"
            raise ProbeError(f"window={self.window} needs {needed}, not flagged={self.flagged}")

    def _check_flagged(self) -> None:
        names = list(self.id2label.values())
        self.flagged = flagged_by(vars(self), names)
        if self.flagged is None:
            return
        if self.problem_type == "regression":
            raise ProbeError(f"flagged={self.flagged} must be None: a regression has no labels")
        is_single = self.problem_type == "single_label_classification"
        most = len(names) - 1 if is_single else len(names)  # rows that are not flagged need a label too
        if not set(self.flagged) <= set(names) or len(self.flagged) > most:
            raise ProbeError(f"flagged={self.flagged} must be at most {most} of the labels: {', '.join(names)}")

    def _check_thresholds(self) -> None:
        is_multi_label = self.problem_type == "multi_label_classification"
        head = f"num_labels={self.num_labels}, problem_type={self.problem_type!r}"
        if isinstance(self.threshold, list):
            fits = is_multi_label and len(self.threshold) == self.num_labels
        else:
            fits = self.threshold is None or is_multi_label or self.has_two_labels
        if not fits:
            needed = "needs two labels (one number) or a multi-label head (one number, or one a label)"
            raise ProbeError(f"threshold={self.threshold!r} {needed}, not {head}")
        if self.thresholds and not self.has_two_labels:
            raise ProbeError(f"thresholds={self.thresholds!r} needs two labels, not {head}")

    @property
    def has_two_labels(self) -> bool:
        """True if the head gives one of two labels."""
        return self.num_labels == 2 and self.problem_type == "single_label_classification"

    @property
    def flagged_index(self) -> int | None:
        """Index of the flagged label, for a head of two labels that flags one; else None."""
        return self.label2id[self.flagged[0]] if self.has_two_labels and self.flagged else None

    def need_flagged_index(self, purpose: str) -> int:
        """Return `flagged_index`. If it is None, raise `ProbeError` with a message that begins with `purpose`."""
        names = list(self.id2label.values())
        if not self.has_two_labels:
            head = f"{self.problem_type} of {', '.join(names)}"
            raise ProbeError(f"{purpose} needs a head that gives one of two labels; this one is {head}")
        if self.flagged_index is None:
            way = f"flagged=[{names[0]!r}], or on the command line train or calibrate --flagged {names[0]}"
            raise ProbeError(f"{purpose} needs the label to flag; name it, {way}; labels: {', '.join(names)}")
        return self.flagged_index

    def check_supports_novelty(self) -> None:
        """Raise `ProbeError` unless `supports_novelty`."""
        if not self.supports_novelty:
            head = f"probe_type={self.probe_type!r}, token_scope={self.token_scope!r}"
            raise ProbeError(f"novelty needs a head that reads all tokens of a prompt, not {head}")

    @property
    def supports_novelty(self) -> bool:
        """True if the head reads all tokens of a prompt, and no reply."""
        return not self.reads_reply and get_probe_type(self.probe_type).reads == "all"

    @property
    def reads_reply(self) -> bool:
        """True if tokens of the reply count. The head then scores them one by one while they are generated."""
        return self.token_scope in REPLY_SCOPES

    @property
    def skips_replies(self) -> bool:
        """True if the LM's own replies in a longer chat do not count."""
        return self.token_scope in ("user", "tool") and self.turn_markers is not None

    @property
    def label2id(self) -> dict[str, int]:
        """Index by label name."""
        return {name: index for index, name in self.id2label.items()}

    @property
    def sizes(self) -> tuple[int, int]:
        """`hidden_size` and `num_hidden_layers`. Raises `ProbeError` if the config does not have both."""
        if self.hidden_size is None or self.num_hidden_layers is None:
            raise ProbeError("hidden_size and num_hidden_layers are not known: give both, or pass backbone=")
        return self.hidden_size, self.num_hidden_layers

    @property
    def layer_indices(self) -> list[int]:
        """State indices that the head reads, ascending: `layers`, or the last of them for a head type that reads no others."""
        layers = self.layers
        if layers == "all":
            if self.num_hidden_layers is None:
                raise ProbeError("num_hidden_layers is None: give it, or attach the head to a backbone")
            layers = list(range(self.num_hidden_layers + 1))
        return layers[-1:] if get_probe_type(self.probe_type).reads == "last" else list(layers)

    def get_text_config(self) -> SimpleNamespace:
        """Return special tokens that equal any tokenizer's. The stock Trainer compares them, and a head has none."""
        return SimpleNamespace(**dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _AnyToken()))

    def replace(self, **changes: Any) -> ProbeConfig:
        """Return a checked copy with some fields changed. Flagged labels stay flagged if `id2label` gives them other names.

        Raises:
            ProbeError: a value is not allowed, or a head of two labels that flags no label gets a threshold without `flagged`.
        """
        has_threshold = any(changes.get(name) is not None for name in ("threshold", "thresholds"))
        if self.has_two_labels and has_threshold and "flagged" not in changes:
            self.need_flagged_index("threshold")
        if self.flagged and changes.get("id2label") and "flagged" not in changes:
            _, names = named_labels(None, changes["id2label"])
            indices = [self.label2id[name] for name in self.flagged]
            changes["flagged"] = [names[index] for index in indices if index in names] or None
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, subfolder: str | None = None, **options: Any
    ) -> ProbeConfig:
        """Load the config of a head without its weights. The arguments are those of `ProbeModel.from_pretrained`."""
        source = with_subfolder(source, subfolder)
        return read_config(resolve_head(source, options=HubOptions(**options), only_config=True))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `probe_config.json`, and no weights, into a folder.

        Raises:
            ProbeError: a field was set to a value that is not allowed, or the folder cannot be written.
        """
        text = self.replace().to_json_string()
        check_output(save_directory)
        make_folder(Path(save_directory))
        write_atomically(Path(save_directory) / CONFIG_NAME, text)

    def to_dict(self) -> JSON:
        """Return the fields as JSON values, for `from_dict`."""
        values = dataclasses.asdict(self)
        values["id2label"] = {str(index): name for index, name in self.id2label.items()}
        values["label2id"] = self.label2id
        return values

    def to_json_string(self) -> str:
        """Return indented JSON that ends in a newline, with a digest of the values. The Trainer's loggers call this too."""
        values = self.to_dict()
        values["config_sha256"] = _digest(json.loads(json.dumps(values)))
        return json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: JSON) -> tuple[ProbeConfig, list[str]]:
        """Build a config from JSON values. Return the config, and the keys that this version does not know.

        Raises:
            ProbeError: `values` is not a dict, or holds a value that is not allowed.
        """
        if not isinstance(values, dict):
            raise ProbeError(f"a probe config must be a JSON object, not {type(values).__name__}")
        names = {item.name for item in dataclasses.fields(cls)}
        config = cls(**{key: value for key, value in values.items() if key in names})
        config = config.replace(flagged=flagged_by(values, list(config.id2label.values())))
        return config, sorted(values.keys() - names - {"label2id", "config_sha256"})


def shared_layers(configs: Iterable[ProbeConfig]) -> list[int]:
    """Return the indices of the states that several heads read, ascending and each once."""
    return sorted({layer for config in configs for layer in config.layer_indices})


def _digest(values: JSON) -> str:
    """Return a digest of the values of a config in JSON. Fields that do not change scores are left out."""
    scored = {key: value for key, value in values.items() if key not in ("config_sha256", *NOT_SCORED)}
    return hashlib.sha256(json.dumps(scored, sort_keys=True).encode()).hexdigest()


def read_config(folder: str | os.PathLike[str]) -> ProbeConfig:
    """Read and check the config of a head folder; unknown keys are ignored with a warning."""
    path = current_file(folder, CONFIG_NAME)
    values = read_config_values(folder)
    try:
        config, unknown = ProbeConfig.from_dict(values)
    except ProbeError as error:
        raise ProbeError(f"{path}: {error}") from None
    if values.get("config_sha256") not in (None, _digest(values)):  # older heads have none
        raise ProbeError(f"{path} was changed after it was saved: fetch it again, or remove config_sha256 if you did")
    if unknown:
        keys = ", ".join(repr(key)[:60] for key in unknown[:8])
        logger.warning(f"{path}: ignored unknown keys (another version?): {keys}")
    return config
