"""`llama-probe benchmark`: what heads cost while a model serves, beside other ways to the same labels.

The paper's table 5 (arXiv 2601.13288) for the backbone, heads and device at hand. Every system is timed in turn with the
plain model, so that what is compared ran under the same load of the machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...backbone.loading import choose_device, load_backbone, model_id
from ...errors import ProbeError
from ...files import environment
from ...heads.configuration import ProbeConfig
from ...heads.probe import ProbeModel
from ...hub.resolve import Target
from ...serving.auto import AutoModelForProbedGeneration
from ...serving.sources import read_heads
from ..paper import serving_ratio
from .footprint import operations, peak_memory
from .guard_pipeline import GuardPlan
from .random_weights import (
    check_fits,
    check_length,
    held_bytes,
    model_dtype,
    random_model,
    read_model_config,
    weight_bytes,
)
from .serving_systems import MANY_KIND, Load, System, fresh_config, plain_system, systems
from .timing import Timing, Watch, latency, spread, time_pairs


KINDS = ("pooling", "gate", "mha")
_PAPER_TOKENS = 512  # at most so many are in a prompt of the paper's table


@dataclass
class ServingBenchmark:
    """What is to be measured.

    Attributes:
        backbone: `"demo"`, a folder or a Hub id; with `random_weights` also a built-in shape.
        probes: heads. kinds: of heads with fresh weights; `KINDS` where left out and there are no probes.
        many: so many heads of `MANY_KIND` at once; 0 leaves them out.
        tokens, batch_sizes: every combination is measured. new_tokens: that are generated.
        pairs: timed runs of each system, and as many of the plain model in turn with them. warmup: untimed pairs before.
        device: see `choose_device`. dtype: of backbone and guards.
        naive: also measure each head on the tensors that `output_hidden_states=True` returns.
        guards: models that read the prompt before the plain model does; see `GuardPlan.read`.
        random_weights: make the weights of backbone and guards instead of loading them; the times are the same.
        compile: the backbone by `torch.compile`, with heads and without. Guards are not.

    Raises:
        ProbeError: a value is not allowed, or a config cannot be read.
    """

    backbone: str = "demo"
    probes: Sequence[str] = ()
    kinds: Sequence[str] | None = None
    many: int = 8
    tokens: Sequence[int] = (64, 512)
    batch_sizes: Sequence[int] = (1,)
    new_tokens: int = 1
    pairs: int = 9
    warmup: int = 2
    device: str = "auto"
    dtype: str = "auto"
    naive: bool = True
    guards: Sequence[str] = ()
    random_weights: bool = False
    compile: bool = False
    watch: Watch = field(init=False, repr=False)
    _device: torch.device = field(init=False, repr=False)
    _config: PreTrainedConfig = field(init=False, repr=False)
    _fresh: dict[str, ProbeConfig] = field(init=False, repr=False)
    _plans: list[GuardPlan] = field(init=False, repr=False)

    def __post_init__(self):
        if self.kinds is None:
            self.kinds = () if self.probes else KINDS
        for name, least in (("many", 0), ("new_tokens", 1), ("pairs", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ProbeError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("tokens", "batch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise ProbeError(f"{name}={list(values)} must be numbers from 1 on, each once, and at least one")
        for name in ("kinds", "guards"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ProbeError(f"{name}={', '.join(values)} must name each once")
        self._device = choose_device(self.device)
        self.watch = Watch(self._device)
        self._config = read_model_config(self.backbone, self.random_weights)
        model_dtype(self._config, self.dtype)
        check_length(self.backbone, self._config, max(self.tokens) + self.new_tokens)
        kinds = dict.fromkeys([*self.kinds, *([MANY_KIND] if self.many else [])])
        text = self._text_config
        self._fresh = {kind: fresh_config(kind, text.hidden_size, text.num_hidden_layers) for kind in kinds}
        self._plans = [GuardPlan.read(name, self.dtype, self.random_weights) for name in self.guards]
        for plan in self._plans:
            check_length(plan.name, plan.config, max(self.tokens))

    @property
    def _text_config(self) -> PreTrainedConfig:
        return self._config.get_text_config(decoder=True)

    def execute(self) -> dict[str, Any]:
        """Measures everything.

        Returns:
            A dict that JSON takes: `environment`, `settings`, `backbone` and `rows`; see `row`.

        Raises:
            ProbeError: a head or a guard cannot be read, or heads or memory do not fit. Nothing is measured then, unless
                it is the weights of a guard that cannot be read.
        """
        heads = self._read_heads()
        self._check_memory()
        model = self._load(heads)
        plain = model._without_probes()  # its weights, and nothing of this package's code
        if self.compile:
            for lm in (model, plain):
                lm.forward = torch.compile(lm.forward)
        loads = [
            Load.create(batch, tokens, self.new_tokens, self._text_config.vocab_size, self._device)
            for batch, tokens in product(self.batch_sizes, self.tokens)
        ]
        base = plain_system(plain)
        alone = [self._footprint(base, load) for load in loads]
        found: list[tuple[System, list[Measured]]] = []
        with tqdm(total=self._count(model) * len(loads), desc="systems x loads", unit="run") as progress:
            many = self._fresh.get(MANY_KIND)
            for system in systems(model, plain, self.many, many, self.naive, self._plans):
                progress.set_postfix_str(system.name)
                measured = [self._measure(base, system, load, progress) for load in loads]
                found.append((dataclasses.replace(system, serve=None), measured))
                del system  # and with it a guard, whose memory the next one wants
        rows = []
        for i, (load, footprint) in enumerate(zip(loads, alone, strict=True)):
            times = [(first, first) for _, measured in found for first, _ in measured[i].pairs]
            base_measured = Measured(times, *footprint)
            for system, own in ((base, base_measured), *((system, measured[i]) for system, measured in found)):
                rows.append(row(system, load, own, base_measured, held_bytes([plain])))
        return {
            "environment": {**environment(), "device": self._device_name(), "threads": torch.get_num_threads()},
            "settings": self._settings(),
            "backbone": self._describe(plain),
            "rows": rows,
        }

    def _read_heads(self) -> dict[str, ProbeModel]:
        if not self.probes:
            return {}
        text = self._text_config
        target = Target(model_id(self.backbone), text.hidden_size, text.num_hidden_layers)
        heads = read_heads(list(self.probes), target)
        if taken := sorted(set(heads) & set(self.kinds)):
            raise ProbeError(
                f"a head is called {taken[0]!r}, as the kind is: rename its folder, or leave out the kind"
            )
        return heads

    def _check_memory(self) -> None:
        dtype = model_dtype(self._config, self.dtype)
        weights = {self.backbone: weight_bytes(AutoModelForCausalLM, self._config, dtype)}
        if self._plans:  # one at a time is loaded
            largest = max(self._plans, key=lambda plan: plan.weight_bytes)
            weights[f"the guard {largest.name}"] = largest.weight_bytes
        check_fits(weights, self._device)

    def _load(self, heads: dict[str, ProbeModel]) -> PreTrainedModel:
        if self.random_weights:
            dtype = model_dtype(self._config, self.dtype)
            lm = random_model(AutoModelForCausalLM, self._config, dtype, self._device)
        else:
            lm, _ = load_backbone(self.backbone, self.dtype, self._device)
        model = AutoModelForProbedGeneration.from_causal_lm(lm, heads)
        for kind in self.kinds:
            model.add_probe(kind, self._fresh[kind])
        return model

    def _count(self, model: PreTrainedModel) -> int:
        naive = sum(not head.config.reads_reply for head in model.probes.values()) if self.naive else 0
        return 1 + len(model.probes) + bool(self.many) + naive + len(self._plans)

    def _measure(self, base: System, system: System, load: Load, progress: tqdm) -> Measured:
        if self.compile:
            torch._dynamo.reset()  # what has run over one load would run over the next for prompts of any length
            base.serve(load, None), system.serve(load, None)
        timed = time_pairs(partial(base.serve, load), partial(system.serve, load), self.pairs, self.warmup, self.watch)
        measured = Measured(timed, *self._footprint(system, load))
        progress.update()
        return measured

    def _footprint(self, system: System, load: Load) -> tuple[int | None, int]:
        serve = partial(system.serve, load, None)
        # Tensors that compiled code makes for itself on a CPU are not heard of, nor its operations anywhere.
        unheard = self.compile and self._device.type == "cpu"
        with torch.compiler.set_stance("force_eager" if unheard else "default"):
            serve()  # what a first call makes and keeps is none of its footprint
            memory = None if unheard else peak_memory(serve, self._device)
        with torch.compiler.set_stance("force_eager"):
            return memory, operations(serve)

    def _settings(self) -> dict[str, Any]:
        """As they were given, without the folders of this machine that models and heads lie in."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init}

        def shown(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return [shown(part) for part in value]
            return Path(value).name if isinstance(value, str) and Path(value).is_dir() else value

        return {name: shown(value) for name, value in values.items()}

    def _describe(self, plain: PreTrainedModel) -> dict[str, Any]:
        return {
            "name": model_id(self.backbone).rstrip("/").split("/")[-1],
            "num_parameters": sum(parameter.numel() for parameter in plain.parameters()),
            "num_hidden_layers": self._text_config.num_hidden_layers,
            "hidden_size": self._text_config.hidden_size,
            "dtype": str(plain.dtype).removeprefix("torch."),
        }

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else str(self._device)


@dataclass(frozen=True)
class Measured:
    """A system under one load.

    Attributes:
        pairs: timings of the plain model and of the system.
        memory: bytes at the peak of a call, without weights; `None` where it is not known. operations: of a call.
    """

    pairs: list[tuple[Timing, Timing]]
    memory: int | None
    operations: int


def row(system: System, load: Load, own: Measured, base: Measured, model_bytes: int) -> dict[str, Any]:
    """A line of the table.

    Args:
        system: what was measured under the load. own: what came out. base: the plain model alone, under the same load.
        model_bytes: of the plain model's weights.

    Returns:
        `latency_ms` of the whole call and `step_ms` of each new token after the first (median and 95th percentile);
        `prompts_per_second` and `tokens_per_second` (prompt and new ones), from the median; `ratio` and `step_ratio`:
        median and quartiles of system over plain model, pair by pair; `operations` and `operations_ratio`; `weights_mb`
        beside the plain model's, `peak_memory_mb` with all weights, and how much of it is above the plain model's,
        `above_base_mb` (1 MB is 1e6 bytes); and `paper_ratio`. What is not known, or not defined, is `None`.
    """
    batch, tokens = load.input_ids.shape
    found = latency(second.seconds for _, second in own.pairs)
    steps = [(first.seconds_a_step, second.seconds_a_step) for first, second in own.pairs]
    stepped, compared = steps[0][1] is not None, own is not base
    in_paper = batch == 1 and tokens <= _PAPER_TOKENS and load.new_tokens == 1 and system.paper is not None
    return {
        "system": system.name,
        "kind": system.kind,
        "batch_size": batch,
        "tokens": tokens,
        "new_tokens": load.new_tokens,
        "latency_ms": found,
        "step_ms": latency(second for _, second in steps) if stepped else None,
        "prompts_per_second": 1000 * batch / found["median"],
        "tokens_per_second": 1000 * batch * (tokens + load.new_tokens) / found["median"],
        "ratio": spread(second.seconds / first.seconds for first, second in own.pairs) if compared else None,
        "step_ratio": spread(second / first for first, second in steps) if compared and stepped else None,
        "operations": own.operations,
        "operations_ratio": own.operations / base.operations,
        "weights_mb": system.weight_bytes / 1e6,
        "peak_memory_mb": None if own.memory is None else (model_bytes + system.weight_bytes + own.memory) / 1e6,
        "above_base_mb": None if own.memory is None else (system.weight_bytes + own.memory - base.memory) / 1e6,
        "paper_ratio": serving_ratio(system.paper) if in_paper else None,
    }
