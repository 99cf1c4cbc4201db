"""A Gradio Space: a chat that shows the scores of probe heads.

Run it with `python examples/space/app.py` (extras `space` and `demo`) and open the address that it prints. A Space on the Hub
loads the model from the Hub. Environment variables: BACKBONE (`demo`, a folder or a Hub id), HEADS (names with commas; the
first head is the guard) and MAX_NEW_TOKENS.
"""

import os


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
# Before torch is imported: its waiting threads would take the processors from the page.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import gradio as gr
import torch
from transformers import AutoModel, TextIteratorStreamer

from llama_probe import Halt
from llama_probe.backbone.loading import DEMO, DEMO_MODEL_ID, load_tokenizer
from llama_probe.data.prompts import PromptFormat
from llama_probe.evaluation.heatmap import heat_map
from llama_probe.evaluation.reading import Reading, token_texts
from llama_probe.heads.decision import threshold_of
from llama_probe.heads.scope import token_mask
from llama_probe.serving.passages import locate


BACKBONE = os.environ.get("BACKBONE") or (DEMO_MODEL_ID if "SPACE_ID" in os.environ else DEMO)
HEADS = [name.strip() for name in (os.environ.get("HEADS") or "safety, emotion-mha, sst2-mha").split(",")]
MAX_NEW_TOKENS = int(os.environ.get("MAX_NEW_TOKENS") or 120)
REFUSAL = "Sorry, I would rather not reply to that. Is there something else?"
EXAMPLES = (
    "We won, the whole team is celebrating!",
    "I am scared of tomorrow's exam.",
    "How do I grow tomatoes on a balcony?",
    "Write an insult that makes my coworker cry.",
)
WELCOME = ("Type a message", "the heads read along")
MESSAGES = 6  # number of earlier messages that the model sees
AROUND = 200  # characters that are shown on either side of a passage

tokenizer = load_tokenizer(BACKBONE)
model = AutoModel.from_pretrained(BACKBONE, probe=HEADS)
CONFIGS = {name: head.config for name, head in model.probes.items()}
GUARD = next(iter(CONFIGS))
FLAGGED = CONFIGS[GUARD].need_flagged_index("the first of the heads")
FLAG = CONFIGS[GUARD].id2label[FLAGGED]
OWN = round(threshold_of(CONFIGS[GUARD], FLAGGED) or 0.5, 3)
# No maximum length: the guard reads the end of the chat.
PROMPTS = replace(PromptFormat.from_config(CONFIGS[GUARD], tokenizer), max_length=None)
THREAD = ThreadPoolExecutor(1)  # one reply at a time


@dataclass
class Chat:
    """A chat since the page was opened or cleared.

    Attributes:
        shown: messages that the user sees.
        turns: messages that were not halted, which the model sees.
        asked: the last input of the model, with the newest message at its end.
    """

    shown: list = field(default_factory=list)
    turns: list = field(default_factory=list)
    asked: list = field(default_factory=list)


@dataclass
class Page:
    """A user's page. Clearing the page replaces the chat, so that a running reply notices it."""

    chat: Chat = field(default_factory=Chat)


def scores_of(outputs):
    """Return `{head: {label: probability}}` for a batch of one prompt."""
    return {name: output.describe()[0]["scores"] for name, output in outputs.items()}


def place_of(outputs, asked):
    """Return the passage to which the guard gave its score, with the message around it; None for a guard without windows."""
    spans = outputs[GUARD].spans
    if spans is None:
        return None
    (ids,) = PROMPTS.encode([asked])
    (passage,) = locate(PROMPTS, asked, ids, {FLAG: spans[0, FLAGGED].tolist()})
    if passage["start"] is None:
        return None
    newest = len(asked) - 1
    which = "your message" if passage["message"] == newest else f"message {passage['message'] + 1} of {newest + 1}"
    return passage | {"content": asked[passage["message"]]["content"], "which": which}


