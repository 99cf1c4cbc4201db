"""`ProbeConfig`: everything that a saved head needs to be rebuilt, fed and read as it was trained."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from ..errors import ProbeError
from ..heads import get_probe_type


POOLS = ("mean", "max")
NORMALIZATIONS = ("none", "layernorm", "rms")
REPLY_SCOPES = ("response", "all")
TOKEN_SCOPES = ("prompt", "content", *REPLY_SCOPES)
PROMPT_FORMATS = ("chat", "raw")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

# A guard against hostile files, far above any model: sizes past it are refused before anything is built from them.
MAX_SIZE = 2**20

# As JSON may spell them, and as bytes that are not UTF-8 come from a command line. Tokenizers and UTF-8 take no text with one.
HALF_PAIR = re.compile("[\\ud800-\\udfff]")

# Of Unicode's categories and classes of direction, those that texts of a config have no sign of.
_LINES = ("Cc", "Zl", "Zp")
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_NO_CONTROLS = "must have no line breaks and control characters, those that turn the order of a text (U+202E) included"


@dataclass
class ProbeConfig:
    """Configuration of a probe head.

    Args:
        probe_type: kind of the head: `"pooling"`, `"gate"`, `"mha"`, or any registered kind.
        num_labels: number of outputs. Taken from `id2label` where that is given; 2 otherwise.
        id2label: label names by index. JSON turns the indices into strings; both are accepted.
        problem_type: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        pool: `"mean"` or `"max"`, for `pooling` and `mha`.
        num_attention_heads: heads of `mha`; must divide `hidden_size / downcast`.
        downcast: `mha` works in `hidden_size / downcast` dimensions.
        normalize: what is done to each state before the token stage: `"none"`, `"layernorm"` (without parameters) or
            `"rms"`. States grow by two orders of magnitude from the first to the last layers of many models. Left out:
            what suits the kind, `"layernorm"` for most.
        dropout: dropout on the layer summaries and on the pooled vector while training, 0 <= p < 1.
        layer_dropout: chance, while training, that a layer's summary is replaced by zeros, 0 <= p < 1.
        layers: `"all"` or a list of state indices. 0 is the embedding output, `num_hidden_layers` the last state,
            after the final norm, as in `output_hidden_states`.
        token_scope: which tokens count. `"prompt"`: every token of the prompt. `"content"`: all but `prefix_ids`, the
            constant beginning that the chat template puts before every prompt. `"response"`: the tokens of the reply.
            `"all"`: those of `"content"` and of the reply. Heads that read replies score them token by token.
        causal: whether what the token stage makes of a token may depend on that token and earlier ones alone, which
            scores that follow a reply need. Left out: `True` for the scopes that read replies, else `False`. It makes a
            difference to `mha`; the other kinds never look ahead.
        prefix_ids: token ids of that constant beginning.
        prompt_format: `"chat"` (the tokenizer's chat template) or `"raw"`: how the training prompts were rendered.
        system_prompt: system turn of the training prompts; `None` leaves it to the template.
        max_length: tokens to which training prompts were cut; `None` for no limit.
        chat_template_hash: sha256 of the chat template at training.
        hidden_size, num_hidden_layers: size and layer count of the backbone.
        vocab_size: vocabulary size of the backbone.
        base_model_name_or_path, base_model_revision, base_model_type, base_model_class: the backbone; its commit on the
            Hub where it came from there, its `model_type`, and its class.
        base_model_dtype, base_model_quantization: in which its weights were at training; `None` for not quantised.
        fingerprint: what the backbone answered to a fixed input; see `llama_probe.backbone.fingerprint`.
        threshold: for two labels, the probability of label 1 from which label 1 is given (`None`: the larger one); for
            multi-label heads, one value or one a label (`None`: 0.5).
        temperature: logits are divided by it before they become probabilities. Positive.
        options: hyper-parameters of registered kinds that have no field of their own.
        weights_sha256: of the weights file that belongs to the config. llama_probe_version, transformers_version. All
            three are stamped on saving.

    Raises:
        ProbeError: a value is not allowed. The message names the field and what is.
    """

    probe_type: str = "mha"
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    problem_type: str = "single_label_classification"

    pool: str = "mean"
    num_attention_heads: int = 2
    downcast: int = 32
    normalize: str | None = None
    dropout: float = 0.0
    layer_dropout: float = 0.0
    layers: str | list[int] = "all"

    token_scope: str = "prompt"
    causal: bool | None = None
    prefix_ids: list[int] = field(default_factory=list)
    prompt_format: str = "chat"
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

    threshold: float | list[float] | None = None
    temperature: float = 1.0

    options: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    llama_probe_version: str | None = None
    transformers_version: str | None = None

    def __post_init__(self):
        self._check_labels()
        kind = get_probe_type(self.probe_type)
        if self.normalize is None:
            self.normalize = kind.normalize
        for name, allowed in (
            ("problem_type", PROBLEM_TYPES),
            ("pool", POOLS),
            ("normalize", NORMALIZATIONS),
            ("token_scope", TOKEN_SCOPES),
            ("prompt_format", PROMPT_FORMATS),
        ):
            if getattr(self, name) not in allowed:
                raise ProbeError(f"{name}={getattr(self, name)!r} is not allowed; allowed: {', '.join(allowed)}")
        if self.causal is None:
            self.causal = self.reads_reply
        if not isinstance(self.causal, bool) or (self.reads_reply and not self.causal):
            raise ProbeError(
                f"causal={self.causal!r} is not allowed with token_scope={self.token_scope!r}: it must be True or False, and "
                f"True for {', '.join(REPLY_SCOPES)}, because a head that was trained to look ahead cannot follow a reply "
                "as it is written; leave causal out for a new head"
            )
        for name in ("num_attention_heads", "downcast"):
            _check_int(name, getattr(self, name))
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "max_length"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name))
        for name in ("dropout", "layer_dropout"):
            _check_number(name, getattr(self, name), "at least 0 and below 1", lambda v: 0 <= v < 1)
        _check_number("temperature", self.temperature, "above 0", lambda v: v > 0)
        self._check_threshold()
        self._check_layers()
        for name in (
            "system_prompt",
            "chat_template_hash",
            "base_model_name_or_path",
            "base_model_revision",
            "base_model_type",
            "base_model_class",
            "base_model_dtype",
            "base_model_quantization",
            "weights_sha256",
            "llama_probe_version",
            "transformers_version",
        ):
            value = getattr(self, name)
            if value is not None and not _is_text(value):
                raise ProbeError(f"{name}={value!r} must be text or None")
            if value is not None and name != "system_prompt" and _has_controls(value):
                raise ProbeError(f"{name}={value!r} {_NO_CONTROLS}")
        if self.fingerprint is not None:
            if not isinstance(self.fingerprint, list) or not self.fingerprint:
                raise ProbeError(f"fingerprint={self.fingerprint!r} must be a list of numbers or None")
            for value in self.fingerprint:
                _check_number("fingerprint", value, "in each place", lambda v: True)
        if not _is_int_list(self.prefix_ids):
            raise ProbeError(f"prefix_ids={self.prefix_ids!r} must be a list of token ids, each at least 0")
        if not isinstance(self.options, dict):
            raise ProbeError(f"options={self.options!r} must be a dict")
        kind.check(self)

    def _check_labels(self) -> None:
        if self.num_labels is not None:
            _check_int("num_labels", self.num_labels)
        if self.id2label is None:
            self.num_labels = self.num_labels or 2
            self.id2label = {index: f"LABEL_{index}" for index in range(self.num_labels)}
            return
        if not isinstance(self.id2label, dict) or not self.id2label:
            raise ProbeError(f"id2label={self.id2label!r} must be a dict of label names by index")
        try:
            self.id2label = {int(index): name for index, name in self.id2label.items()}
        except (TypeError, ValueError):
            raise ProbeError(f"id2label has the indices {list(self.id2label)!r}; they must be 0, 1, 2, ...") from None
        names = list(self.id2label.values())
        if sorted(self.id2label) != list(range(len(names))):
            raise ProbeError(f"id2label has the indices {sorted(self.id2label)}; they must be 0 to {len(names) - 1}")
        if not all(map(_is_text, names)) or len(set(names)) != len(names):
            raise ProbeError(f"id2label has the names {names!r}; they must be texts, each once")
        if wrong := [name for name in names if _has_controls(name)]:
            raise ProbeError(f"id2label has the name {wrong[0]!r}; a name {_NO_CONTROLS}")
        if self.num_labels is not None and self.num_labels != len(names):
            raise ProbeError(
                f"num_labels={self.num_labels} but id2label names {len(names)} labels; leave num_labels out"
            )
        self.num_labels = len(names)
        self.id2label = dict(sorted(self.id2label.items()))

    def _check_threshold(self) -> None:
        if self.threshold is None:
            return
        values = self.threshold if isinstance(self.threshold, list) else [self.threshold]
        for value in values:
            _check_number("threshold", value, "from 0 to 1", lambda v: 0 <= v <= 1)
        if self.problem_type == "multi_label_classification":
            if isinstance(self.threshold, list) and len(values) != self.num_labels:
                raise ProbeError(
                    f"threshold has {len(values)} values for {self.num_labels} labels; give one, or one each"
                )
        elif self.problem_type == "regression" or self.num_labels != 2 or isinstance(self.threshold, list):
            raise ProbeError(
                f"threshold={self.threshold!r} needs a head with two labels (one number) or a multi-label head; "
                f"this one has num_labels={self.num_labels}, problem_type={self.problem_type!r}: leave it None"
            )

    def _check_layers(self) -> None:
        if self.layers == "all":
            return
        if not _is_int_list(self.layers) or not self.layers or len(set(self.layers)) != len(self.layers):
            raise ProbeError(f"layers={self.layers!r} must be 'all' or a list of different state indices from 0")
        self.layers = sorted(self.layers)
        if self.num_hidden_layers is not None and self.layers[-1] > self.num_hidden_layers:
            raise ProbeError(
                f"layers={self.layers!r} goes past the last state; with num_hidden_layers={self.num_hidden_layers} "
                f"the states are 0 to {self.num_hidden_layers}"
            )

    @property
    def reads_reply(self) -> bool:
        """Whether tokens of the reply count, and are scored one by one while they are generated."""
        return self.token_scope in REPLY_SCOPES

    @property
    def label2id(self) -> dict[str, int]:
        """Index by label name."""
        return {name: index for index, name in self.id2label.items()}

    @property
    def layer_indices(self) -> list[int]:
        """State indices that the head reads, ascending: those of `layers` that matter to the kind."""
        if self.layers == "all" and self.num_hidden_layers is None:
            raise ProbeError("num_hidden_layers is None: give it, or attach the head to a backbone that fills it in")
        named = list(range(self.num_hidden_layers + 1)) if self.layers == "all" else list(self.layers)
        return named[-1:] if get_probe_type(self.probe_type).reads == "last" else named

    def replace(self, **changes) -> ProbeConfig:
        """A copy with some fields changed, checked as a new one is."""
        return dataclasses.replace(self, **changes)

    # Files; imported where they are used, because they are about heads and import this module.

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        namespace: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> ProbeConfig:
        """Reads the config alone of a head folder, a head on the Hub, or the head that an alias stands for.

        The arguments are those of `load_probe`; an alias is that of any bundled head, as no backbone is there to tell.

        Raises:
            ProbeError: there is no such head, or its config holds a value that is not allowed.
        """
        from ..files import read_config
        from ..hub.resolve import inside, resolve_head
        from ..hub.transport import HubOptions

        options = HubOptions(revision, token, cache_dir, local_files_only, force_download, only_config=True)
        return read_config(resolve_head(inside(source, subfolder), options=options, namespace=namespace))

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `probe_config.json` alone into a folder, such as one with another threshold beside the weights it is of.

        Raises:
            ProbeError: a field was set to something that is not allowed, or the folder cannot be made or written into.
        """
        from ..files import save_config

        save_config(self.replace(), save_directory)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same config back."""
        values = dataclasses.asdict(self)
        values["id2label"] = {str(index): name for index, name in self.id2label.items()}
        values["label2id"] = self.label2id
        return values

    def to_json_string(self) -> str:
        """Indented JSON that ends in a newline. Also what the Trainer's loggers ask a model's config for."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> tuple[ProbeConfig, list[str]]:
        """Builds a config from JSON values.

        Returns:
            The config, and the keys that this version does not know and has left out.

        Raises:
            ProbeError: `values` is no dict, or holds a value that is not allowed.
        """
        if not isinstance(values, dict):
            raise ProbeError(f"a probe config must be a JSON object, not {type(values).__name__}")
        names = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(key for key in values if key not in names and key != "label2id")
        config = cls(**{key: value for key, value in values.items() if key in names})
        if values.get("label2id") not in (None, config.label2id):
            raise ProbeError(
                "label2id and id2label contradict each other; leave label2id out, it follows from id2label"
            )
        return config, unknown


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Whether it is a text that can be shown and saved."""
    return isinstance(value, str) and HALF_PAIR.search(value) is None


def _has_controls(text: str) -> bool:
    """Whether a head from the Hub could write to the terminal, begin a line of a log, or turn the order of what stands around it,
    with a text of its config. Marks that join letters or emoji, and those of a single letter's direction, do none of it."""
    return any(unicodedata.category(sign) in _LINES or unicodedata.bidirectional(sign) in _TURNS for sign in text)


def _is_int_list(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(item) and 0 <= item <= MAX_SIZE for item in value)


def _check_int(name: str, value: Any) -> None:
    if not _is_int(value) or not 1 <= value <= MAX_SIZE:
        raise ProbeError(f"{name}={value!r} must be a whole number from 1 to {MAX_SIZE}")


def _check_number(name: str, value: Any, rule: str, holds) -> None:
    # Torch takes no whole numbers beyond 64 bits.
    number = abs(value) < 2**63 if _is_int(value) else isinstance(value, float) and math.isfinite(value)
    if not number or not holds(value):
        raise ProbeError(f"{name}={value!r} must be a number {rule}")
