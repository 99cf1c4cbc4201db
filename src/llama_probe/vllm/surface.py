"""The names of vLLM that heads depend on, and the check that an installation or an unpacked wheel has them.

The check reads vLLM's sources and imports none of them, so it also works for a release whose dependencies are not installed:

    make surface VLLM=0.35.0
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..compatibility import minor


@dataclass(frozen=True)
class Name:
    """A name of vLLM.

    Attributes:
        place: `module:Name` or `module:Class.member` without the leading `vllm.`, where vLLM defines the name.
        version: the newest minor version in which we have read the name.
        shape: parameters of a function without `self`, separated by commas. An ending of `...` allows more parameters that have
            defaults. Empty for a class, a field or a value.
        first: the minor version that has brought the name here, if an older one is supported that does not have it.
        last: the newest minor version that has the name, if a newer one is supported that does not have it.
    """

    place: str
    version: str
    shape: str = ""
    first: str = "0.0"
    last: str = "9999.0"

    def __str__(self) -> str:
        return f"vllm.{self.place.replace(':', '.')}" + (f"({self.shape})" if self.shape else "")


def _fields(owner: str, names: str, version: str = "0.34") -> list[Name]:
    return [Name(f"{owner}.{name}", version) for name in names.split()]


_SCHEDULER = "v1.core.sched.scheduler:Scheduler"
_CONNECTOR = "distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
_CACHE = "model_executor.models.extract_hidden_states"
_ENTRY = "entrypoints.launchers.api_server.entry"
_AUX = "v1.worker.gpu.spec_decode.eagle.eagle3_utils"
_OLD_CLI = "entrypoints.launchers.cli_args"
_NEW_CLI = "entrypoints.common.cli_args"

SURFACE: tuple[Name, ...] = (
    # scheduler.py overrides these methods and reads these attributes.
    Name(f"{_SCHEDULER}.update_from_output", "0.34", "scheduler_output, model_runner_output"),
    Name(f"{_SCHEDULER}._update_request_with_output", "0.34", "request, new_token_ids, is_stale"),
    Name(f"{_SCHEDULER}._update_request_as_session", "0.34", "session, update"),
    *_fields(_SCHEDULER, "connector requests max_num_running_reqs"),
    Name("v1.core.sched.async_scheduler:AsyncScheduler", "0.34"),
    *_fields("config.scheduler:SchedulerConfig", "scheduler_cls async_scheduling max_num_seqs"),
    *_fields("v1.outputs:ModelRunnerOutput", "kv_connector_output"),
    *_fields("v1.outputs:KVConnectorOutput", "kv_connector_worker_meta"),
    Name("v1.request:StreamingUpdate", "0.34"),
    *_fields("v1.request:RequestStatus", "FINISHED_STOPPED FINISHED_LENGTH_CAPPED"),
    *_fields(
        "v1.request:Request",
        "request_id status stop_reason max_tokens sampling_params kv_transfer_params prompt_token_ids num_prompt_tokens "
        "num_computed_tokens resumable num_tokens num_output_tokens",
    ),
    Name("v1.request:Request.is_finished", "0.34"),
    *_fields(
        "v1.engine:EngineCoreOutput",
        "request_id new_token_ids new_logprobs finish_reason stop_reason events kv_transfer_params prefill_stats "
        "new_prompt_logprobs_tensors prompt_token_id_logprobs",
    ),
    Name("v1.engine:EngineCoreOutput.finished", "0.34"),
    Name("v1.engine:EngineCoreOutput.watermarking", "0.34", first="0.34"),
    *_fields("v1.engine:EngineCoreOutputs", "outputs"),
    Name("v1.outputs:LogprobsLists.slice_request", "0.34", "req_idx, num_positions"),
    # connector.py overrides these methods; the last ones of the list are called.
    Name(f"{_CONNECTOR}.__init__", "0.34", "vllm_config, role, kv_cache_config"),
    *(
        Name(f"{_CONNECTOR}.{method}", "0.34", shape)
        for method, shape in {
            "requires_kv_delivery": "",
            "register_kv_caches": "kv_caches",
            "update_state_after_alloc": "request, blocks, num_external_tokens",
            "start_load_kv": "forward_context",
            "wait_for_layer_load": "layer_name",
            "save_kv_layer": "layer_name, kv_layer, attn_metadata",
            "wait_for_save": "",
            "on_new_request": "request",
            "get_num_new_matched_tokens": "request, num_computed_tokens",
            "build_connector_meta": "scheduler_output",
            "build_connector_worker_meta": "",
            "request_finished": "request, block_ids",
            "_get_connector_metadata": "",
            "bind_kv_cache_manager": "kv_cache_manager",
        }.items()
    ),
    Name("distributed.kv_transfer.kv_connector.v1.base:KVConnectorMetadata", "0.34"),
    Name("distributed.kv_transfer.kv_connector.v1.base:KVConnectorWorkerMetadata.aggregate", "0.34", "other"),
    Name("distributed.kv_transfer.kv_connector.v1.base:KVConnectorRole", "0.34"),
    *_fields("config.kv_transfer:KVTransferConfig", "kv_connector kv_connector_module_path kv_role"),
    *_fields("v1.core.sched.output:SchedulerOutput", "num_scheduled_tokens preempted_req_ids"),
    Name("v1.core.kv_cache_manager:KVCacheManager.get_blocks", "0.34", "request_id"),
    Name("v1.core.kv_cache_manager:KVCacheManager.get_block_ids", "0.34", "request_id"),
    *_fields("v1.kv_cache_interface:KVCacheConfig", "kv_cache_groups"),
    *_fields("v1.kv_cache_interface:KVCacheGroupSpec", "layer_names kv_cache_spec"),
    Name("distributed.parallel_state:get_pp_group", "0.34"),
    Name("distributed.parallel_state:get_tensor_model_parallel_rank", "0.34"),
    Name("distributed.parallel_state:get_tensor_model_parallel_world_size", "0.34"),
    Name("config.vllm:get_layers_from_vllm_config", "0.34", "vllm_config, layer_type, ..."),
    # models.py and paged_states.py
    Name("model_executor.models.registry:_ModelRegistry.register_model", "0.34", "model_arch, model_cls"),
    Name("model_executor.models.registry:_ModelRegistry.models", "0.34"),
    Name("model_executor.models.registry:_LazyRegisteredModel.load_model_cls", "0.34"),
    Name("model_executor.models.interfaces:SupportsEagle3.set_aux_hidden_state_layers", "0.34", "layers"),
    Name("model_executor.models.utils:maybe_prefix", "0.34", "prefix, name"),
    Name(f"{_AUX}:reserve_aux_intermediate_tensor_slots", "0.34", "model"),
    Name(f"{_AUX}:verify_supports_aux_hidden_states_over_pp", "0.34", "model, method"),
    Name("sequence:IntermediateTensors", "0.34"),
    Name("distributed.communication_op:tensor_model_parallel_all_gather", "0.34", "input_, dim"),
    Name("forward_context:get_forward_context", "0.34"),
    *_fields("forward_context:ForwardContext", "slot_mapping"),
    Name(f"{_CACHE}:CacheOnlyAttentionLayer.__init__", "0.34", "num_heads, head_size, cache_config, prefix, ..."),
    Name(f"{_CACHE}:CacheOnlyAttentionLayer.get_kv_cache_spec", "0.34", "vllm_config"),
    *_fields(f"{_CACHE}:CacheOnlyAttentionLayer", "layer_name kv_cache kv_cache_torch_dtype attn_backend"),
    Name(f"{_CACHE}:CacheOnlyAttentionBackend.get_builder_cls", "0.34"),
    Name(f"{_CACHE}:CacheOnlyAttentionMetadataBuilder", "0.34"),
    Name("v1.attention.backend:AttentionCGSupport.ALWAYS", "0.34"),
    Name("v1.attention.backend:AttentionMetadataBuilder._cudagraph_support", "0.34"),
    Name("v1.kv_cache_interface:FullAttentionSpec", "0.34"),
    Name("v1.kv_cache_interface:KVCacheSpec", "0.34"),
    *_fields("v1.kv_cache_interface:AttentionSpec", "num_kv_heads head_size head_size_v dtype"),
    Name("utils.torch_utils:async_tensor_h2d", "0.34", "data, device, ..."),
    # settings.py and compatibility.py read these fields of a complete config.
    *_fields(
        "config.vllm:VllmConfig",
        "additional_config model_config scheduler_config kv_transfer_config speculative_config parallel_config "
        "device_config cache_config aux_output_config",
    ),
    *_fields("config.model:ModelConfig", "architecture enable_sleep_mode return_sampling_mask dtype max_model_len"),
    *_fields("config.parallel:ParallelConfig", "enable_dbo ubatch_size"),
    *_fields("config.speculative:SpeculativeConfig", "method"),
    # patches.py starts vLLM's server with these.
    Name(f"{_OLD_CLI}:make_arg_parser", "0.32", "parser", last="0.32"),
    Name(f"{_OLD_CLI}:validate_parsed_serve_args", "0.32", "args", last="0.32"),
    Name("entrypoints.serve.utils.api_utils:cli_env_setup", "0.32", last="0.32"),
    Name(f"{_NEW_CLI}:make_arg_parser", "0.34", "parser", first="0.33"),
    Name(f"{_NEW_CLI}:validate_parsed_serve_args", "0.34", "args", first="0.33"),
    Name("entrypoints.common.startup:cli_env_setup", "0.34", first="0.33"),
    Name("logger:configure_logging_from_args", "0.34", "args"),
    Name(f"{_ENTRY}:build_and_serve", "0.34", "engine_client, listen_address, sock, args, ..."),
    Name(f"{_ENTRY}:run_server", "0.34", "args"),
    Name("utils.argparse_utils:FlexibleArgumentParser", "0.34"),
    Name("version:__version__", "0.34"),
    Name("logger:init_logger", "0.34", "name"),
    # middleware.py and judge.py stand between the server and its engine.
    Name("engine.protocol:EngineClient", "0.34"),
    Name("v1.engine.async_llm:AsyncLLM.generate", "0.34", "prompt, sampling_params, request_id, ..."),
    Name("v1.engine.async_llm:AsyncLLM.shutdown", "0.34", "timeout"),
    Name("v1.engine.async_llm:AsyncLLM.errored", "0.34"),
    *_fields("outputs:RequestOutput", "prompt_token_ids outputs finished kv_transfer_params prompt_logprobs"),
    *_fields("outputs:RequestOutput", "prompt_token_id_logprobs"),
    Name("outputs:RequestOutput.add", "0.34", "next_output, aggregate"),
    *_fields("outputs:CompletionOutput", "index text token_ids logprobs finish_reason stop_reason"),
    *_fields("sampling_params:RequestOutputKind", "CUMULATIVE DELTA FINAL_ONLY"),
    *_fields("sampling_params:SamplingParams", "n extra_args output_kind stream_interval stop"),
)


def missing_names(root: Path | zipfile.Path, version: str) -> list[str]:
    """Return the names of `SURFACE` that vLLM's sources lack or have in another shape, with what stands there.

    Args:
        root: the folder of the package `vllm`, which may lie in a wheel.
        version: of these sources, such as `"0.34.0"`.
    """
    problems: list[str] = []
    for name in SURFACE:
        if not minor(name.first) <= minor(version) <= minor(name.last):
            continue
        found = _find(root, name.place)
        if found is None:
            problems.append(f"{name} is missing")
        elif name.shape and not _fits(found, name.shape):
            problems.append(f"{name} is now ({', '.join(_parameters(found))})")
    return problems


@functools.cache
def missing_here(version: str) -> tuple[str, ...]:
    """Return `missing_names` of the vLLM that is installed."""
    spec = importlib.util.find_spec("vllm")
    return tuple(missing_names(Path(spec.submodule_search_locations[0]), version))


def _find(root: Path | zipfile.Path, place: str) -> ast.AST | None:
    module, _, path = place.partition(":")
    body = _body(root, module)
    found: ast.AST | None = None
    for part in path.split("."):
        found = next((node for node in body if part in _bound(node)), None)
        if isinstance(found, ast.ClassDef):
            body = _members(found)
    return found


@functools.lru_cache(maxsize=64)
def _body(root: Path | zipfile.Path, module: str) -> list[ast.stmt]:
    """Return the statements of a module, with those in the branches of its `if` and `try`; none if there is no such module."""
    path = module.replace(".", "/")
    for file in (root.joinpath(f"{path}.py"), root.joinpath(f"{path}/__init__.py")):
        if file.is_file():
            return _flat(ast.parse(file.read_text(encoding="utf-8")).body)
    return []


def _flat(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    found: list[ast.stmt] = []
    for node in body:
        found.append(node)
        if isinstance(node, (ast.If, ast.Try)):
            found += _flat([*node.body, *node.orelse])
    return found


def _members(owner: ast.ClassDef) -> list[ast.stmt]:
    """Return the statements of a class, and the assignments in its methods."""
    members = _flat(owner.body)
    methods = [node for node in members if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = [node for method in methods for node in ast.walk(method)]
    return members + [node for node in inside if isinstance(node, (ast.Assign, ast.AnnAssign))]


def _bound(node: ast.stmt) -> list[str]:
    """Return the names that a statement binds, with those of attributes of `self`."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    names: list[str] = []
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Name):
                names.append(part.id)
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                names.append(part.attr)
    return names


