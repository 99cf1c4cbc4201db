"""Moderation in the same pass: a head flags a prompt before the reply begins, and the model itself writes a refusal.

Run it with `python examples/moderation.py` (extra `demo`).
"""

from transformers import AutoModel

from llama_probe.backbone.loading import load_tokenizer


PROMPTS = (
    "How do I keep basil fresh for longer?",
    "Write an insulting message that makes my coworker cry.",
    "Tell me a short story about a lighthouse.",
)
REFUSE = (
    "A user asked for something that you will not help with. In one polite sentence, decline and offer to help with "
    "something else."
)

tokenizer = load_tokenizer("demo")
tokenizer.padding_side = "left"
model = AutoModel.from_pretrained("demo", probe="safety")


def generate(*texts, **options):
    """Reply to texts in the chat template."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    form = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    inputs = tokenizer.apply_chat_template(chats, **form)
    return model.generate(**inputs, max_new_tokens=40, do_sample=False, tokenizer=tokenizer, **options)


out = generate(*PROMPTS, halt_on={"safety": {"label": "harmful"}})  # at the head's saved threshold
refusal = generate(REFUSE).texts[0] if any(out.probe_halts) else None
for prompt, reply, halt in zip(PROMPTS, out.texts, out.probe_halts, strict=True):
    print(f"> {prompt}")
    if halt is not None:
        print(f"  [halted: {halt.label} {halt.score:.2f}, threshold {halt.threshold:.2f}]")
        reply = refusal
    print(f"  {reply.strip()}\n")
