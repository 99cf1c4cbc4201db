"""The next-token logits of a frozen LM, from its final state alone: what its output embeddings make of it."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from ..errors import ProbeError
from .capture import Capture, check_seen
from .decoder import find_decoder, without_peft


# Names under which the configs of known families keep a factor of the logits (Cohere, Falcon-H1) or a divisor (Granite).
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
_TOKENS = 8


class NextToken:
    """The map from the final state to the logits of the next token.

    It follows the LM: where that gets other output embeddings (an adapter on them, another size), these count from then on.
    The LM is held weakly, so that a head neither contains it nor keeps it; its output embeddings stay where it is gone. A copy
    or a pickle has neither until it is told whom to `follow`.

    Args:
        lm: a causal LM, not inside a PEFT model.
        factor: of the logits.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118, section 2); `None` for none.
    """

    def __init__(self, lm: nn.Module, factor: float = 1.0, softcap: float | None = None):
        self.factor, self.softcap = factor, softcap
        self._embeddings: nn.Module | None = None
        self._dtype = lm.dtype
        self.follow(lm)

    def follow(self, lm: nn.Module) -> None:
        """Takes the output embeddings of this LM from now on."""
        self._lm: weakref.ref[nn.Module] | None = weakref.ref(lm)

    def release(self) -> None:
        """Follows the LM no more, and goes on with the output embeddings that it has."""
        self._embeddings, self._lm = self.embeddings, None

    def __getstate__(self):
        return {**self.__dict__, "_lm": None, "_embeddings": None}

    @property
    def lm(self) -> nn.Module | None:
        """The LM that is followed; `None` where none is, or it is gone."""
        return None if self._lm is None else self._lm()

    @property
    def embeddings(self) -> nn.Module | None:
        """The LM's output embeddings (`lm_head`), shared with it; `None` in a copy that follows none yet."""
        lm = self.lm
        if lm is not None:
            self._embeddings = lm.get_output_embeddings()
        return self._embeddings

    def is_free_for(self, lm: nn.Module) -> bool:
        """Whether it can be given up for this LM: it follows the same one, or none that is still there."""
        embeddings = without_peft(lm).get_output_embeddings()
        if self.lm is None or self.embeddings is embeddings:
            return True
        gc.collect()  # an LM that nobody has any more may still be there in a cycle
        return self.lm is None

    @classmethod
    def of(cls, lm: nn.Module) -> NextToken:
        """That of a causal LM, also inside a PEFT model. The LM runs over a few tokens to prove that it is so.

        Raises:
            ProbeError: the LM has no output embeddings, or does more to its logits than is known here.
        """
        base = without_peft(lm)
        embeddings = base.get_output_embeddings()
        if embeddings is None:
            raise ProbeError(
                f"{type(base).__name__} has no output embeddings: load the LM with its head, as AutoModelForCausalLM does"
            )
        config = base.config.get_text_config(decoder=True)
        factor = 1.0
        for name in _FACTORS:
            factor *= getattr(config, name, None) or 1.0
        for name in _DIVISORS:
            factor /= getattr(config, name, None) or 1.0
        found = cls(base, factor, getattr(config, "final_logit_softcapping", None))
        if not any(parameter.is_meta for parameter in base.parameters()):  # not with weights read from disk for it
            found._check(base)
        return found

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final states `[rows, hidden_size]` to fp32 logits `[rows, vocab_size]`, on the output embeddings' device."""
        embeddings = self.embeddings
        weight = next(embeddings.parameters(), None)
        device = hidden.device if weight is None or weight.is_meta else weight.device
        dtype = getattr(getattr(embeddings, "weight", None), "dtype", None)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize == 1:
            dtype = self._dtype  # quantised weights are no numbers to compute in
        logits = embeddings(hidden.to(device, dtype)).float() * self.factor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def _check(self, base: nn.Module) -> None:
        decoder = find_decoder(base)
        device = base.get_input_embeddings().weight.device
        ids = torch.arange(1, _TOKENS + 1, device=device)[None] % base.config.get_text_config(decoder=True).vocab_size
        states: dict[int, torch.Tensor] = {}
        # The plain class's forward: heads that are attached already do not run.
        forward = getattr(type(base), "_causal_lm_class", type(base)).forward
        with Capture(decoder, states.__setitem__, [decoder.num_hidden_layers]):
            expected = forward(base, input_ids=ids, use_cache=False).logits[0, -1].float()
        check_seen([decoder.num_hidden_layers], states)
        found = self(states[decoder.num_hidden_layers][0, -1:])[0].to(expected.device)
        # 2 % of the largest: above the rounding of bf16, far below any factor that was missed
        if found.shape != expected.shape or (found - expected).abs().max() > 0.02 * expected.abs().max():
            raise ProbeError(
                f"the next-token logits of {type(base).__name__} are not what its output embeddings make of its final "
                f"state; known are these, times {' or '.join(_FACTORS)} or over {_DIVISORS[0]}, and "
                "final_logit_softcapping. Use another kind of head with this LM"
            )