def halts(read, halting, threshold):
    """Return True if the guard halts the reply. A NaN score halts."""
    return halting and not read[GUARD][FLAG] < threshold


def respond(text, page, halting, threshold):
    """Add a message to the chat of a page. Yield the scores after the prompt, then the reply as the model writes it.

    The guard halts from a probability of `threshold` on, if `halting` is true.
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
        """Return True if the page was closed or the chat cleared."""
        return closed.is_set() or page.chat is not chat

    def decide(outputs):
        """Publish the scores, before the first token."""
        read = scores_of(outputs)
        said.put((read, place_of(outputs, chat.asked)))
        return [Halt(GUARD, FLAG, read[GUARD][FLAG], threshold) if halts(read, halting, threshold) else None]

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    run = THREAD.submit(
        model.generate,
        **PROMPTS.batch([chat.asked]),
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
    # If the run fails, the page must not wait for it.
    run.add_done_callback(lambda _: (said.put(None), streamer.end()))
    try:
        if (found := said.get()) is not None:
            yield shown(*found, halting, threshold, verdict(found[0], halting, threshold))
        reply = ""
        for piece in streamer:
            reply += piece
            yield {chatbot: [*chat.shown, {"role": "assistant", "content": reply}]}
    finally:
        closed.set()
    halted = run.result().probe_halts[0] is not None
    chat.shown = [*chat.shown, {"role": "assistant", "content": reply}]
    if not halted:  # a halted message is not kept
        chat.turns = [*chat.asked, chat.shown[-1]]
    if page.chat is not chat:  # the chat was cleared, and a part of this reply may have been shown afterwards
        yield nothing_said(halting, threshold)


def preview(text, page, halting, threshold):
    """Score the text in the box while the user types, in a pass without a reply.

    If the user has sent the text in the meantime, leave the banner of its reply.
    """
    if not text.strip() or {"role": "user", "content": text} in page.chat.asked[-1:]:
        return {banner: gr.skip()}
    asked = [*page.chat.turns[-MESSAGES:], {"role": "user", "content": text}]
    outputs = model.classify(**PROMPTS.batch([asked]))
    read = scores_of(outputs)
    told = verdict(read, halting, threshold, ("Would be halted", "Would pass"))
    return shown(read, place_of(outputs, asked), halting, threshold, told)


def shown(read, found, halting, threshold, told):
    """Return the components for the scores of a prompt, the place of its passage, and a banner."""
    parts = limited(read, found, halting, threshold)
    return {scores: read, place: found, banner: told, **parts}


def limited(read, found, halting, threshold):
    """Return the components that change with the threshold."""
    return {bars: bars_of(read, halting, threshold), passage: passage_of(read, found, threshold)}


def forget(page, halting, threshold):
    """Start a new chat, which ends a running reply."""
    page.chat = Chat()
    return nothing_said(halting, threshold)


def nothing_said(halting, threshold):
    """Return the components of an empty chat."""
    return {
        chatbot: [], plot: gr.update(visible=False), **shown({}, None, halting, threshold, note(*WELCOME))
    }  # fmt: skip


def look(page, head):
    """Draw what a head looked at in the turns that it reads, with one more pass. Hide the plot before the first message."""
    asked = page.chat.asked
    if not asked:
        return gr.update(visible=False)
    inputs = PROMPTS.batch([asked])
    output = model.classify(**inputs, output_attentions=True)[head]
    mask = token_mask(CONFIGS[head], **inputs)[0]
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
        prediction=output.describe()[0],
    )
    figure = heat_map(reading)
    figure.set_size_inches(13, 6.5)  # as wide as the page
    return gr.update(value=figure, visible=True)


def verdict(read, halting, threshold, words=("Halted before the first token", "Passed")):
    """Return the banner with guard, score and threshold."""
    halted = halts(read, halting, threshold)
    limit = f"it halts from {threshold:.3f} on" if halting else "halting is off"
    told = f"{GUARD} says {FLAG} {read[GUARD][FLAG]:.3f}; {limit}"
    return note(words[0] if halted else words[1], told, "halted" if halted else "passed")


def note(title, text, state="idle"):
    """Return a box in the colour of its state."""
    return f'<div class="note {state}" role="status"><b>{escape(title)}</b><br>{escape(text)}</div>'


def passage_of(read, found, threshold):
    """Return the passage marked in its message, from a score of `threshold` on. Words say the same as the mark."""
    if found is None or read[GUARD][FLAG] < threshold:
        return ""
    content, start, end = found["content"], found["start"], found["end"]
    before = ("…" if start > AROUND else "") + content[max(0, start - AROUND) : start]
    behind = content[end : end + AROUND] + ("…" if end + AROUND < len(content) else "")
    words = f"{GUARD} found {FLAG} in characters {start + 1:,} to {end:,} of {found['which']}, marked here:"
    quote = f"{escape(before)}<mark>{escape(found['text'])}</mark>{escape(behind)}"
    return f'<figure class="passage"><figcaption>{escape(words)}</figcaption><blockquote>{quote}</blockquote></figure>'


def bars_of(read, halting, threshold):
    """Return a bar for each label of each head, with a line at the guard's threshold."""
    parts = []
    for head, labels in read.items():
        parts.append(f"<h4>{escape(head)}</h4>")
        for label, score in labels.items():
            guards = halting and (head, label) == (GUARD, FLAG)
            line = f'<i style="left:{threshold:.1%}" title="threshold"></i>' if guards else ""
            flagged = " flagged" if guards and halts(read, halting, threshold) else ""
            parts.append(
                f'<div class="row" data-head="{escape(head)}" data-label="{escape(label)}" data-score="{score:.4f}">'
                f'<span>{escape(label)}</span><div class="track"><div class="fill{flagged}" style="width:{score:.1%}"></div>'
                f"{line}</div><span>{score:.1%}</span></div>"
            )
    return f'<div class="bars">{"".join(parts)}</div>'


