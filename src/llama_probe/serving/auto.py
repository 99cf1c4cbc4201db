"""`AutoModelForProbedGeneration`, and `probe=` of `AutoModel` and `AutoModelForCausalLM`."""

from __future__ import annotations

import functools
import os

from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM, PreTrainedModel

from ..backbone.decoder import without_peft
from ..backbone.loading import load_causal_lm
from ..errors import ProbeError
from .host import change_class
from .modeling import LlamaForProbedGeneration, ProbedGenerationMixin
from .sources import ProbeSpec, load_heads_for


_AUTO_CLASSES = (AutoModel, AutoModelForCausalLM)
_PROBED_CLASSES: dict[type, type] = {LlamaForCausalLM: LlamaForProbedGeneration}


class AutoModelForProbedGeneration:
    """Picks the probed class of any causal LM that transformers can load."""

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
        """Load a causal LM with heads; see `LlamaForProbedGeneration.from_pretrained`.

        Types that only `AutoModelForImageTextToText` has (Qwen2.5-VL) are loaded as well.
        """
        heads = load_heads_for(pretrained_model_name_or_path, probe, kwargs, probe_revision, probe_namespace)
        loaded = load_causal_lm(pretrained_model_name_or_path, *model_args, **kwargs)
        cls.from_causal_lm(loaded[0] if isinstance(loaded, tuple) else loaded, heads, probe_strict)
        return loaded

    @classmethod
    def from_causal_lm(
        cls, lm: PreTrainedModel, probe: ProbeSpec | None = None, strict: bool = False
    ) -> PreTrainedModel:
        """Turn a loaded causal LM into its probed class, in place; see `ProbedGenerationMixin.from_causal_lm`.

        Raises:
            ProbeError: `lm` is wrapped by `torch.compile`, or has heads of the code of its repository.
        """
        if hasattr(lm, "_orig_mod"):
            raise ProbeError("torch.compile wraps this model: from_causal_lm(model._orig_mod, ...), and compile that")
        base = without_peft(lm)
        plain = getattr(type(base), "_causal_lm_class", type(base))
        if plain is not type(base) and not isinstance(base, ProbedGenerationMixin):
            # An exported repository brings this code along. The class of the package takes the place of its class.
            if base.probes:
                raise ProbeError("this model has heads of its repository's code: add more with its load_probe(...)")
            change_class(base, plain)
            del base.probes, base._active_probes
        return probed_class(type(base)).from_causal_lm(base, probe, strict)


def probed_class(causal_lm_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the probed class of a causal LM class, made on first use.

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
        made = type(name, (ProbedGenerationMixin, _MadeClassMixin, causal_lm_class), namespace)
        _PROBED_CLASSES.setdefault(causal_lm_class, made)  # another thread may have been first
    return _PROBED_CLASSES[causal_lm_class]


class _MadeClassMixin:
    """Pickles models of a class made here by its causal LM class: no module has an attribute of its name."""

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        if type(self) is not _PROBED_CLASSES[self._causal_lm_class]:  # a user's subclass
            return reduced
        return _create, (self._causal_lm_class,), *reduced[2:]


def _create(causal_lm_class: type[PreTrainedModel]) -> PreTrainedModel:
    cls = probed_class(causal_lm_class)
    return cls.__new__(cls)


def install() -> None:
    """Add the argument `probe=` to `AutoModel` and `AutoModelForCausalLM`.

    Calls without it reach the original. A second call changes nothing; `uninstall` undoes it.
    """
    for auto_class in _AUTO_CLASSES:
        original = vars(auto_class)["from_pretrained"]
        if not hasattr(original.__func__, "__without_probe__"):
            auto_class.from_pretrained = classmethod(_with_probe(original))


def uninstall() -> None:
    """Restore the `from_pretrained` of the auto classes."""
    for auto_class in _AUTO_CLASSES:
        original = getattr(vars(auto_class)["from_pretrained"].__func__, "__without_probe__", None)
        if original is not None:
            auto_class.from_pretrained = original


def _with_probe(original: classmethod):
    @functools.wraps(original.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, probe=None, **kwargs):
        if probe is None:
            return original.__func__(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        # kwargs has probe_revision=, probe_namespace= and probe_strict= as well
        return AutoModelForProbedGeneration.from_pretrained(
            pretrained_model_name_or_path, *model_args, probe=probe, **kwargs
        )

    from_pretrained.__without_probe__ = original
    return from_pretrained
