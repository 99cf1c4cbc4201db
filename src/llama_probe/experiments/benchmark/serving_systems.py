"""Ways to serve a language model and to label its prompts, each as a call that can be timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria

from ...errors import ProbeError
from ...heads import get_probe_type
from ...heads.configuration import ProbeConfig
from ...heads.probe import ProbeModel
from ...heads.scope import token_mask
from .guard_pipeline import Guard, GuardPlan
from .random_weights import held_bytes


BASE, AGAIN = "base", "base again"
MANY_KIND = "mha"


@dataclass(frozen=True)
class Load:
    """What is served at once: prompts of random tokens, each of the same length.

    Attributes:
        input_ids, attention_mask (`[batch, tokens]`): on the device.
        new_tokens: that each prompt gets, no more and no fewer.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    new_tokens: int

    @classmethod
    def create(cls, batch_size: int, tokens: int, new_tokens: int, vocab_size: int, device: torch.device) -> Load:
        """The same prompts in every run."""
        generator = torch.Generator().manual_seed(1000 * batch_size + tokens)
        ids = torch.randint(vocab_size, (batch_size, tokens), generator=generator).to(device)
        return cls(ids, torch.ones_like(ids), new_tokens)


# Is called after each new token.
Token = Callable[[], None]


@dataclass(frozen=True)
class System:
    """A way to serve.

    Attributes:
        name: in the table. kind: `"base"`, `"heads"`, `"naive"` or `"guard"`.
        serve: takes a `Load`, and a `Token` or `None`.
        weight_bytes: of the weights that it has beside the plain model's.
        paper: what stands beside it in the paper.
    """

    name: str
    kind: str
    serve: Callable[[Load, Token | None], Any]
    weight_bytes: int = 0
    paper: str | None = None


def plain_system(plain: PreTrainedModel, name: str = BASE) -> System:
    """The language model alone."""
    return System(name, "base", partial(generate, plain, return_dict_in_generate=False))


def systems(
    model: PreTrainedModel,
    plain: PreTrainedModel,
    many: int = 0,
    many_config: ProbeConfig | None = None,
    naive: bool = False,
    guards: Sequence[GuardPlan] = (),
) -> Iterator[System]:
    """The plain model once more, each attached head, many heads at once, each head naively, and guards.

    A guard is loaded when its turn comes, and given up when the next system is asked for; keep no system longer.

    Args:
        model: with its heads. plain: the same model without them, `model._without_probes()`.
        many: so many heads of `many_config` at once; 0 leaves them out. naive: leaves the naive ones out where false;
            heads that read replies have no such way, since it scores the prompt alone.
    """
    yield plain_system(plain, AGAIN)
    heads = dict(model.probes.items())
    for name, head in heads.items():
        kind = head.config.probe_type
        yield System(name, "heads", partial(_serve_with, model, [name]), held_bytes([head]), kind)
    if many:
        kind = many_config.probe_type
        names = [f"{kind}-{number}-of-{many}" for number in range(1, many + 1)]
        weights = held_bytes([model.add_probe(name, many_config) for name in names])
        yield System(f"{many} x {kind}", "heads", partial(_serve_with, model, names), weights)
        for name in names:
            model.delete_probe(name)
    if naive:
        for name, head in heads.items():
            if not head.config.reads_reply:
                yield System(f"naive {name}", "naive", partial(_serve_naively, plain, head), held_bytes([head]))
    for plan in guards:
        guard = plan.load(plain.device)
        serve = partial(_serve_guarded, plain, guard)
        yield System(f"guard {plan.title}", "guard", serve, held_bytes([guard.model]), plan.paper)
        del guard, serve
        gc.collect()
        if plain.device.type == "cuda":
            torch.cuda.empty_cache()


def generate(model: PreTrainedModel, load: Load, token: Token | None = None, **kwargs) -> Any:
    """Greedy generation of just the new tokens that the load asks for."""
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
    """Stops nothing, but hears of every new token."""

    def __init__(self, token: Token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        self.token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _serve_with(model: PreTrainedModel, names: list[str], load: Load, token: Token | None = None) -> Any:
    """Heads in the pass that starts generation."""
    model.set_active_probes(names)
    return generate(model, load, token)


def _serve_naively(plain: PreTrainedModel, head: ProbeModel, load: Load, token: Token | None = None) -> Any:
    """The plain model returns all states, and the head reads them afterwards."""
    out = generate(plain, load, token, output_hidden_states=True, return_dict_in_generate=True)
    with torch.no_grad():
        mask = token_mask(head.config, load.input_ids, load.attention_mask)
        return out, head(hidden_states=out.hidden_states[0], attention_mask=mask)


def _serve_guarded(plain: PreTrainedModel, guard: Guard, load: Load, token: Token | None = None) -> Any:
    """The guard first, then the plain model."""
    answer = guard.ask(load.input_ids, load.attention_mask)
    return answer, generate(plain, load, token, return_dict_in_generate=False)


def fresh_config(kind: str, hidden_size: int, num_hidden_layers: int) -> ProbeConfig:
    """A head of a kind that fits a backbone, with a downcast of 32 as in the paper, or the next smaller one that divides.

    Raises:
        ProbeError: there is no such kind.
    """
    get_probe_type(kind)
    refused = None
    for downcast, heads in product((32, 16, 8, 4, 2, 1), (2, 3, 1)):
        try:
            return ProbeConfig(
                probe_type=kind,
                downcast=downcast,
                num_attention_heads=heads,
                hidden_size=hidden_size,
                num_hidden_layers=num_hidden_layers,
            )
        except ProbeError as error:
            refused = error
    raise refused
