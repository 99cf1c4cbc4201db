"""Ways to serve a language model and to label its prompts, each as a call that can be timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria

from ...backbone.decoder import find_decoder
from ...errors import ProbeError
from ...heads.configuration import ProbeConfig
from ...heads.probe import ProbeModel
from ...heads.scope import token_mask
from .measure import Token
from .models import ModelPlan, ask_guard, held_bytes


BASE, AGAIN = "base", "base again"
MANY_KIND = "mha"


@dataclass(frozen=True)
class Load:
    """Prompts of random tokens that are served as one batch, all of the same length.

    Attributes:
        input_ids, attention_mask (`[B, T]`): on the device.
        new_tokens: exact number of tokens that each prompt gets.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    new_tokens: int

    @classmethod
    def create(
        cls,
        batch_size: int,
        tokens: int,
        new_tokens: int,
        vocab_size: int,
        device: torch.device,
        heads: Iterable[ProbeModel] = (),
    ) -> Load:
        """Draw prompts, the same ones in every run. They begin as a user's turn if one of the heads looks for it."""
        generator = torch.Generator().manual_seed(1000 * batch_size + tokens)
        ids = torch.randint(vocab_size, (batch_size, tokens), generator=generator).to(device)
        for config in (head.config for head in heads):
            if config.turn_markers is not None:
                opening = config.turn_markers["user"]["ids"][:tokens]
                ids[:, : len(opening)] = torch.tensor(opening)
        return cls(ids, torch.ones_like(ids), new_tokens)


@dataclass(frozen=True)
class System:
    """A way to serve.

    Attributes:
        name: its name in the table.
        serve: a function of a `Load` and of a `Token` or `None`.
        weight_bytes: bytes of the weights that it adds to the plain model.
        paper: its name in `paper.SERVING`, if it is there.
    """

    name: str
    serve: Callable[[Load, Token | None], Any]
    weight_bytes: int = 0
    paper: str | None = None


def plain_system(plain: PreTrainedModel, name: str = BASE) -> System:
    """Return the language model alone."""
    return System(name, partial(generate, plain, return_dict_in_generate=False))


def systems(
    model: PreTrainedModel,
    plain: PreTrainedModel,
    many: int = 0,
    naive: bool = False,
    guards: Sequence[ModelPlan] = (),
) -> Iterator[System]:
    """Yield the plain model once more, each attached head, many heads at once, each head naively, and the guards.

    A guard is loaded when its turn comes and freed when the next system is asked for: keep no system longer.

    Args:
        model, plain: the model with its heads, and the same model without them.
        many: number of fresh heads of `MANY_KIND` that run at once.
        naive: also run each head on all hidden states after the pass. Heads that read replies have no such way.
    """
    yield plain_system(plain, AGAIN)
    heads = dict(model.probes.items())
    for name, head in heads.items():
        yield System(name, partial(_serve_with, model, [name]), held_bytes([head]), head.config.probe_type)
    if many:
        names = [f"{MANY_KIND}-{number}-of-{many}" for number in range(1, many + 1)]
        decoder = find_decoder(model)
        config = fresh_config(MANY_KIND, decoder.hidden_size, decoder.num_hidden_layers)
        weights = held_bytes([model.add_probe(name, config) for name in names])
        yield System(f"{many} x {MANY_KIND}", partial(_serve_with, model, names), weights)
        for name in names:
            model.delete_probe(name)
    for name, head in heads.items() if naive else ():
        if not head.config.reads_reply:
            yield System(f"naive {name}", partial(_serve_naively, plain, head), held_bytes([head]))
    for plan in guards:
        guard = plan.load(plain.device)
        serve = partial(_serve_guarded, plain, guard)
        paper = plan.name if plan.random_weights else None
        yield System(f"guard {Path(plan.name).name}", serve, held_bytes([guard]), paper)
        del guard, serve
        gc.collect()
        if plain.device.type == "cuda":
            torch.cuda.empty_cache()


def generate(model: PreTrainedModel, load: Load, token: Token | None = None, **kwargs) -> Any:
    """Generate greedily, exactly as many tokens as the load asks for."""
    if load.new_tokens > 1:
        kwargs["min_new_tokens"] = load.new_tokens
        if token is not None:
            kwargs["stopping_criteria"] = [_TokenMarks(token)]
    return model.generate(
        load.input_ids,
        attention_mask=load.attention_mask,
        max_new_tokens=load.new_tokens,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )


class _TokenMarks(StoppingCriteria):
    """A criterion that never stops and reports every new token."""

    def __init__(self, token: Token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        self.token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _serve_with(model: PreTrainedModel, names: list[str], load: Load, token: Token | None) -> Any:
    model.set_active_probes(names)
    return generate(model, load, token)


def _serve_naively(plain: PreTrainedModel, head: ProbeModel, load: Load, token: Token | None) -> Any:
    out = generate(plain, load, token, output_hidden_states=True, return_dict_in_generate=True)
    with torch.no_grad():
        mask = token_mask(head.config, load.input_ids, load.attention_mask)
        return out, head(hidden_states=out.hidden_states[0], attention_mask=mask)


def _serve_guarded(plain: PreTrainedModel, guard: PreTrainedModel, load: Load, token: Token | None) -> Any:
    answer = ask_guard(guard, load.input_ids, load.attention_mask)
    return answer, generate(plain, load, token, return_dict_in_generate=False)


def fresh_config(kind: str, hidden_size: int, num_hidden_layers: int, **fields) -> ProbeConfig:
    """Return the config of a new head, with the paper's downcast of 32 or the next smaller one that fits the backbone."""
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    for downcast, heads in product((32, 16, 8, 4, 2, 1), (2, 3, 1)):
        try:
            return ProbeConfig(probe_type=kind, downcast=downcast, num_attention_heads=heads, **sizes, **fields)
        except ProbeError as error:
            refused = error
    raise refused
