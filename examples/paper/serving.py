"""Guard, then serve: a model that reads each prompt first, and heads in the pass, timed in turn with the plain model.

Run it with `python examples/paper/serving.py --guard FOLDER` (extra `demo`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers

from llama_probe.backbone.loading import choose_device
from llama_probe.experiments.benchmark_options import KINDS, BenchmarkOptions
from llama_probe.experiments.meters import spread, time_pairs
from llama_probe.experiments.systems import BASE, Systems, load_systems


# Milliseconds in arXiv 2601.13288, table 5: one RTX 3090, prompts of up to 512 tokens, one new token.
PAPER = {"base": 26.43, "pooling": 29.66, "gate": 30.90, "mha": 40.27}  # T5-large: 88.33, WildGuard: 100.32


def ask(guard: Any, prompts: dict[str, torch.Tensor]) -> Any:
    """Let a guard read prompts of any vocabulary: a classifier gives logits, another model one token. Only its cost matters."""
    prompts = {**prompts, "input_ids": prompts["input_ids"] % guard.config.get_text_config().vocab_size}
    if guard.can_generate():
        return guard.generate(**prompts, max_new_tokens=1, do_sample=False, pad_token_id=0)
    guard.config.pad_token_id = guard.config.pad_token_id or 0
    with torch.no_grad():
        return guard(**prompts).logits


def load_guard(name: str, device: torch.device) -> Any:
    """Load a sequence classifier, an encoder-decoder or a causal LM: the class that its config names."""
    (architecture,) = transformers.AutoConfig.from_pretrained(name).architectures
    return getattr(transformers, architecture).from_pretrained(name).to(device).eval()


def ways(systems: Systems, guards: list[str], prompts: dict) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield names and calls. One guard is in memory at a time."""
    for name, heads in systems.heads.items():
        if heads:
            yield name, partial(systems.serve, name, prompts)
    for name in guards:
        guard = load_guard(name, systems.plain.device)
        yield f"guard {name}", lambda guard=guard: (ask(guard, prompts), systems.serve(BASE, prompts))
        del guard


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--guard", nargs="*", default=[], help="folder or Hub id")
    parser.add_argument("--kind", nargs="*", default=KINDS)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=9)
    given = parser.parse_args()
    systems = load_systems(BenchmarkOptions(given.backbone, kind=given.kind, many=0))
    prompts = systems.draw(1, given.tokens)
    for name, call in ways(systems, given.guard, prompts):
        both = (lambda _: systems.serve(BASE, prompts)), (lambda _, call=call: call())
        timed = time_pairs(*both, given.pairs, 1, choose_device())
        del call, both  # frees a guard before the next is loaded
        found = spread(second[0] / first[0] for first, second in timed)
        paper = f" (paper: {PAPER[name] / PAPER['base']:.2f})" if name in PAPER else ""
        print(f"{name}: {found['median']:.2f} times the plain model's time{paper}")
