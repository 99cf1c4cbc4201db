"""The paper's table 5 (arXiv 2601.13288) for the backbone, heads and device at hand.

Every system is timed in turn with the plain model, so that both run under the same load of the machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...backbone.loading import choose_device, model_id
from ...errors import ProbeError
from ...files import environment
from ...heads.configuration import ProbeConfig
from ...hub.resolve import Target
from ...serving.auto import AutoModelForProbedGeneration
from ...serving.sources import read_heads
from ..paper import serving_ratio
from .footprint import peak_memory
from .models import ModelPlan
from .operations import count_operations
from .options import BenchmarkOptions
from .serving_systems import MANY_KIND, Load, System, fresh_config, plain_system, systems
from .timing import Timing, clock_of, spread, time_pairs


_PAPER_TOKENS = 512  # longest prompt of the paper's table


@dataclass
class ServingBenchmark(BenchmarkOptions):
    """A benchmark with these options. It reads the configs of backbone and guards at once.

    Raises:
        ProbeError: a value is not allowed, or a config cannot be read.
    """

    clock: Callable[[], float] = field(init=False, repr=False)
    _device: torch.device = field(init=False, repr=False)
    _lm: ModelPlan = field(init=False, repr=False)
    _guards: list[ModelPlan] = field(init=False, repr=False)
    _fresh: dict[str, ProbeConfig] = field(init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        self._device = choose_device(self.device)
        self.clock = clock_of(self._device)
        longest, made = max(self.tokens), (self.dtype, self.random_weights)
        self._lm = ModelPlan.read(self.backbone, *made, longest + self.new_tokens)
        self._guards = [ModelPlan.read(name, *made, longest, guards=True) for name in self.guards]
        self._fresh = {kind: self._config(kind) for kind in {*self.kinds, *([MANY_KIND] if self.many else [])}}

    def _config(self, kind: str, **fields) -> ProbeConfig:
        return fresh_config(kind, self._lm.text_config.hidden_size, self._lm.text_config.num_hidden_layers, **fields)

    def execute(self) -> dict[str, Any]:
        """Measure time and memory of every system under every load.

        Returns:
            A JSON dict: `environment`, `settings`, `backbone` and `rows`, see `row`.
        """
        model = self._load()
        plain = model._without_probes()  # the same weights in the plain class
        if self.compile:
            for lm in (model, plain):
                lm.forward = torch.compile(lm.forward)
        drawn = (self.new_tokens, self._lm.text_config.vocab_size, self._device, model.probes.values())
        loads = [Load.create(batch, tokens, *drawn) for batch, tokens in product(self.batch_sizes, self.tokens)]
        base = plain_system(plain)
        alone = [self._memory(base, load) for load in loads]
        found: list[tuple[System, list[Measured]]] = []
        many = self._fresh.get(MANY_KIND)
        with tqdm(desc="systems", unit="system") as progress:
            for system in systems(model, plain, self.many, many, self.naive, self._guards):
                progress.set_postfix_str(system.name)
                measured = [self._measure(base, system, load) for load in loads]
                found.append((dataclasses.replace(system, serve=None), measured))
                del system  # frees the memory of a guard
                progress.update()
        rows = []
        for i, (load, memory) in enumerate(zip(loads, alone, strict=True)):
            times = [(first, first) for _, measured in found for first, _ in measured[i].pairs]
            base_measured = Measured(times, memory)
            for system, own in ((base, base_measured), *((system, measured[i]) for system, measured in found)):
                rows.append(row(system, load, own, base_measured))
        return {**self._facts(plain), "rows": rows}

    def count_operations(self, as_device: str | None = None) -> dict[str, Any]:
        """Count the dispatched operations of the plain model and of each system with heads.

        Each kind is counted twice: as a head of the prompt, and as a head that follows the reply.

        Args:
            as_device: `"cuda"` or `"cpu"`, whose choices are taken. Defaults to the device that the model runs on.

        Returns:
            A JSON dict: `environment`, `settings`, `backbone`, `as_device` and `rows`, see `operations.count_operations`.
        """
        model, as_device = self._load(), as_device or ("cpu" if self._device.type == "cpu" else "cuda")
        for kind in self.kinds:
            model.add_probe(f"{kind}-reply", self._config(kind, token_scope="response"))
        rows = count_operations(model, self.tokens, self.many, self._fresh.get(MANY_KIND), as_device)
        return {**self._facts(model._without_probes()), "as_device": as_device, "rows": rows}

    def _load(self) -> PreTrainedModel:
        """Load the backbone with its heads, after all that may be refused."""
        heads, text = {}, self._lm.text_config
        if self.probes:
            target = Target(model_id(self.backbone), text.hidden_size, text.num_hidden_layers)
            heads = read_heads(list(self.probes), target)
        names = [*heads, *self.kinds]
        if twice := [kind for kind in self.kinds if names.count(kind) > 1]:
            raise ProbeError(f"kind={twice[0]!r} names two heads: give each kind once, and no head the name of a kind")
        model = AutoModelForProbedGeneration.from_causal_lm(self._lm.load(self._device), heads)
        for kind in self.kinds:
            model.add_probe(kind, self._fresh[kind])
        return model

    def _measure(self, base: System, system: System, load: Load) -> Measured:
        if self.compile:
            torch._dynamo.reset()  # else a second length would be compiled for any length
            base.serve(load, None), system.serve(load, None)
        timed = time_pairs(partial(base.serve, load), partial(system.serve, load), self.pairs, self.warmup, self.clock)
        return Measured(timed, self._memory(system, load))

    def _memory(self, system: System, load: Load) -> int | None:
        if self.compile and self._device.type == "cpu":  # compiled code hides its tensors
            return None
        serve = partial(system.serve, load, None)
        serve()  # a first call may allocate what later calls keep
        return peak_memory(serve, self._device)

    def _facts(self, plain: PreTrainedModel) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else str(self._device)
        text = self._lm.text_config
        return {
            "environment": {**environment(), "device": device, "threads": torch.get_num_threads()},
            "settings": {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init},
            "backbone": {
                "name": Path(model_id(self.backbone)).name,
                "num_parameters": sum(parameter.numel() for parameter in plain.parameters()),
                "num_hidden_layers": text.num_hidden_layers,
                "hidden_size": text.hidden_size,
                "dtype": str(plain.dtype).removeprefix("torch."),
            },
        }


class Measured(NamedTuple):
    """Measurements of a system under one load: timings of the plain model and of the system, and the memory of a call.

    `memory` is in bytes at the peak, without weights; `None` if not known.
    """

    pairs: list[tuple[Timing, Timing]]
    memory: int | None


def row(system: System, load: Load, own: Measured, base: Measured) -> dict[str, Any]:
    """Return a line of the table as JSON values.

    Args:
        own: measurements of the system under the load. base: of the plain model alone.

    Returns:
        `ms` of the whole call and `step_ms` of each new token after the first: median and quartiles.
        `ratio` and `step_ratio`: median and quartiles of system over plain model, pair by pair.
        `above_base_mb`: peak memory above the plain model's, weights included. 1 MB is 1e6 bytes.
        `paper_ratio`: the paper's ratio. Values that are not known or not defined are `None`.
    """
    batch, tokens = load.input_ids.shape
    steps = [(first.seconds_a_step, second.seconds_a_step) for first, second in own.pairs]
    stepped, compared = steps[0][1] is not None, own is not base
    in_paper = batch == 1 and tokens <= _PAPER_TOKENS and load.new_tokens == 1
    return {
        "system": system.name,
        "batch_size": batch,
        "tokens": tokens,
        "new_tokens": load.new_tokens,
        "ms": spread(1000 * second.seconds for _, second in own.pairs),
        "step_ms": spread(1000 * second for _, second in steps) if stepped else None,
        "ratio": spread(second.seconds / first.seconds for first, second in own.pairs) if compared else None,
        "step_ratio": spread(second / first for first, second in steps) if compared and stepped else None,
        "above_base_mb": None if own.memory is None else (system.weight_bytes + own.memory - base.memory) / 1e6,
        "paper_ratio": serving_ratio(system.paper) if in_paper else None,
    }
