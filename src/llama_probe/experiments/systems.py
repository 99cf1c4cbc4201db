"""Costs of heads for a backbone and a device. Systems are timed in turn with the plain model: seconds drift with a machine's load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..backbone.decoder import find_decoder
from ..backbone.loading import choose_device, load_backbone, model_id, resolve_backbone
from ..errors import ProbeError, first_line
from ..files import JSON, environment
from ..heads.configuration import ProbeConfig
from ..serving.auto import AutoModelForProbedGeneration
from .benchmark_options import SHAPE, BenchmarkOptions
from .meters import Meter, Timing, peak_memory, spread, time_pairs


BASE = "base"
# Public dimensions of Llama-3.2-3B.
LLAMA_3B = transformers.LlamaConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True,
)  # fmt: skip


class Systems:
    """A model with heads. A system is the plain model (`BASE`), a head, or `many` fresh `mha` heads at once.

    Attributes:
        plain: the same weights in the plain class.
        heads: names of the heads of each system.
    """

    def __init__(self, model: PreTrainedModel, many: int = 0):
        self.model, self.plain = model, model._without_probes()
        self.heads = {BASE: [], **{name: [name] for name in model.probes}}
        if many:
            names = self.heads[f"{many} x mha"] = [f"mha-{number}-of-{many}" for number in range(1, many + 1)]
            decoder = find_decoder(model)
            for name in names:
                model.add_probe(name, fresh_config("mha", decoder.hidden_size, decoder.num_hidden_layers))

    def draw(self, batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
        """Draw prompts `[B, T]`, the same in every run, with a mask. They begin as a user's turn if a head looks for it."""
        generator = torch.Generator().manual_seed(1000 * batch_size + tokens)
        vocab_size = self.plain.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocab_size, (batch_size, tokens), generator=generator).to(self.plain.device)
        for markers in (head.config.turn_markers for head in self.model.probes.values()):
            if markers is not None:
                opening = markers["user"]["ids"][:tokens]
                ids[:, : len(opening)] = torch.tensor(opening)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def serve(self, system: str, prompts: dict, new_tokens: int = 1, on_token: Callable | None = None) -> object:
        """Generate greedily, exactly `new_tokens` for each prompt. Call `on_token` after each."""
        kwargs = {**prompts, "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        if new_tokens > 1:
            kwargs["min_new_tokens"] = new_tokens
            kwargs["stopping_criteria"] = [partial(_mark, on_token)] if on_token else None
        names = self.heads[system]
        return self.model.generate(**kwargs, probes=names) if names else self.plain.generate(**kwargs)


def _mark(on_token: Callable[[], None], ids: torch.Tensor, *_: object) -> torch.Tensor:
    on_token()
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def fresh_config(kind: str, hidden_size: int, num_hidden_layers: int, **fields) -> ProbeConfig:
    """Return the config of a new head, with the paper's downcast of 32 or the next smaller one that fits the backbone."""
    downcast = next(size for size in (32, 16, 8, 4, 2, 1) if hidden_size % size == 0)
    fields["num_attention_heads"] = next(number for number in (2, 3, 1) if hidden_size // downcast % number == 0)
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "downcast": downcast}
    return ProbeConfig(probe_type=kind, **sizes, **fields)


def measure_costs(options: BenchmarkOptions) -> JSON:
    """Return `environment`, `settings`, `backbone` and `rows` of time and memory (see `row`), as JSON values."""
    systems, rows = load_systems(options), []
    device = systems.plain.device
    runs = list(product(options.batch_size, options.tokens, systems.heads))
    for batch_size, tokens, name in tqdm(runs, desc="systems", unit="system"):
        prompts = systems.draw(batch_size, tokens)
        base, system = (partial(systems.serve, which, prompts, options.new_tokens) for which in (BASE, name))
        base(), system()  # a first call may allocate what later calls keep
        pairs = time_pairs(base, system, options.pairs, warmup=2, device=device)
        heads = [systems.model.probes[head] for head in systems.heads[name]]
        weights = sum(weight.nbytes for head in heads for weight in head.parameters())
        memory = weights + peak_memory(system, device) - peak_memory(base, device)
        sizes = {"batch_size": batch_size, "tokens": tokens, "new_tokens": options.new_tokens}
        rows.append({"system": name, **sizes, **row(pairs, memory)})
    return describe_run(options, systems.plain, rows)


def load_systems(options: BenchmarkOptions, replies: bool = False) -> Systems:
    """Load the backbone and its heads; with `replies` also attach a head of each kind that follows the reply."""
    name, device = options.backbone, choose_device(options.device)
    if options.random_weights:
        try:
            config = LLAMA_3B if name == SHAPE else transformers.AutoConfig.from_pretrained(resolve_backbone(name))
        except (OSError, ValueError) as error:
            raise ProbeError(f"no config of {name!r}, and it is not {SHAPE}: {first_line(error)}") from error
        dtype = (config.dtype or torch.float32) if options.dtype == "auto" else getattr(torch, options.dtype)
        with device:
            lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        lm, _ = load_backbone(name, options.dtype, device)
    model = AutoModelForProbedGeneration.from_causal_lm(lm, options.probe)
    sizes = find_decoder(model).hidden_size, find_decoder(model).num_hidden_layers
    for kind in options.kind:
        model.add_probe(kind, fresh_config(kind, *sizes))
        if replies:
            model.add_probe(f"{kind}-reply", fresh_config(kind, *sizes, token_scope="response"))
    return Systems(model, options.many)


def row(pairs: list[tuple[Timing, Timing]], memory: int) -> JSON:
    """Return the numbers of a system, from timings of the plain model and of the system, and bytes above the plain model's.

    Returns:
        `ms` of the whole call and `step_ms` of each new token after the first: median and quartiles.
        `ratio` and `step_ratio`: median and quartiles of system over plain model, pair by pair.
        `above_base_mb`: 1 MB is 1e6 bytes. Values that are not defined are `None`.
    """
    numbers: JSON = {"above_base_mb": memory / 1e6}
    for index, name in enumerate(("", "step_")):
        values = [(first[index], second[index]) for first, second in pairs]
        known = values[0][1] is not None
        numbers[f"{name}ms"] = spread(1000 * second for _, second in values) if known else None
        numbers[f"{name}ratio"] = spread(second / first for first, second in values) if known else None
    return numbers


def count_operations(systems: Systems, tokens: Sequence[int], as_device: str = "cuda") -> list[JSON]:
    """Count the operations of each system for one prompt, with the choices of `"cuda"` or `"cpu"`, on any device.

    Returns:
        One dict a length and system: `system`, `tokens`; `prefill`: operations of `generate(max_new_tokens=1)`;
        `step`: operations of a decoding step, whatever the length; `prefill_ratio`, `step_ratio`: over the plain model's.
    """
    rows = []

    def count(name: str, length: int, new_tokens: int) -> list[int]:  # up to each new token, and in all
        prompt, marks = systems.draw(1, length), []
        with Meter() as meter:
            systems.serve(name, prompt, new_tokens, lambda: marks.append(meter.operations))
        return [*marks, meter.operations]

    with nullcontext(as_device):
        marks = {name: count(name, min(tokens), 3) for name in systems.heads}
        steps = {name: third - second for name, (_, second, third, _) in marks.items()}
        for length in tokens:
            prefills = {name: count(name, length, 1)[-1] for name in systems.heads}
            for name, prefill in prefills.items():
                counts = {"prefill": prefill, "step": steps[name]}
                ratios = {"prefill_ratio": prefill / prefills[BASE], "step_ratio": steps[name] / steps[BASE]}
                rows.append({"system": name, "tokens": length, **counts, **ratios})
    return rows


def describe_run(options: BenchmarkOptions, lm: PreTrainedModel, rows: list[dict]) -> JSON:
    """Return a report as a dict of JSON values."""
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else str(lm.device)
    machine = {**environment(), "device": device, "threads": torch.get_num_threads()}
    backbone = {"name": Path(model_id(options.backbone)).name, "num_parameters": lm.num_parameters()}
    backbone["dtype"] = str(lm.dtype).removeprefix("torch.")
    return {"environment": machine, "settings": vars(options), "backbone": backbone, "rows": rows}
