"""Guard, then serve: another model reads each prompt before the language model does, as without probe heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ...backbone.loading import resolve_backbone
from ...errors import ProbeError
from .random_weights import SHAPES, model_dtype, random_model, read_model_config, weight_bytes


_AUTO_CLASSES = {
    "classifier": AutoModelForSequenceClassification,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "causal": AutoModelForCausalLM,
}


@dataclass(frozen=True)
class GuardPlan:
    """A guard whose config is read and whose weights are not.

    Attributes:
        name: as it was given. config: of the model.
        kind: `"classifier"`, `"encoder-decoder"` or `"causal"`.
        dtype: of its weights. random_weights: make them instead of loading them.
    """

    name: str
    config: PreTrainedConfig
    kind: str
    dtype: torch.dtype
    random_weights: bool

    @classmethod
    def read(cls, name: str, dtype: str = "auto", random_weights: bool = False) -> GuardPlan:
        """Reads the config of a guard.

        Args:
            name: `"demo"`, a folder or a Hub id; with `random_weights` also a built-in shape.

        Raises:
            ProbeError: it cannot be read, or is of no kind that can guard.
        """
        config = read_model_config(name, random_weights)
        return cls(name, config, guard_kind(name, config), model_dtype(config, dtype), random_weights)

    @property
    def title(self) -> str:
        """The name without folders."""
        return Path(self.name).name

    @property
    def paper(self) -> str | None:
        """What it stands beside in the paper."""
        return SHAPES[self.name].paper if self.random_weights and self.name in SHAPES else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights, without making them."""
        return weight_bytes(_AUTO_CLASSES[self.kind], self.config, self.dtype)

    def load(self, device: torch.device) -> Guard:
        """The guard, ready to run.

        Raises:
            ProbeError: its weights cannot be loaded.
        """
        auto_class = _AUTO_CLASSES[self.kind]
        if self.random_weights:
            return Guard(self.kind, random_model(auto_class, self.config, self.dtype, device))
        try:
            model = auto_class.from_pretrained(resolve_backbone(self.name), dtype=self.dtype)
        except (OSError, ValueError) as error:
            raise ProbeError(
                f"the guard {self.name!r} cannot be loaded: {str(error).strip().splitlines()[0]}"
            ) from error
        return Guard(self.kind, model.to(device).eval())


def guard_kind(name: str, config: PreTrainedConfig) -> str:
    """How a model is asked about a prompt, by the architecture that its config names.

    Raises:
        ProbeError: it neither classifies nor generates.
    """
    architectures = config.architectures or []
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        return "classifier"
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if any(architecture.endswith(("ForCausalLM", "LMHeadModel")) for architecture in architectures):
        return "causal"
    raise ProbeError(
        f"{name} is no guard: its config names the architecture {', '.join(architectures) or 'of no model'}; allowed are "
        "...ForSequenceClassification, ...ForCausalLM, ...LMHeadModel, and encoder-decoders"
    )


class Guard:
    """A model that is asked about each prompt. What it answers is of no account here.

    Args:
        kind: see `GuardPlan`. model: on its device.
    """

    def __init__(self, kind: str, model: PreTrainedModel):
        self.kind = kind
        self.model = model
        if model.config.pad_token_id is None:  # classifiers of decoders look for the last token that is no padding
            model.config.pad_token_id = 0

    def ask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """One answer a prompt: a classifier's logits, or the first token that a language model says.

        Args:
            input_ids (`[batch, tokens]`): of any vocabulary; they are brought into the guard's own.
            attention_mask (`[batch, tokens]`).
        """
        ids = input_ids % self.model.config.get_text_config().vocab_size
        if self.kind == "classifier":
            with torch.no_grad():
                return self.model(input_ids=ids, attention_mask=attention_mask).logits
        return self.model.generate(
            ids, attention_mask=attention_mask, max_new_tokens=1, do_sample=False, pad_token_id=0
        )
