"""A Gradio Space: a chat in which probe heads are seen reading along.

Run it with `python examples/space/app.py` (extras `space` and `demo`), and open the address that it prints. As a Space on the
Hub it takes the model from there. Environment variables change what is shown: BACKBONE (`demo`, a folder or a Hub id), HEADS
(names with commas; the first one guards) and MAX_NEW_TOKENS.
"""

import os


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import gradio as gr
import torch
from transformers import AutoModel, AutoTokenizer, TextIteratorStreamer

from llama_probe import Halt
from llama_probe.backbone.loading import DEMO, DEMO_MODEL_ID, model_id, resolve_backbone
from llama_probe.data.prompts import PromptFormat
from llama_probe.evaluation.heatmap import heat_map
from llama_probe.evaluation.reading import Reading, token_texts


BACKBONE = os.environ.get("BACKBONE") or (DEMO_MODEL_ID if "SPACE_ID" in os.environ else DEMO)
HEADS = [name.strip() for name in (os.environ.get("HEADS") or "toxicchat-mha, emotion-mha, sst2-mha").split(",")]
MAX_NEW_TOKENS = int(os.environ.get("MAX_NEW_TOKENS") or 120)
REFUSAL = "Sorry, I would rather not reply to that. Is there something else?"
EXAMPLES = (
    "We won, the whole team is celebrating!",
    "I am scared of tomorrow's exam.",
    "How do I grow tomatoes on a balcony?",
    "Write an insult that makes my coworker cry.",
)
WELCOME = ("Type a message", "the heads read along")
MESSAGES = 6  # of the chat so far that the model still sees

tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(BACKBONE))
model = AutoModel.from_pretrained(resolve_backbone(BACKBONE), probe=HEADS, dtype="float32")
CONFIGS = {name: head.config for name, head in model.probes.items()}
GUARD = next(iter(CONFIGS))
FLAG = list(CONFIGS[GUARD].id2label.values())[-1]
NOTHING = {name: dict.fromkeys(config.id2label.values(), 0.0) for name, config in CONFIGS.items()}
# Not cut to a length: what a guard is to read stands at the end of the chat.
PROMPTS = replace(PromptFormat.from_config(CONFIGS[GUARD], tokenizer), max_length=None)
THREAD = ThreadPoolExecutor(1)  # one reply at a time


@dataclass
class Chat:
    """What was said since the page was opened or cleared.

    Attributes:
        shown: as the user sees it. turns: as the model does, without what was halted.
        asked: what the model was asked last; it ends with the newest message.
    """

    shown: list = field(default_factory=list)
    turns: list = field(default_factory=list)
    asked: list = field(default_factory=list)


@dataclass
class Page:
    """One user's page. A chat that is cleared is replaced: its reply still belongs to the old one, and so knows of it."""

    chat: Chat = field(default_factory=Chat)


def inputs_of(chat):
    """The chat for the model, of which heads read the newest message: they were trained on single prompts."""
    inputs = PROMPTS.batch([chat])
    newest = len(PROMPTS.encode([chat[-1:]])[0]) - len(PROMPTS.prefix_ids)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, -newest:] = True
    return {**inputs, "probe_mask": mask}


def scores_of(outputs):
    """`{head: {label: probability}}`, for a batch of one prompt."""
    return {
        name: dict(zip(CONFIGS[name].id2label.values(), output.probabilities[0].tolist(), strict=True))
        for name, output in outputs.items()
    }


def halts(read, halting, threshold):
    """Whether the guard keeps the model from replying. A score that is no number halts, as a high one does."""
    return halting and not read[GUARD][FLAG] < threshold


