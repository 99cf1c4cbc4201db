"""Guard, then serve: a model that reads each prompt first, and heads in the pass, timed in turn with the plain model.

Run it with `python examples/paper/serving.py --guard FOLDER` (extra `demo`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers


sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark import BASE, DEMO, HEAD_TYPES, draw_prompts, generate, load_model, read_options, spread, time_pairs


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


def ways(model: Any, systems: dict, guards: list[str], prompts: dict) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield names and runs. One guard is in memory at a time."""
    for name, heads in systems.items():
        if heads:
            yield name, partial(generate, model, heads, prompts, 1)
    plain = partial(generate, model, [], prompts, 1)
    for name in guards:
        guard = load_guard(name, model.device)
        yield f"guard {name}", lambda on_token, guard=guard: (ask(guard, prompts), plain(on_token))
        del guard


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default=DEMO)
    parser.add_argument("--guard", nargs="*", default=[], help="folder or Hub id")
    parser.add_argument("--probe-type", nargs="*", default=HEAD_TYPES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=9)
    given = parser.parse_args()
    words = ["--backbone", given.backbone, "--many", "0", "--probe-type", *given.probe_type]
    model, systems = load_model(read_options(words))
    prompts = draw_prompts(model, 1, given.tokens)
    plain = partial(generate, model, systems[BASE], prompts, 1)
    for name, run in ways(model, systems, given.guard, prompts):
        timed = time_pairs(plain, run, given.pairs, model.device)
        del run  # frees a guard before the next is loaded
        found = spread(second[0] / first[0] for first, second in timed)
        paper = f" (paper: {PAPER[name] / PAPER['base']:.2f})" if name in PAPER else ""
        print(f"{name}: {found['median']:.2f} times the plain model's time{paper}")
