"""A chat in the terminal with a guard: the pass that begins a reply also scores the message, before a word is shown.

Run it with `python examples/chat.py` (extra `demo`). An empty line ends the chat, and `--help` lists the options. The script also
reads lines from a pipe: `echo "Hello!" | python examples/chat.py`.
"""

import sys
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from transformers import AutoModel, TextStreamer
from transformers.utils import logging

from llama_probe import Halt
from llama_probe.backbone.loading import load_tokenizer
from llama_probe.data.prompts import PromptFormat
from llama_probe.heads.decision import threshold_of


REFUSAL = "Sorry, I would rather not reply to that. Is there something else?"
MESSAGES = 10  # number of earlier messages that the model sees


def main(
    backbone: Annotated[str, typer.Option(help="'demo', a folder or a Hub id.")] = "demo",
    probe: Annotated[str, typer.Option(help="The guard: a head that flags one of two labels.")] = "safety",
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Halt from this probability on. Default: the guard's own.")
    ] = None,
    max_new_tokens: int = 80,
):
    """Chat until a line is empty."""
    logging.disable_progress_bar()
    console = Console(highlight=False, emoji=False)
    tokenizer = load_tokenizer(backbone)
    model = AutoModel.from_pretrained(backbone, probe={"guard": probe})
    config = model.probes["guard"].config
    flagged = config.need_flagged_index("a guard")
    label = config.id2label[flagged]
    if threshold is None:
        threshold = threshold_of(config, flagged) or 0.5
    # No maximum length: the guard reads the end of the chat.
    prompts = replace(PromptFormat.from_config(config, tokenizer), max_length=None)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def guard(outputs):
        """Decide between the prompt and the first token. A NaN score halts."""
        score = outputs["guard"].probabilities[0, flagged].item()
        passed = score < threshold
        colour = "green" if passed else "red"
        told = "" if passed else f", halted from {threshold:.2f} on"
        console.print(f"[{colour}]  {probe}: {label} {score:.2f}{told}[/{colour}]")
        return [None if passed else Halt("guard", label, score, threshold)]

    history: list[dict[str, str]] = []
    while text := read_line(console):
        chat = [*history[-MESSAGES:], {"role": "user", "content": text}]
        inputs = prompts.batch([chat])
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.6,
            top_p=0.9,
            streamer=streamer,
            halt_on=guard,
            halt_reply=REFUSAL,
            tokenizer=tokenizer,
        )
        if out.probe_halts[0] is None:  # a halted message is not kept
            reply = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            history = [*chat, {"role": "assistant", "content": reply}]


def read_line(console: Console) -> str:
    """Return a line of the user; empty at the end of the input."""
    try:
        text = console.input("\n[bold]> [/bold]").strip()
    except EOFError:
        return ""
    if not sys.stdin.isatty():
        console.print(text, markup=False)
    return text


if __name__ == "__main__":
    typer.run(main)
