"""The paper's table 5 (arXiv 2601.13288) for the backbone, heads and device at hand.

Every system is timed in turn with the plain model, so that both run under the same load of the machine.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

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
from .measure import Timing, peak_memory, spread, time_pairs
from .models import ModelPlan
from .operations import count_operations
from .options import BenchmarkOptions
from .serving_systems import BASE, Load, System, fresh_config, plain_system, systems


_PAPER_TOKENS = 512  # longest prompt of the paper's table


class ServingBenchmark:
    """A benchmark. It reads the configs of backbone and guards at once, and no weights.

    Raises:
        ProbeError: a config cannot be read, or does not fit the options.
    """

    def __init__(self, options: BenchmarkOptions):
        self.options, self.device = options, choose_device(options.device)
        longest, made = max(options.tokens), (options.dtype, options.random_weights)
        self.lm = ModelPlan.read(options.backbone, *made, longest + options.new_tokens)
        self.guards = [ModelPlan.read(name, *made, longest, guards=True) for name in options.guards]
        self.fresh = {kind: self._config(kind) for kind in options.kinds}

    def _config(self, kind: str, **fields) -> ProbeConfig:
        return fresh_config(kind, self.lm.text_config.hidden_size, self.lm.text_config.num_hidden_layers, **fields)

    def execute(self) -> dict[str, Any]:
        """Measure time and memory of every system under every load.

        Returns:
            A JSON dict: `environment`, `settings`, `backbone` and `rows`, see `row`.
        """
        options, model = self.options, self._load()
        plain = model._without_probes()  # the same weights in the plain class
        if options.compile:
            for lm in (model, plain):
                lm.forward = torch.compile(lm.forward)
        drawn = (options.new_tokens, self.lm.text_config.vocab_size, self.device, model.probes.values())
        loads = [Load.create(batch, tokens, *drawn) for batch, tokens in product(options.batch_sizes, options.tokens)]
        base = plain_system(plain)
        base_memory = [self._memory(base, load) for load in loads]
        rows: list[list[dict[str, Any]]] = [[] for _ in loads]
        base_times: list[list[Timing]] = [[] for _ in loads]
        with tqdm(desc="systems", unit="system") as progress:
            for system in systems(model, plain, options.many, options.naive, self.guards):
                progress.set_postfix_str(system.name)
                for i, load in enumerate(loads):
                    pairs = self._time(base, system, load)
                    base_times[i] += [first for first, _ in pairs]
                    memory = self._memory(system, load)
                    rows[i].append(row(system, load, pairs, None if memory is None else memory - base_memory[i]))
                del system  # frees the memory of a guard
                progress.update()
        for i, load in enumerate(loads):
            times = [(timing, timing) for timing in base_times[i]]
            rows[i].insert(0, row(base, load, times, None if base_memory[i] is None else 0))
        return {**self._facts(plain), "rows": [found for each in rows for found in each]}

    def count_operations(self, as_device: str | None = None) -> dict[str, Any]:
        """Count the dispatched operations of the plain model and of each system with heads.

        Each kind is counted twice: as a head of the prompt, and as a head that follows the reply.

        Args:
            as_device: `"cuda"` or `"cpu"`, whose choices are taken. Defaults to the device that the model runs on.

        Returns:
            A JSON dict: `environment`, `settings`, `backbone`, `as_device` and `rows`, see `operations.count_operations`.
        """
        model, as_device = self._load(), as_device or ("cpu" if self.device.type == "cpu" else "cuda")
        for kind in self.fresh:
            model.add_probe(f"{kind}-reply", self._config(kind, token_scope="response"))
        rows = count_operations(model, self.options.tokens, self.options.many, as_device)
        return {**self._facts(model._without_probes()), "as_device": as_device, "rows": rows}

    def _load(self) -> PreTrainedModel:
        """Load the backbone with its heads, after all that may be refused."""
        heads, options, text = {}, self.options, self.lm.text_config
        if options.probes:
            target = Target(model_id(options.backbone), text.hidden_size, text.num_hidden_layers)
            heads = read_heads(list(options.probes), target)
        names = [*heads, *options.kinds]
        if twice := [kind for kind in options.kinds if names.count(kind) > 1]:
            raise ProbeError(f"kind={twice[0]!r} names two heads: give each kind once, and no head the name of a kind")
        model = AutoModelForProbedGeneration.from_causal_lm(self.lm.load(self.device), heads)
        for kind, config in self.fresh.items():
            model.add_probe(kind, config)
        return model

    def _time(self, base: System, system: System, load: Load) -> list[tuple[Timing, Timing]]:
        if self.options.compile:
            torch._dynamo.reset()  # else a second length would be compiled for any length
            base.serve(load, None), system.serve(load, None)
        both = partial(base.serve, load), partial(system.serve, load)
        return time_pairs(*both, self.options.pairs, self.options.warmup, self.device)

    def _memory(self, system: System, load: Load) -> int | None:
        if self.options.compile and self.device.type == "cpu":  # compiled code hides its tensors
            return None
        serve = partial(system.serve, load, None)
        serve()  # a first call may allocate what later calls keep
        return peak_memory(serve, self.device)

    def _facts(self, plain: PreTrainedModel) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        text = self.lm.text_config
        return {
            "environment": {**environment(), "device": device, "threads": torch.get_num_threads()},
            "settings": vars(self.options),
            "backbone": {
                "name": Path(model_id(self.options.backbone)).name,
                "num_parameters": plain.num_parameters(),
                "num_hidden_layers": text.num_hidden_layers,
                "hidden_size": text.hidden_size,
                "dtype": str(plain.dtype).removeprefix("torch."),
            },
        }


def row(system: System, load: Load, pairs: list[tuple[Timing, Timing]], memory: int | None) -> dict[str, Any]:
    """Return a line of the table as JSON values.

    Args:
        pairs: timings of the plain model and of the system.
        memory: bytes of a call at the peak, without weights, above the plain model's; `None` if not known.

    Returns:
        `ms` of the whole call and `step_ms` of each new token after the first: median and quartiles.
        `ratio` and `step_ratio`: median and quartiles of system over plain model, pair by pair.
        `above_base_mb`: peak memory above the plain model's, weights included. 1 MB is 1e6 bytes.
        `paper_ratio`: the paper's ratio. Values that are not known or not defined are `None`.
    """
    batch, tokens = load.input_ids.shape
    steps = [(first.seconds_a_step, second.seconds_a_step) for first, second in pairs]
    stepped, compared = steps[0][1] is not None, system.name != BASE
    in_paper = batch == 1 and tokens <= _PAPER_TOKENS and load.new_tokens == 1
    return {
        "system": system.name,
        "batch_size": batch,
        "tokens": tokens,
        "new_tokens": load.new_tokens,
        "ms": spread(1000 * second.seconds for _, second in pairs),
        "step_ms": spread(1000 * second for _, second in steps) if stepped else None,
        "ratio": spread(second.seconds / first.seconds for first, second in pairs) if compared else None,
        "step_ratio": spread(second / first for first, second in steps) if compared and stepped else None,
        "above_base_mb": None if memory is None else (system.weight_bytes + memory) / 1e6,
        "paper_ratio": serving_ratio(system.paper) if in_paper else None,
    }