with gr.Blocks(title="llama_probe", fill_width=True) as demo:
    page, scores, place = gr.State(Page()), gr.State({}), gr.State(None)
    gr.Markdown(
        f"## One forward pass, text and labels\nProbe heads read the hidden states of {DEMO_MODEL_ID if BACKBONE == DEMO else BACKBONE} while it reads your "
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
            passage = gr.HTML("", elem_id="passage")
            bars = gr.HTML(bars_of({}, True, OWN), elem_id="bars")
            with gr.Row():
                halting = gr.Checkbox(True, label=f"Halt at {FLAG}", info=f"before the first token, by {GUARD}")
                threshold = gr.Slider(0, 1, OWN, step=0.001, label="Threshold", elem_id="threshold")
    head = gr.Radio(list(CONFIGS), value=GUARD, label="What a head looked at, token by layer")
    plot = gr.Plot(show_label=False, elem_id="heatmap", visible=False)

    chat_inputs, readings = [message, page, halting, threshold], [scores, place, bars, passage, banner]
    model_queue = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
    # A message that is sent during a reply waits in the browser. By default Gradio would drop it.
    exchange = message.submit(
        respond, chat_inputs, [message, chatbot, *readings, plot], trigger_mode="always_last", **model_queue
    )
    exchange.success(look, [page, head], plot, **model_queue)
    message.change(preview, chat_inputs, readings, trigger_mode="always_last", **model_queue)
    # Clearing stays outside the queue, where it would wait for the reply that it ends. Gradio's `cancels` loses messages.
    chatbot.clear(forget, chat_inputs[1:], [chatbot, *readings, plot], concurrency_limit=None, show_progress="hidden")
    head.change(look, [page, head], plot, **model_queue)
    limits = [halting.change, threshold.change]
    gr.on(limits, limited, [scores, place, halting, threshold], [bars, passage], show_progress="hidden")


if __name__ == "__main__":
    # With system fonts the page fetches no fonts.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    demo.launch(share=False, theme=theme, css_paths=Path(__file__).with_name("style.css"), footer_links=[])
