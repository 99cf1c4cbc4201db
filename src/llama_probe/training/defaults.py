"""Defaults of heads and of training, by kind and number of rows, for what the user leaves open."""

from __future__ import annotations

import math

from torch import nn

from ..backbone.decoder import target_of
from ..backbone.loading import backbone_target, model_id
from ..data.labelled_texts import LabelledTexts
from ..errors import ProbeError
from ..files import JSON
from ..heads import get_probe_type, probe_types
from ..heads.configuration import ProbeConfig


AUTO = "auto"

_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_RANGES = {
    "above 0": (lambda value: 0 < value < math.inf, ("learning_rate", "num_train_epochs")),
    "at least 1 and below 2**31": (lambda value: 1 <= value < 2**31, (*_BATCHES, "patience")),
    "at least 0": (lambda value: 0 <= value < math.inf, ("weight_decay", "focal_gamma")),
}

# Rows at most, epochs, batch size. Chosen on validation rows of the demo backbone: fewer rows need more passes over them.
SCHEDULES = ((32, 40, 8), (128, 20, 16), (512, 12, 16), (math.inf, 8, 32))


def check_numbers(values: JSON) -> None:
    """Raise `ProbeError` for a number of training that is out of its range. None is allowed."""
    for allowed, (is_allowed, names) in _RANGES.items():
        for name in names:
            if (value := values.get(name)) is not None and not is_allowed(value):
                raise ProbeError(f"{name}={value} must be {allowed}")


def complete_head(head: JSON, rows: int) -> JSON:
    """Return fields of `ProbeConfig` with a kind for `"auto"` or none, and the kind's dropouts for those that are None."""
    name = head.get("probe_type", AUTO)
    if name == AUTO:
        # As a class declares it itself: a kind that derives from another is not chosen in its place.
        suited = {kind: vars(get_probe_type(kind)).get("auto_up_to", 0) for kind in probe_types()}
        name = min((kind for kind, up_to in suited.items() if rows <= up_to), key=suited.get)
    recipe = get_probe_type(name).recipe
    dropouts = {field: recipe[field] for field in ("dropout", "layer_dropout") if head.get(field) is None}
    return {**head, "probe_type": name, **dropouts}


def check_head(head: JSON) -> None:
    """Raise `ProbeError` for fields of `ProbeConfig` that are not allowed. A kind that is not chosen yet allows all."""
    if head.get("probe_type", AUTO) != AUTO:
        fields = {name: value for name, value in head.items() if value is not None}
        if is_depths(fields.get("layers")):
            fields["layers"] = list(range(len(fields["layers"])))
        ProbeConfig(**fields)


def head_config(head: JSON, rows: LabelledTexts, count: int, backbone: str | nn.Module) -> ProbeConfig:
    """Return the config of a new head for the labels of its training rows.

    Args:
        head: fields of `ProbeConfig`. `layers` may be parts of the depth; see `layers_at`.
        count: number of the rows, without copies; see `complete_head`.
        backbone: its name, so that its sizes are checked before it is loaded, or the LM.
    """
    is_named = isinstance(backbone, str)
    target = backbone_target(backbone) if is_named else target_of(backbone)
    known = {
        "token_scope": "last_user",
        "max_length": 512,
        "hidden_size": target and target.hidden_size,
        "num_hidden_layers": target and target.num_hidden_layers,
        "base_model_name_or_path": model_id(backbone) if is_named else None,
        "flagged": rows.flagged,
    }
    head = complete_head(head, count)
    if is_depths(head.get("layers")):
        if (depth := target and target.num_hidden_layers) is None:
            raise ProbeError(f"layers={head['layers']} are parts of a depth that is not known yet: name the backbone")
        head = {**head, "layers": layers_at(head["layers"], depth)}
    labels = {"id2label": dict(enumerate(rows.label_names)), "problem_type": rows.problem_type}
    return ProbeConfig(**{**known, **head, **labels})


def is_depths(layers: object) -> bool:
    """Return True if layers are named as parts of the depth."""
    return isinstance(layers, (list, tuple)) and any(isinstance(layer, float) for layer in layers)


def layers_at(depths: list[float], num_hidden_layers: int) -> list[int]:
    """Return the state indices at parts of the depth, 0.0 (embeddings) to 1.0 (the last layer), each once."""
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ProbeError(f"layers={wrong[0]} must be a part of the depth from 0.0 to 1.0, or all whole numbers")
    return sorted({round(depth * num_hidden_layers) for depth in depths})
