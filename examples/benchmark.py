"""Measure what heads cost while a model serves, beside the plain model: time and memory, or the operations of a GPU.

    python examples/benchmark.py --probe safety
    python examples/benchmark.py --probe-type gate mha --tokens 16 512 --pairs 21
    python examples/benchmark.py --operations --probe-type gate mha --tokens 16 512

A system is the plain model (`base`), a head, or `--many` fresh `mha` heads at once. The runs of a system and of the plain model
alternate, because the speed of a machine changes. Tools in the folder tests of this repository measure memory on the CPU, and
count operations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from llama_probe import AutoModelForProbedGeneration, ProbeConfig, ProbedGenerationMixin, ProbeError, __version__


sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

BASE = "base"
HEAD_TYPES = ("pooling", "gate", "mha")
DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
LLAMA_3B = transformers.LlamaConfig(  # the public dimensions of Llama-3.2-3B
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True, dtype="bfloat16",
)  # fmt: skip
WARM_UP = 2  # untimed pairs before the timed ones

# A run takes a function, and calls it after each new token.
Run = Callable[[Callable[[], object]], object]
# Seconds of a run, and of each new token after the first; None if there is one token.
Seconds = tuple[float, float | None]


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line. Every combination of the lists is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=DEMO, help="folder or Hub id; with --random-weights also llama-3b")
    parser.add_argument("--probe", nargs="+", default=[], help="heads: folders, Hub ids or aliases")
    parser.add_argument(
        "--probe-type", nargs="*", help=f"fresh heads of these types; default, without --probe: {HEAD_TYPES}"
    )
    parser.add_argument("--many", type=int, default=8, help="fresh mha heads to measure at once; 0 for none")
    parser.add_argument("--window", type=int, default=0, help="tokens of a window of the fresh heads; 0 for none")
    parser.add_argument("--tokens", nargs="+", type=_positive, default=[64, 512], help="tokens of a prompt")
    parser.add_argument("--batch-size", nargs="+", type=_positive, default=[1], help="prompts of a batch")
    parser.add_argument("--new-tokens", type=_positive, default=1, help="with more than 1, also the time of a token")
    parser.add_argument("--pairs", type=_positive, default=9, help="timed runs of each system and of the plain model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: an accelerator if there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--random-weights", action="store_true", help="read the config alone; the times are the same")
    parser.add_argument("--operations", action="store_true", help="count operations for one prompt, on any machine: the "
                        "models run on the simulated accelerator of tests/accelerator.py")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(words)
    if options.probe_type is None:
        options.probe_type = [] if options.probe else list(HEAD_TYPES)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    options.device = "cpu" if options.operations else options.device or str(accelerator or "cpu")
    return options


def _positive(word: str) -> int:
    if int(word) < 1:
        raise ValueError
    return int(word)


def load_model(options: argparse.Namespace) -> tuple[ProbedGenerationMixin, dict[str, list[str]]]:
    """Return the backbone with all heads, and by system the names of its heads."""
    if options.random_weights:
        is_3b = options.backbone == "llama-3b"
        config = LLAMA_3B if is_3b else transformers.AutoConfig.from_pretrained(options.backbone)
        dtype = config.dtype or torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
        with torch.device(options.device):
            lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = AutoModelForProbedGeneration.from_causal_lm(lm.eval(), options.probe)
    else:
        model = AutoModelForProbedGeneration.from_pretrained(
            options.backbone, dtype=options.dtype, probe=options.probe, device_map={"": options.device}
        )
    model.generation_config.eos_token_id = None  # a reply has as many tokens as it is asked for
    for probe_type in options.probe_type:
        model.add_probe(probe_type, ProbeConfig(probe_type=probe_type, window=options.window))
        if options.operations:
            model.add_probe(f"{probe_type}-reply", ProbeConfig(probe_type=probe_type, token_scope="response"))
    systems = {BASE: [], **{name: [name] for name in model.probes}}
    if options.many:
        names = [f"mha-{number}-of-{options.many}" for number in range(1, options.many + 1)]
        systems[f"{options.many} x mha"] = names
        for name in names:
            model.add_probe(name, ProbeConfig(probe_type="mha", window=options.window))
    return model, systems


def draw_prompts(model: ProbedGenerationMixin, batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    """Draw prompts `[B, T]`, the same in every run. If a head looks for a user's turn, each prompt begins as one."""
    generator = torch.Generator().manual_seed(1000 * batch_size + tokens)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocab_size, (batch_size, tokens), generator=generator)
    for head in model.probes.values():
        if head.config.turn_markers is not None:
            opening = head.config.turn_markers["user"]["ids"][:tokens]
            ids[:, : len(opening)] = torch.tensor(opening)
    ids = ids.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(
    model: ProbedGenerationMixin, heads: Sequence[str], prompts: dict, new_tokens: int, on_token: Callable[[], object]
) -> object:
    """Generate greedily with these heads, or as the plain model without heads. Call `on_token` after each new token."""

    def hear(ids: torch.Tensor, *_: object) -> torch.Tensor:
        on_token()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "stopping_criteria": [hear]}
    return model.generate(**prompts, **settings, probes=list(heads))


