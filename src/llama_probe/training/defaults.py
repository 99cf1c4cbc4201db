"""Defaults of heads and of training, by head type and number of rows, for settings that the user leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..backbone.decoder import target_of
from ..backbone.loading import backbone_target, load_backbone
from ..data.labelled_texts import LabelledTexts
from ..data.memory import is_tokenized, rows_in_memory
from ..data.prompts import as_chat, has_reply
from ..errors import ProbeError
from ..files import JSON
from ..heads import get_probe_type, probe_types
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel


AUTO = "auto"

# Rows at most, epochs, batch size. Chosen on validation rows of the demo backbone: fewer rows need more passes over them.
SCHEDULES = ((32, 40, 8), (128, 20, 16), (512, 12, 16), (math.inf, 8, 32))


def complete_head(head: JSON, rows: int) -> JSON:
    """Return fields of `ProbeConfig` with a head type if there is none, and the dropouts of the type if there are none."""
    name = head.get("probe_type", AUTO)
    if name == AUTO:
        # The attribute of the class itself: a type that derives from another type is not chosen for it.
        up_to = {known: vars(get_probe_type(known)).get("auto_up_to", 0) for known in probe_types()}
        name = min((known for known in up_to if rows <= up_to[known]), key=up_to.get)
    defaults = get_probe_type(name).training_defaults
    dropouts = {field: defaults[field] for field in ("dropout", "layer_dropout") if head.get(field) is None}
    return {**head, "probe_type": name, **dropouts}


def head_config(head: JSON, rows: LabelledTexts, count: int, backbone: str | nn.Module) -> ProbeConfig:
    """Return the config of a new head for the labels of `count` training rows, augmentations not counted.

    `head` has fields of `ProbeConfig`; `layers` may be parts of the depth. The sizes of a backbone by its name are found before
    it is loaded.
    """
    is_named = isinstance(backbone, str)
    target = backbone_target(backbone) if is_named else target_of(backbone)
    known = {
        "token_scope": _scope_of(rows),
        "max_length": 512,
        "hidden_size": target and target.hidden_size,
        "num_hidden_layers": target and target.num_hidden_layers,
        "base_model_name_or_path": target.name_or_path if is_named and target else None,
        "flagged": rows.flagged,
        "layers": "all",
    }
    head = known | complete_head(head, count)
    head["layers"] = layers_at(head["layers"], head["num_hidden_layers"])
    labels = {"id2label": dict(enumerate(rows.label_names)), "problem_type": rows.problem_type}
    return ProbeConfig(**head | labels)


def head_for_rows(
    backbone: Any,
    head: JSON,
    data: object,
    columns: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[ProbeModel, LabelledTexts, PreTrainedTokenizerBase | None]:
    """Return a head for the labels of the training rows, the rows, and the tokenizer of the backbone, which is loaded."""
    names = list(head["id2label"].values()) if head.get("id2label") else None
    rows = rows_in_memory("train_dataset", data, columns, names, head.get("problem_type"))
    backbone = backbone if isinstance(backbone, nn.Module) else str(backbone)
    config = head_config(head, rows, len(rows), backbone)
    if isinstance(backbone, str):
        backbone, own = load_backbone(backbone)
        tokenizer = tokenizer or own
    return ProbeModel(config, backbone=backbone), rows, tokenizer


def _scope_of(rows: LabelledTexts) -> str:
    """Return the `token_scope` of a head for rows that all end with a reply, all with a tool result, or otherwise."""
    if is_tokenized(rows):
        return "last_user"
    if all(map(has_reply, rows.texts)):
        return "response"
    return "tool" if all(as_chat(text)[-1]["role"] == "tool" for text in rows.texts) else "last_user"


def layers_at(layers: object, num_hidden_layers: int | None) -> object:
    """Return state indices for parts of the depth, from 0.0 (embeddings) to 1.0 (the last layer). State indices stay."""
    if not isinstance(layers, (list, tuple)) or not any(isinstance(layer, float) for layer in layers):
        return layers
    if num_hidden_layers is None:
        raise ProbeError(f"layers={layers} are parts of a depth that is not known yet: name the backbone")
    wrong = [depth for depth in layers if not 0 <= depth <= 1]
    if wrong:
        raise ProbeError(f"layers={wrong[0]} must be a part of the depth from 0.0 to 1.0, or all whole numbers")
    return sorted({round(depth * num_hidden_layers) for depth in layers})
