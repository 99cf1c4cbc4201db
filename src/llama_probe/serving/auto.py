"""`transformers.AutoModel.from_pretrained(..., probe=...)`, once llama_probe is imported."""

from __future__ import annotations

import functools

from transformers import AutoModel, AutoModelForCausalLM

from .auto_class import AutoModelForProbedGeneration


_AUTO_CLASSES = (AutoModel, AutoModelForCausalLM)


def install() -> None:
    """Teaches `AutoModel` and `AutoModelForCausalLM` the argument `probe=`, which they refuse otherwise.

    Calls without it reach the original untouched. Calling this twice changes nothing; `uninstall` undoes it.
    """
    for auto_class in _AUTO_CLASSES:
        original = vars(auto_class)["from_pretrained"]
        if not hasattr(original.__func__, "__without_probe__"):
            auto_class.from_pretrained = classmethod(_with_probe(original))


def uninstall() -> None:
    """Gives the auto classes their own `from_pretrained` back."""
    for auto_class in _AUTO_CLASSES:
        original = getattr(vars(auto_class)["from_pretrained"].__func__, "__without_probe__", None)
        if original is not None:
            auto_class.from_pretrained = original


def _with_probe(original: classmethod):
    @functools.wraps(original.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, probe=None, **kwargs):
        if probe is None:
            return original.__func__(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        # probe_revision=, probe_namespace= and probe_strict= are among the keyword arguments.
        return AutoModelForProbedGeneration.from_pretrained(
            pretrained_model_name_or_path, *model_args, probe=probe, **kwargs
        )

    from_pretrained.__without_probe__ = original
    return from_pretrained