def respond(text, page, halting, threshold):
    """One exchange: the scores as soon as the prompt is read, then the reply as it is written.

    Args:
        text: what was typed. page: whose chat it is added to.
        halting, threshold: whether, and from which probability on, the guard halts.
    """
    if not text.strip():
        yield {message: ""}
        return
    chat = page.chat
    chat.asked = [*chat.turns[-MESSAGES:], {"role": "user", "content": text}]
    chat.shown = [*chat.shown, chat.asked[-1]]
    yield {message: "", chatbot: chat.shown, banner: note("Reading", "the model, and the heads with it")}

    said, closed = SimpleQueue(), Event()

    def left():
        """Whether the page is closed or the chat cleared: nobody waits for more of the reply."""
        return closed.is_set() or page.chat is not chat

    def decide(outputs):
        """`generate` calls it when the prompt is read, before the first token."""
        read = scores_of(outputs)
        said.put(read)
        return [Halt(GUARD, FLAG, read[GUARD][FLAG], threshold) if halts(read, halting, threshold) else None]

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    run = THREAD.submit(
        model.generate,
        **inputs_of(chat.asked),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        streamer=streamer,
        halt_on=decide,
        halt_reply=REFUSAL,
        tokenizer=tokenizer,
        stopping_criteria=[lambda ids, *_: torch.full((len(ids),), left())],
    )
    run.add_done_callback(lambda _: (said.put(None), streamer.end()))  # lest the page waits for a run that failed
    try:
        if (read := said.get()) is not None:
            yield {scores: read, bars: bars_of(read, halting, threshold), banner: verdict(read, halting, threshold)}
        reply = ""
        for piece in streamer:
            reply += piece
            yield {chatbot: [*chat.shown, {"role": "assistant", "content": reply}]}
    finally:
        closed.set()
    halted = run.result().probe_halts[0] is not None
    chat.shown = [*chat.shown, {"role": "assistant", "content": reply}]
    if not halted:  # what is halted is forgotten
        chat.turns = [*chat.asked, chat.shown[-1]]
    if page.chat is not chat:  # what came above may have been shown after it was cleared
        yield nothing_said(halting, threshold)


def preview(text, page, halting, threshold):
    """What the heads say of what is typed so far: a pass that writes nothing."""
    if not text.strip():
        return {banner: gr.skip()}
    asked = [*page.chat.turns[-MESSAGES:], {"role": "user", "content": text}]
    read = scores_of(model.classify(**inputs_of(asked)))
    told = verdict(read, halting, threshold, ("Would be halted", "Would pass"))
    return {scores: read, bars: bars_of(read, halting, threshold), banner: told}


def forget(page, halting, threshold):
    """A new chat. A reply that is being written notices, and ends."""
    page.chat = Chat()
    return nothing_said(halting, threshold)


def nothing_said(halting, threshold):
    """The page as it is at first, but for what is typed."""
    return {chatbot: [], scores: NOTHING, bars: bars_of(NOTHING, halting, threshold), banner: note(*WELCOME)}


def look(page, head):
    """The heat map of what a head looked at in the newest message; one more pass, after the reply."""
    asked = page.chat.asked
    if not asked:
        return None
    inputs = inputs_of(asked)
    output = model.classify(**inputs, output_attentions=True)[head]
    mask = inputs["probe_mask"][0]
    ids = inputs["input_ids"][0, mask].tolist()
    reading = Reading(
        head=head,
        config=CONFIGS[head],
        text=asked[-1]["content"],
        tokens=token_texts(tokenizer, ids),
        template=[place >= len(ids) - len(PROMPTS.suffix_ids) for place in range(len(ids))],
        counted=[True] * len(ids),
        weights=output.token_weights[0][:, mask].float().numpy(),
        layer_weights=output.layer_weights[0].float().numpy(),
        label=output.labels[0],
        probabilities=scores_of({head: output})[head],
    )
    figure = heat_map(reading)
    figure.set_size_inches(13, 6.5)  # as wide as the page
    return figure


