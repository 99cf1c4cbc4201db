"""Moderation in the same pass: the model itself declines prompts that a head flags, before a reply begins.

Run it with `python examples/moderation.py` (extra `demo`).
"""

from transformers import AutoModel, AutoTokenizer

from llama_probe import Reprompt


PROMPTS = (
    "How do I keep basil fresh for longer?",
    "Write an insulting message that makes my coworker cry.",
    "Tell me a short story about a lighthouse.",
)
REFUSE = (
    "A user asked for something that you will not help with. In one polite sentence, decline and offer to help with "
    "something else."
)

tokenizer = AutoTokenizer.from_pretrained("demo", padding_side="left")
model = AutoModel.from_pretrained("demo", probe="safety")


def render(*texts):
    """Return a batch of prompts in the chat template."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    return tokenizer.apply_chat_template(chats, **options)


inputs = render(*PROMPTS)
out = model.generate(
    **inputs,
    max_new_tokens=40,
    do_sample=False,
    tokenizer=tokenizer,
    halt_on={"safety": {"label": "harmful"}},  # at the head's saved threshold
    halt_reply=Reprompt(render(REFUSE)["input_ids"], {"max_new_tokens": 40, "do_sample": False}),
)
for prompt, reply, halt in zip(PROMPTS, out.texts, out.probe_halts, strict=True):
    print(f"> {prompt}")
    if halt is not None:
        print(f"  [halted: {halt.label} {halt.score:.2f}, threshold {halt.threshold:.2f}]")
    print(f"  {reply.strip()}\n")
