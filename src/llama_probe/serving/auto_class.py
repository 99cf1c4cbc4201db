"""`AutoModelForProbedGeneration`: heads on a causal LM of any family."""

from __future__ import annotations

import os

from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel

from ..backbone.decoder import target_of, without_peft
from ..backbone.loading import load_causal_lm
from ..errors import ProbeError
from ..heads.configuration import ProbeConfig
from ..heads.probe import ProbeModel
from .host import change_class
from .modeling import LlamaForProbedGeneration, ProbedGenerationMixin
from .sources import ProbeSpec, load_heads_for, read_heads


_PROBED_CLASSES: dict[type, type] = {LlamaForCausalLM: LlamaForProbedGeneration}


class _MadeClassMixin:
    """Lets models of classes that are made here be copied and pickled: pickle would look for the class in a module."""

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        if type(self) is not _PROBED_CLASSES[self._causal_lm_class]:  # a class that somebody derived from one
            return reduced
        return _create, (self._causal_lm_class,), *reduced[2:]


def _create(causal_lm_class: type[PreTrainedModel]) -> PreTrainedModel:
    cls = probed_class(causal_lm_class)
    return cls.__new__(cls)


def probed_class(causal_lm_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The probed class of a causal LM class, made on first use.

    Raises:
        ProbeError: the class does not generate text as a decoder does.
    """
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
        # of two threads that come here at once, both get the same
        bases = (ProbedGenerationMixin, _MadeClassMixin, causal_lm_class)
        _PROBED_CLASSES.setdefault(causal_lm_class, type(name, bases, namespace))
    return _PROBED_CLASSES[causal_lm_class]


class AutoModelForProbedGeneration:
    """Picks the probed class for any causal LM that transformers can load."""

    def __init__(self):
        raise ProbeError("use AutoModelForProbedGeneration.from_pretrained(...) or .from_causal_lm(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        probe: ProbeSpec | None = None,
        probe_revision: str | None = None,
        probe_namespace: str | None = None,
        probe_strict: bool = False,
        **kwargs,
    ):
        """`AutoModelForCausalLM.from_pretrained` with heads; see `LlamaForProbedGeneration.from_pretrained`.

        Types that only `AutoModelForImageTextToText` has (Qwen2.5-VL) are loaded as well.
        """
        heads = load_heads_for(pretrained_model_name_or_path, probe, kwargs, probe_revision, probe_namespace)
        loaded = load_causal_lm(pretrained_model_name_or_path, *model_args, **kwargs)
        lm = loaded[0] if isinstance(loaded, tuple) else loaded
        cls.from_causal_lm(lm, heads, probe_strict)
        return loaded

    @classmethod
    def from_causal_lm(
        cls, lm: PreTrainedModel, probe: ProbeSpec | None = None, strict: bool = False
    ) -> PreTrainedModel:
        """Turns any loaded causal LM into its probed class, in place; see `ProbedGenerationMixin.from_causal_lm`."""
        if hasattr(lm, "_orig_mod"):
            raise ProbeError(
                "torch.compile wraps this model, and heads attach to the model itself: from_causal_lm(model._orig_mod, ...), and "
                "compile that when they are attached"
            )
        base = without_peft(lm)
        if hasattr(type(base), "_causal_lm_class") and not isinstance(base, ProbedGenerationMixin):
            return _take_over(base, probe, strict)
        return probed_class(type(base)).from_causal_lm(base, probe, strict)


def _take_over(lm: PreTrainedModel, probe: ProbeSpec | None, strict: bool) -> PreTrainedModel:
    """`from_causal_lm` of a model whose class comes from a repository with its own copy of this code (trust_remote_code=True)."""
    heads = read_heads(probe, target_of(lm))
    own = {name: _copy_head(head) for name, head in lm.probes.items()}
    theirs, plain, probes, active = type(lm), type(lm)._causal_lm_class, lm.probes, lm._active_probes
    change_class(lm, plain)
    try:
        probed_class(plain).from_causal_lm(lm, own)
        lm.set_active_probes(active)
        lm._attach(heads, strict)
    except BaseException:
        change_class(lm, theirs)
        lm.probes, lm._active_probes = probes, active
        raise
    return lm


def _copy_head(head: nn.Module) -> ProbeModel:
    """A head of another copy of this code as one of this copy."""
    config, _ = ProbeConfig.from_dict(head.config.to_dict())
    copied = ProbeModel(config)
    copied.load_state_dict(head.state_dict())
    copied.results = head.results
    return copied