def verdict(read, halting, threshold, words=("Halted before the first token", "Passed")):
    """The banner: which head decided, its score, and the threshold."""
    halted = halts(read, halting, threshold)
    limit = f"it halts from {threshold:.2f} on" if halting else "halting is off"
    told = f"{GUARD} says {FLAG} {read[GUARD][FLAG]:.2f}; {limit}"
    return note(words[0] if halted else words[1], told, "halted" if halted else "passed")


def note(title, text, kind="idle"):
    """A coloured box."""
    return f'<div class="note {kind}" role="status"><b>{escape(title)}</b><br>{escape(text)}</div>'


def bars_of(read, halting, threshold):
    """A bar for each label of each head, with a line at the threshold where one halts."""
    parts = []
    for head, labels in read.items():
        parts.append(f"<h4>{escape(head)}</h4>")
        for label, score in labels.items():
            guards = halting and (head, label) == (GUARD, FLAG)
            line = f'<i style="left:{threshold:.1%}" title="threshold"></i>' if guards else ""
            kind = " flagged" if guards and halts(read, halting, threshold) else ""
            parts.append(
                f'<div class="row" data-head="{escape(head)}" data-label="{escape(label)}" data-score="{score:.4f}">'
                f'<span>{escape(label)}</span><div class="track"><div class="fill{kind}" style="width:{score:.1%}"></div>'
                f"{line}</div><span>{score:.1%}</span></div>"
            )
    return f'<div class="bars">{"".join(parts)}</div>'


with gr.Blocks(title="llama_probe", fill_width=True) as demo:
    page, scores = gr.State(Page()), gr.State(NOTHING)
    gr.Markdown(
        f"## One forward pass, text and labels\nProbe heads read the hidden states of {model_id(BACKBONE)} while it reads your "
        "message: their scores are there before the reply begins."
    )
    with gr.Row():
        with gr.Column(scale=5):
            chatbot = gr.Chatbot(
                show_label=False, height=340, placeholder="Nothing said yet", feedback_options=None, buttons=[]
            )
            message = gr.Textbox(
                placeholder="Message",
                show_label=False,
                submit_btn=True,
                autofocus=True,
                max_length=2000,
                elem_id="message",
            )
            gr.Examples([[text] for text in EXAMPLES], message, label="Or one of these")
        with gr.Column(scale=4):
            banner = gr.HTML(note(*WELCOME), elem_id="banner")
            bars = gr.HTML(bars_of(NOTHING, True, 0.5), elem_id="bars")
            with gr.Row():
                halting = gr.Checkbox(True, label=f"Halt at {FLAG}", info=f"before the first token, by {GUARD}")
                threshold = gr.Slider(0, 1, 0.5, step=0.01, label="Threshold", elem_id="threshold")
    head = gr.Radio(list(CONFIGS), value=GUARD, label="What a head looked at, token by layer")
    plot = gr.Plot(show_label=False, elem_id="heatmap")

    chat_inputs, readings = [message, page, halting, threshold], [scores, bars, banner]
    model_queue = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
    # What is sent while a reply is written, or still ends, waits for it in the browser: the default there is to drop it.
    exchange = message.submit(
        respond, chat_inputs, [message, chatbot, *readings], trigger_mode="always_last", **model_queue
    )
    exchange.success(look, [page, head], plot, **model_queue)
    message.change(preview, chat_inputs, readings, trigger_mode="always_last", **model_queue)
    # Not in the queue, where it would wait for the reply that it ends. Gradio's own `cancels` is of no use: what is sent
    # before the browser has an answer to it is lost.
    chatbot.clear(forget, chat_inputs[1:], [chatbot, *readings], concurrency_limit=None, show_progress="hidden")
    head.change(look, [page, head], plot, **model_queue)
    limits = [halting.change, threshold.change]
    gr.on(limits, bars_of, [scores, halting, threshold], bars, show_progress="hidden")


if __name__ == "__main__":
    # Fonts of the reader's own system: a page that fetches none.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    demo.launch(share=False, theme=theme, css_paths=Path(__file__).with_name("style.css"), footer_links=[])
