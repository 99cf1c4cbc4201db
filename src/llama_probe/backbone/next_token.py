"""The next-token logits of a frozen LM, computed from its last hidden state alone."""

from __future__ import annotations

import weakref
from math import prod

import torch
from torch import nn

from ..errors import ProbeError
from .capture import capturing, check_seen
from .decoder import find_decoder, without_peft


# Config fields with a factor of the logits (Cohere, Falcon-H1) or a divisor (Granite).
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
# Tokens of the forward pass of `check`.
_CHECK_TOKENS = 8


class NextToken:
    """The map from the last hidden state to the logits of the next token: output embeddings, factor and softcap.

    It asks the LM for its output embeddings at each call: an adapter or another size of the vocabulary replaces them. The
    reference to the LM is weak, because the LM contains the head that uses this map. If the LM is gone, its last known output
    embeddings remain.

    Raises:
        ProbeError: the LM has no output embeddings.
    """

    def __init__(self, lm: nn.Module):
        lm = without_peft(lm)
        config = lm.config.get_text_config(decoder=True)
        factors = (getattr(config, name, None) or 1.0 for name in _FACTORS)
        divisors = (getattr(config, name, None) or 1.0 for name in _DIVISORS)
        self.factor = prod(factors) / prod(divisors)
        # Gemma 2, arXiv 2408.00118, section 2: softcap * tanh(logits / softcap)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self._dtype = lm.dtype
        self._embeddings = lm.get_output_embeddings()
        self._lm = weakref.ref(lm)
        if self._embeddings is None:
            raise ProbeError(f"{type(lm).__name__} has no output embeddings: load it with AutoModelForCausalLM")

    @property
    def lm(self) -> nn.Module | None:
        """The LM without PEFT, or None if it is gone."""
        return self._lm()

    @property
    def embeddings(self) -> nn.Module:
        """The LM's output embeddings."""
        lm = self.lm
        return self._embeddings if lm is None else lm.get_output_embeddings()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map last hidden states `[rows, D]` to fp32 logits `[rows, vocab_size]`, on the output embeddings' device."""
        embeddings = self.embeddings
        weight = next(embeddings.parameters(), None)
        device = hidden.device if weight is None or weight.is_meta else weight.device
        dtype = getattr(getattr(embeddings, "weight", None), "dtype", None)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize == 1:
            dtype = self._dtype  # quantized weights have a dtype for storage
        logits = embeddings(hidden.to(device, dtype)).float() * self.factor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def check(self) -> None:
        """Run the LM over a few tokens and compare its logits. Models with offloaded weights are not checked.

        Raises:
            ProbeError: the LM does more to its logits than this map.
        """
        lm = self.lm
        if any(parameter.is_meta for parameter in lm.parameters()):
            return
        decoder = find_decoder(lm)
        last = decoder.num_hidden_layers
        vocab_size = lm.config.get_text_config(decoder=True).vocab_size
        ids = torch.arange(1, _CHECK_TOKENS + 1, device=decoder.input_device)[None] % vocab_size
        states: dict[int, torch.Tensor] = {}
        # The plain class's forward does not run attached heads.
        forward = getattr(type(lm), "_causal_lm_class", type(lm)).forward
        with capturing(decoder, states.__setitem__, [last]):
            expected = forward(lm, input_ids=ids, use_cache=False).logits[0, -1].float()
        check_seen([last], states)
        found = self(states[last][0, -1:])[0].to(expected.device)
        # 2 % of the largest logit: above the rounding of bf16, far below any unknown factor.
        if found.shape != expected.shape or (found - expected).abs().max() > 0.02 * expected.abs().max():
            known = ", ".join((*_FACTORS, *_DIVISORS, "final_logit_softcapping"))
            raise ProbeError(f"{type(lm).__name__} changes its logits by more than {known}: use another probe_type")
