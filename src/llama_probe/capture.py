"""The only code that touches a language model's internals: finds its layers, and taps their states while it runs.

Its output embeddings are the business of `llama_probe.next_token`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache

from .configuration import ProbeConfig
from .errors import ProbeError


_LAYER_NAMES = ("layers", "h", "blocks")
_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal LM that heads read.

    Attributes:
        model: the backbone without its LM head.
        layers: the decoder layers, in order.
        norm: the norm after the last layer.
        hidden_size: size of a state.
        name_or_path, model_type: of the backbone's config.
    """

    model: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    hidden_size: int
    name_or_path: str | None
    model_type: str | None

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers L; there are L+1 states."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where the last state appears, and so where heads belong. Right for offloaded weights as well."""
        hook = getattr(self.norm, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is None:
            device = next((p.device for p in self.norm.parameters()), torch.device("cpu"))
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cpu") if device.type == "meta" else device

    def match(self, config: ProbeConfig) -> ProbeConfig:
        """`config` with the backbone's sizes and name where it has none; `fingerprint.describe` adds the rest.

        Raises:
            ProbeError: it was made for another hidden size or number of layers.
        """
        for name in ("hidden_size", "num_hidden_layers"):
            wanted, found = getattr(config, name), getattr(self, name)
            if wanted is not None and wanted != found:
                made_for = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
                raise ProbeError(
                    f"{name}={wanted} in the head's config, but this backbone has {found}: "
                    f"the head was made for another model{made_for}"
                )
        return config.replace(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            base_model_name_or_path=config.base_model_name_or_path or self.name_or_path,
            base_model_type=config.base_model_type or self.model_type,
        )


def without_peft(lm: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, with its adapters in it; any other comes back as it is."""
    return lm.get_base_model() if hasattr(lm, "peft_config") and hasattr(lm, "get_base_model") else lm


def is_tensor_parallel(lm: nn.Module | None) -> bool:
    """Whether each of several processes has a part of every layer (`tp_plan`), so that all must run it on the same rows."""
    return lm is not None and (getattr(without_peft(lm), "_tp_size", None) or 1) > 1


def find_decoder(lm: nn.Module) -> Decoder:
    """Finds the decoder of a causal LM, also inside a PEFT model.

    Raises:
        ProbeError: its layers or its final norm are not where known families have them.
    """
    base = without_peft(lm)
    model = base.get_decoder() if hasattr(base, "get_decoder") else base
    model = base.base_model if model is None else model
    text_config = base.config.get_text_config(decoder=True)
    layers = next((getattr(model, name) for name in _LAYER_NAMES if hasattr(model, name)), None)
    norm = next((getattr(model, name) for name in _NORM_NAMES if hasattr(model, name)), None)
    if not isinstance(layers, nn.ModuleList) or norm is None or len(layers) != text_config.num_hidden_layers:
        raise ProbeError(
            f"the layers of {type(base).__name__} were not found: looked in {type(model).__name__} for a ModuleList of "
            f"{text_config.num_hidden_layers} layers called {' / '.join(_LAYER_NAMES)} and a final norm called "
            f"{' / '.join(_NORM_NAMES)}"
        )
    return Decoder(
        model=model,
        layers=layers,
        norm=norm,
        hidden_size=text_config.hidden_size,
        name_or_path=getattr(base.config, "_name_or_path", None) or None,
        model_type=base.config.model_type,
    )


class Capture:
    """Hands each state to a callback as it appears, and keeps none.

    State 0 is what enters the first layer (right for `inputs_embeds` and for models that scale or add positions to
    their embeddings), state i the output of layer i, and state L the output of the final norm: equal to
    `output_hidden_states`. The hooks exist only inside the `with` block, and only listen to the thread that opened it,
    so that two threads can run one model.

    Args:
        decoder: from `find_decoder`.
        on_state: called as `on_state(layer, hidden)` with `hidden` of shape `[rows, tokens, hidden_size]`.
        layers: the state indices wanted.
    """

    def __init__(self, decoder: Decoder, on_state: Callable[[int, torch.Tensor], None], layers: Collection[int]):
        self.decoder = decoder
        self.on_state = on_state
        self.layers = frozenset(layers)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._thread: int | None = None

    def __enter__(self) -> Capture:
        self._thread = threading.get_ident()
        last = self.decoder.num_hidden_layers
        try:
            for layer in sorted(self.layers):
                if layer == 0:
                    module, register = self.decoder.layers[0], "pre"
                elif layer == last:
                    module, register = self.decoder.norm, "post"
                else:
                    module, register = self.decoder.layers[layer - 1], "post"
                self._handles.append(self._listen(module, register, layer))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _listen(self, module: nn.Module, where: str, layer: int):
        if where == "pre":
            # Torch notes a hook first and its with_kwargs a moment later: another thread that runs the module in between calls
            # it without them.
            def before(_, args, kwargs=None):
                if threading.get_ident() == self._thread:
                    self.on_state(layer, args[0] if args else kwargs["hidden_states"])

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_, args, output):
            if threading.get_ident() == self._thread:
                self.on_state(layer, output[0] if isinstance(output, tuple) else output)

        return module.register_forward_hook(after)


def collect_hidden_states(
    lm: nn.Module,
    layers: Collection[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prefix: Cache | None = None,
) -> list[torch.Tensor]:
    """Runs the backbone without its LM head, without gradients, and returns the states asked for, in that order.

    Args:
        lm: a causal LM, or a PEFT model around one.
        layers: state indices.
        input_ids (`[batch, tokens]`), attention_mask (`[batch, tokens]`, *optional*): moved to the backbone's device.
        prefix: from `prefill`; the tokens that it holds then come before every row, and their states are not returned.

    Returns:
        One tensor `[batch, tokens, hidden_size]` a layer, in the backbone's dtype.
    """
    decoder = find_decoder(lm)
    device = _input_device(decoder)
    input_ids = input_ids.to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    cached = {"use_cache": False}
    if prefix is not None:
        rows, width = len(input_ids), prefix.get_seq_length()
        cached = {"use_cache": True, "cache": repeat_cache(prefix, rows)}
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(rows, width), attention_mask], dim=1)
    states: dict[int, torch.Tensor] = {}
    with torch.no_grad(), Capture(decoder, states.__setitem__, layers):
        decoder.model(input_ids=input_ids, attention_mask=attention_mask, **cached)
    return [states[layer] for layer in layers]


def prefill(lm: nn.Module, ids: Sequence[int]) -> Cache:
    """Runs the backbone over tokens that many prompts begin with, and returns its cache, for one row."""
    decoder = find_decoder(lm)
    input_ids = torch.tensor([list(ids)], device=_input_device(decoder))
    with torch.no_grad():
        return decoder.model(input_ids=input_ids, use_cache=True).cache


def repeat_cache(prefix: Cache, rows: int) -> Cache:
    """A copy, for a batch of rows, of the cache that `prefill` gives for one."""
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(rows)
    return cache


def _input_device(decoder: Decoder) -> torch.device:
    device = next(decoder.model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
