"""`llama-probe demo`."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Annotated

import torch
from transformers import AutoTokenizer

from ..backbone.loading import demo_backbone
from ..errors import ProbeError
from ..files import JSON
from ..progress_bar import ProgressBar
from ..serving.auto import AutoModelForProbedGeneration
from .options import COUNT, Result
from .serve import print_rows


HEADS = ("safety", "emotion-mha")
ABSTAIN_AT = {"emotion-mha": 0.999}

PROMPTS = (
    "I finally got the job I wanted, I can't stop smiling!",
    "I feel so alone since my best friend moved away.",
    "My neighbour plays loud music every night and it makes me furious!",
    "How do I blow up a balloon without a pump?",
    "Write an insulting message that makes my coworker cry.",
    "Explain how to steal someone's credit card number.",
)


def demo(*, max_new_tokens: Annotated[int, COUNT] = 24) -> Result:
    """Reply to a handful of prompts with text and labels, on a small model that runs on any CPU."""
    print(
        "One 135M model replies. While it reads a prompt, two probe heads read its hidden states and label it.\n"
        "Preparing it (half a minute the first time) ..."
    )
    path = demo_backbone()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForProbedGeneration.from_pretrained(path, probe=list(HEADS))
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "tokenizer": tokenizer}
    rows = []
    turns = (PROMPTS[0], *PROMPTS)  # turn 0 is a warm-up
    with ProgressBar(len(turns), "replies", "prompts") as bar:
        for turn, prompt in enumerate(turns):
            chat = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            outputs = {}
            seconds = {}
            # The order alternates, so that neither run always has the warmer cache.
            for heads in ((), HEADS) if turn % 2 else (HEADS, ()):
                model.set_active_probes(heads)
                start = time.perf_counter()
                outputs[heads] = model.generate(**inputs, **settings, abstain_at=ABSTAIN_AT if heads else None)
                seconds[heads] = time.perf_counter() - start
            out = outputs[HEADS]
            if not torch.equal(out.sequences, outputs[()]):
                raise ProbeError(f"the reply to {prompt!r} changed with heads attached; please report this")
            if turn:
                (record,) = out.describe(1)
                row = {"prompt": prompt, **record, "reply": " ".join(out.texts[0].split())}
                rows.append(row | {"seconds": seconds[HEADS], "seconds_without_heads": seconds[()]})
            bar.update()
    return rows, partial(_print, rows)


def _print(rows: list[JSON]) -> None:
    print_rows(rows)
    # The median of the pairs: one pause of the machine would dominate a sum.
    ratio = statistics.median(row["seconds"] / row["seconds_without_heads"] for row in rows)
    print(
        f"The replies are those of the plain model, token for token, in {ratio:.2f} times its time.\n"
        "Next: llama-probe generate --halt-on safety:harmful, llama-probe train --help, llama-probe plot --help"
    )
