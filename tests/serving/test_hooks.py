"""What serving takes from inside of other packages: a release that moves one of these fails here, with its name."""

import inspect
from collections.abc import Callable

import pytest
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import make_lm
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    T5Config,
    TextGenerationPipeline,
    cache_utils,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import PipelineRegistry


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


HOOKS = {
    "generate(inputs, generation_config, ...)": lambda: (
        parameters(GenerationMixin.generate)[1:3] == ["inputs", "generation_config"]
    ),
    "generate(synced_gpus=)": lambda: "synced_gpus" in parameters(GenerationMixin.generate),
    "prepare_inputs_for_generation": lambda: callable(make_lm().prepare_inputs_for_generation),
    "init_continuous_batching": lambda: callable(make_lm().init_continuous_batching),
    "model.loss_type": lambda: make_lm().loss_type == "ForCausalLM",
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
