"""Guard, then serve: another model reads each prompt before the language model does, as without probe heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ...errors import ProbeError
from .random_weights import ModelPlan


# Endings of the architectures that can guard.
_AUTO_CLASSES = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForConditionalGeneration": AutoModelForSeq2SeqLM,
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
}


def read_guard(name: str, dtype: str = "auto", random_weights: bool = False) -> ModelPlan:
    """Read the config of a guard: a sequence classifier, an encoder-decoder or a causal LM.

    Raises:
        ProbeError: see `ModelPlan.read`; or the model neither classifies nor generates.
    """
    plan = ModelPlan.read(name, dtype, random_weights)
    architectures = plan.config.architectures or []
    for ending, auto_class in _AUTO_CLASSES.items():
        if any(architecture.endswith(ending) for architecture in architectures):
            return replace(plan, auto_class=auto_class)
    raise ProbeError(f"{name} is no guard: architectures={architectures}; allowed endings: {', '.join(_AUTO_CLASSES)}")


def ask_guard(guard: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return one answer a prompt: a classifier's logits, or ids with one new token. Only its cost matters.

    Args:
        input_ids (`[B, T]`): ids of any vocabulary. They are mapped into the guard's own.
        attention_mask (`[B, T]`).
    """
    ids = input_ids % guard.config.get_text_config().vocab_size
    if not guard.can_generate():
        if guard.config.pad_token_id is None:  # a classifier on a decoder reads the last token that is not padding
            guard.config.pad_token_id = 0
        with torch.no_grad():
            return guard(input_ids=ids, attention_mask=attention_mask).logits
    return guard.generate(ids, attention_mask=attention_mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
