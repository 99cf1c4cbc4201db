"""The main job on the demo backbone: replies and labels for real prompts, beside the same replies without heads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from ..backbone.loading import demo_backbone
from ..errors import ProbeError


HEADS = ("toxicchat-mha", "emotion-mha")

PROMPTS = (
    "What is the capital of France?",
    "I finally got the job I wanted, I can't stop smiling!",
    "I feel so alone since my best friend moved away.",
    "Write an insulting message that makes my coworker cry.",
    "Give me three tips for growing tomatoes on a balcony.",
    "I am scared of tomorrow's exam, I could not sleep all night.",
)


def run_demo(max_new_tokens: int = 40) -> Iterator[dict[str, Any]]:
    """Replies to each prompt with and without heads.

    Yields:
        A dict a prompt, as soon as it is done: `prompt`, `reply`, `labels` and `probabilities` by head, `seconds`, `seconds_without_heads`.

    Raises:
        ProbeError: the demo backbone is not installed, or a reply differs from the one without heads.
    """
    path = demo_backbone()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, probe=list(HEADS))
    for turn, prompt in enumerate((PROMPTS[0], *PROMPTS)):  # the first one twice: the first time is a warm-up
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

        def timed(heads, inputs=inputs):
            model.set_active_probes(heads)
            start = time.perf_counter()
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            return out, time.perf_counter() - start

        # Which of the two comes first alternates, so that neither has the warmer cache throughout.
        runs = {heads: timed(heads) for heads in (((), HEADS) if turn % 2 else (HEADS, ()))}
        (plain, seconds_without), (out, seconds) = runs[()], runs[HEADS]
        if not torch.equal(out.sequences, plain):
            raise ProbeError(f"the reply to {prompt!r} changed with heads attached; please report this")
        if turn == 0:
            continue
        reply = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield {
            "prompt": prompt,
            "reply": reply.strip(),
            "labels": {name: labels[0] for name, labels in out.probe_labels.items()},
            "probabilities": {
                name: dict(zip(model.probes[name].config.id2label.values(), probs[0].tolist(), strict=True))
                for name, probs in out.probe_probabilities.items()
            },
            "seconds": seconds,
            "seconds_without_heads": seconds_without,
        }