def time_run(run: Run, device: torch.device) -> Seconds:
    """Time a run. Read the clock once the device has finished its work."""

    def read_clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return perf_counter()

    tokens: list[float] = []
    start = read_clock()
    run(lambda: tokens.append(read_clock()))
    seconds = read_clock() - start
    return seconds, (tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else None


def time_pairs(first: Run, second: Run, pairs: int, device: torch.device) -> list[tuple[Seconds, Seconds]]:
    """Time two runs in turn. The order alternates, so that a slower machine slows both."""
    timed = []
    for pair in range(WARM_UP + pairs):
        if pair % 2:
            seconds_of_second, seconds_of_first = time_run(second, device), time_run(first, device)
        else:
            seconds_of_first, seconds_of_second = time_run(first, device), time_run(second, device)
        timed.append((seconds_of_first, seconds_of_second))
    return timed[WARM_UP:]


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return median, first and third quartile, and number of some values."""
    values = list(values)
    low, middle, high = map(float, np.percentile(values, (25, 50, 75)))
    return {"median": middle, "quartiles": [low, high], "runs": len(values)}


def costs(pairs: Sequence[tuple[Seconds, Seconds]], above_base: int) -> dict[str, Any]:
    """Return the numbers of a system from pairs of times of the plain model and of the system.

    Args:
        above_base: bytes at the peak above those of the plain model.

    Returns:
        `above_base_mb` (1 MB is 1e6 bytes), `ms` of the whole call and `ratio` to the plain model's pair by pair;
        `step_ms` and `step_ratio` of each new token after the first, None if there is one.
    """
    row: dict[str, Any] = {"above_base_mb": above_base / 1e6}
    for index, prefix in enumerate(("", "step_")):
        of_base = [base[index] for base, _ in pairs]
        of_system = [system[index] for _, system in pairs]
        is_known = None not in of_system
        row[f"{prefix}ms"] = spread(1000 * seconds for seconds in of_system) if is_known else None
        ratios = [system / base for base, system in zip(of_base, of_system, strict=True)] if is_known else None
        row[f"{prefix}ratio"] = spread(ratios) if ratios else None
    return row


def measure_costs(options: argparse.Namespace, model: ProbedGenerationMixin, systems: dict) -> list[dict[str, Any]]:
    """Return time and memory of each system, batch size and length; see `costs`."""
    from memory import peak_memory

    rows = []
    runs = list(product(options.batch_size, options.tokens, systems))
    for batch_size, tokens, name in tqdm(runs, desc="systems", unit="system"):
        prompts = draw_prompts(model, batch_size, tokens)
        base: Run = partial(generate, model, [], prompts, options.new_tokens)
        system: Run = partial(generate, model, systems[name], prompts, options.new_tokens)
        pairs = time_pairs(base, system, options.pairs, model.device)
        peaks = [peak_memory(lambda run=run: run(lambda: None), model.device) for run in (base, system)]
        weights = sum(weight.nbytes for head in systems[name] for weight in model.probes[head].parameters())
        sizes = {"batch_size": batch_size, "tokens": tokens, "new_tokens": options.new_tokens}
        rows.append({"system": name, **sizes, **costs(pairs, weights + peaks[1] - peaks[0])})
    return rows


def count_operations(model: ProbedGenerationMixin, systems: dict, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Count the operations of each system for one prompt on the simulated accelerator. Views launch no kernel.

    Returns:
        A dict a length and system: `system`, `tokens`, `prefill` (operations of a reply of one token), `step` (operations of
        the third token), and their ratios to the plain model's.
    """
    from accelerator import DEVICE, Accelerator

    rows = []
    with torch.no_grad(), Accelerator() as device:
        model.to(DEVICE)
        for tokens in lengths:
            prompts = draw_prompts(model, 1, tokens)
            counts = {}
            for name, heads in systems.items():
                after_token: list[int] = []
                start = device.operations
                generate(model, heads, prompts, 1, lambda: None)
                prefill = device.operations - start
                generate(model, heads, prompts, 3, lambda marks=after_token: marks.append(device.operations))
                counts[name] = prefill, after_token[2] - after_token[1]
            for name, (prefill, step) in counts.items():
                ratios = {"prefill_ratio": prefill / counts[BASE][0], "step_ratio": step / counts[BASE][1]}
                rows.append({"system": name, "tokens": tokens, "prefill": prefill, "step": step, **ratios})
    return rows


def describe(options: argparse.Namespace, model: ProbedGenerationMixin) -> dict[str, Any]:
    """Return the versions, the machine, the settings and the backbone of a report."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "llama_probe": __version__}
    is_cuda = model.device.type == "cuda"
    machine = {"device": torch.cuda.get_device_name(model.device) if is_cuda else str(model.device)}
    backbone = {"name": Path(options.backbone).name, "dtype": str(model.dtype).removeprefix("torch.")}
    environment = {**versions, **machine, "threads": torch.get_num_threads()}
    return {"environment": environment, "settings": vars(options), "backbone": backbone}


def print_report(report: dict[str, Any]) -> None:
    """Print a table of the values that differ between the rows, and a line of the values that all rows share."""
    rows, backbone = report["rows"], report["backbone"]
    columns = [name for name in rows[0] if len({str(row[name]) for row in rows}) > 1]
    table = Table(*columns, title=f"{backbone['name']}, {backbone['dtype']}, {report['environment']['device']}")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    console = Console(emoji=False, markup=False)
    console.print(table)
    alike = [f"{name} {row[name]}" for name in row if name not in columns and row[name] is not None]
    console.print(f"In all rows: {', '.join(alike) or 'nothing'}.")
    if "ratio" in columns:
        console.print("Ratios to the plain model, with quartiles, are of pairs of runs; those of base show the noise.")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_cell(value['median'])}\n[{', '.join(map(_cell, value['quartiles']))}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    options = read_options()
    transformers.logging.set_verbosity_error()  # heads and models warn about random prompts
    try:
        model, systems = load_model(options)
        report = describe(options, model)
        if options.operations:
            report["environment"]["device"] = "a simulated accelerator"
            report["rows"] = count_operations(model, systems, options.tokens)
        else:
            report["rows"] = measure_costs(options, model, systems)
    except (ProbeError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")
    print(json.dumps(report)) if options.json else print_report(report)
