"""Internals of other packages that heads and serving use: a release that moves one of them fails here, with its name."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import make_lm, make_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    T5Config,
    TextGenerationPipeline,
    Trainer,
    cache_utils,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import PipelineRegistry
from transformers.trainer_utils import align_special_tokens

from llama_probe import ProbeConfig


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def refusal_of_another_type() -> str:
    with pytest.raises(ValueError) as refused:
        AutoModelForCausalLM.from_config(T5Config())
    return str(refused.value)


def registered() -> dict:
    class Own(TextGenerationPipeline):
        pass

    PipelineRegistry({}, {}).register_pipeline("own", Own)
    return vars(Own)


def alignments() -> list[str]:
    """Return the special tokens that the stock Trainer looks for in a head's config, and those that it would change."""
    asked = []

    class Text:
        def __getattr__(self, name: str) -> list[int]:
            asked.append(name)
            return ProbeConfig().get_text_config().pad_token_id

        def __setattr__(self, name: str, value: object) -> None:
            asked.append(f"{name} changes")

    head = SimpleNamespace(config=SimpleNamespace(get_text_config=Text))
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    align_special_tokens(head, tokenizer)
    return asked


HOOKS = {
    "generate(inputs, generation_config, ...)": lambda: (
        parameters(GenerationMixin.generate)[1:3] == ["inputs", "generation_config"]
    ),
    "generate(synced_gpus=)": lambda: "synced_gpus" in parameters(GenerationMixin.generate),
    "prepare_inputs_for_generation": lambda: callable(make_lm().prepare_inputs_for_generation),
    "init_continuous_batching": lambda: callable(make_lm().init_continuous_batching),
    "model.loss_type": lambda: make_lm().loss_type == "ForCausalLM",
    "align_special_tokens": lambda: alignments() == ["eos_token_id", "bos_token_id", "pad_token_id"],
    "Trainer: model.accepts_loss_kwargs": lambda: "accepts_loss_kwargs" in inspect.getsource(Trainer),
    "Trainer: config.keys_to_ignore_at_inference": lambda: "keys_to_ignore_at_inference" in inspect.getsource(Trainer),
    "Trainer: num_parameters(exclude_embeddings=)": lambda: "num_parameters(exclude_" in inspect.getsource(Trainer),
    "Module._apply(fn, recurse)": lambda: parameters(nn.Module._apply) == ["self", "fn", "recurse"],
    "model._tp_size": lambda: hasattr(make_lm(), "_tp_size"),
    "config._name_or_path": lambda: make_lm().config._name_or_path == "",
    "Cache.layers": lambda: "layers" in parameters(cache_utils.Cache),
    "recurrent_states": lambda: "recurrent_states" in inspect.getsource(cache_utils),
    "Unrecognized configuration class": lambda: "Unrecognized configuration class" in refusal_of_another_type(),
    "find_adapter_config_file(subfolder=)": lambda: (
        "subfolder" in parameters(transformers.utils.find_adapter_config_file)
    ),
    "TextGenerationPipeline._forward": lambda: (
        "generated_sequence" in inspect.getsource(TextGenerationPipeline._forward)
        and "self.model.generate(" in inspect.getsource(TextGenerationPipeline._forward)
    ),
    "Pipeline.check_model_type": lambda: callable(TextGenerationPipeline.check_model_type),
    "Pipeline._registered_impl": lambda: "_registered_impl" in registered(),
    "PIPELINE_REGISTRY": lambda: "probed-text-generation" in PIPELINE_REGISTRY.get_supported_tasks(),
    "module._forward_pre_hooks": lambda: not make_lm()._forward_pre_hooks,
    "module._hf_hook": lambda: "_hf_hook" in vars(add_hook_to_module(make_lm(), ModelHook())),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_it_is_where_the_package_looks(hook):
    assert HOOKS[hook](), f"{hook} has moved in transformers {transformers.__version__}"