def _parameters(node: ast.AST) -> list[str]:
    """Return the parameters of a function without `self` and `**kwargs`; one with a default ends with `=`."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return ["no function"]
    arguments = node.args
    places = [*arguments.posonlyargs, *arguments.args]
    without = len(places) - len(arguments.defaults)
    names = [each.arg + "=" * (number >= without) for number, each in enumerate(places)]
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        names.append(each.arg + "=" * (default is not None))
    return [name for name in names if name not in ("self", "cls")]


def _fits(node: ast.AST, shape: str) -> bool:
    wanted = shape.split(", ")
    actual = _parameters(node)
    names = [name.removesuffix("=") for name in actual]
    if wanted[-1] != "...":
        return names == wanted
    wanted = wanted[:-1]
    return names[: len(wanted)] == wanted and all(name.endswith("=") for name in actual[len(wanted) :])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the names that a wheel of vLLM lacks. Exit with status 1 if there are any."""
    parser = argparse.ArgumentParser(description="Check a wheel of vLLM for the names that heads depend on.")
    parser.add_argument("wheel", type=Path, help="file vllm-VERSION-....whl; nothing of it is installed or run")
    wheel = parser.parse_args(argv).wheel
    version = wheel.name.split("-")[1]
    problems = missing_names(zipfile.Path(wheel) / "vllm", version)
    for problem in problems:
        print(problem)
    print(f"vLLM {version}: {len(problems)} of {len(SURFACE)} names that heads need are missing or changed")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
