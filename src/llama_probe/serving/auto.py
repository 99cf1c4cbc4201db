"""`AutoModelForProbedGeneration`: any causal LM of transformers, with heads."""

from __future__ import annotations

import copyreg
import os
from typing import Any

from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel

from ..backbone.decoder import without_peft
from ..backbone.loading import load_causal_lm, model_of
from ..errors import ProbeError
from .host import change_class
from .loading import ProbeSpec, load_with_heads
from .modeling import LlamaForProbedGeneration, ProbedGenerationMixin


_PROBED_CLASSES: dict[type, type[ProbedGenerationMixin]] = {LlamaForCausalLM: LlamaForProbedGeneration}


class AutoModelForProbedGeneration:
    """Load or convert any causal LM of transformers, with heads. The probed class is made from the plain class of the LM."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        probe: ProbeSpec | None = None,
        probe_strict: bool = False,
        **kwargs,
    ):
        """Load a causal LM with heads; see `LlamaForProbedGeneration.from_pretrained`.

        Types that only `AutoModelForImageTextToText` has (Qwen2.5-VL) are loaded as well.
        """
        place = pretrained_model_name_or_path
        loaded, heads = load_with_heads(load_causal_lm, place, model_args, kwargs, probe)
        cls.from_causal_lm(model_of(loaded), heads, probe_strict)
        return loaded

    @classmethod
    def from_causal_lm(
        cls, lm: PreTrainedModel, probe: ProbeSpec | None = None, strict: bool = False
    ) -> ProbedGenerationMixin:
        """Turn a loaded causal LM into its probed class, in place; see `ProbedGenerationMixin.from_causal_lm`.

        Raises:
            ProbeError: `lm` is wrapped by `torch.compile`, or has heads of the code of its repository.
        """
        if hasattr(lm, "_orig_mod"):
            raise ProbeError("torch.compile wraps this model: from_causal_lm(model._orig_mod, ...), and compile that")
        base: Any = without_peft(lm)
        if hasattr(base, "_causal_lm_class") and not isinstance(base, ProbedGenerationMixin):
            # The class is of the code of an exported repository: the package's class takes its place.
            if base.probes:
                raise ProbeError("this model has heads of its repository's code: load it with import llama_probe")
            change_class(base, base._causal_lm_class)
            del base.probes
        return probed_class(type(base)).from_causal_lm(base, probe, strict)


def probed_class(causal_lm_class: type[PreTrainedModel]) -> type[ProbedGenerationMixin]:
    """Return the probed class of a causal LM class, made on first use."""
    if issubclass(causal_lm_class, ProbedGenerationMixin):
        return causal_lm_class
    if not issubclass(causal_lm_class, GenerationMixin):
        raise ProbeError(f"{causal_lm_class.__name__} is no causal LM: heads attach to classes that generate text")
    if causal_lm_class not in _PROBED_CLASSES:
        name = causal_lm_class.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        # Gemma3ForCausalLM and Gemma3ForConditionalGeneration are two classes
        stem = name.removesuffix("ForConditionalGeneration")
        name = stem + ("ForProbedConditionalGeneration" if name != stem else "ForProbedGeneration")
        namespace = {"__module__": __name__, "__doc__": f"`{causal_lm_class.__name__}` with probe heads."}
        made = type(name, (ProbedGenerationMixin, causal_lm_class), namespace)
        # pickle looks for a class in its module, and this class is in none.
        copyreg.pickle(made, lambda model: (_create, (causal_lm_class,), *model.__reduce_ex__(2)[2:]))
        _PROBED_CLASSES.setdefault(causal_lm_class, made)  # another thread may have been first
    return _PROBED_CLASSES[causal_lm_class]


def _create(causal_lm_class: type[PreTrainedModel]) -> PreTrainedModel:
    cls = probed_class(causal_lm_class)
    return cls.__new__(cls)
