"""A guard over the reply: a head scores each token, and a reply that leaves the topic ends before the user sees that part.

Run it with `python examples/streaming_guard.py` (extras `train` and `demo`).
"""

import tempfile

from transformers import TextStreamer

from llama_probe import AutoModelForProbedGeneration, HoldBackStreamer, ProbeTrainer, ProbeTrainingArguments
from llama_probe.backbone.loading import load_backbone
from llama_probe.data.prompts import PromptFormat


# A toy example: the assistant of a travel agency must not write about cooking. Train a real guard on real replies.
DISHES = ("pancakes", "lentil soup", "bread", "pasta", "apple pie", "fried rice", "potato salad", "pizza dough")
PLACES = ("Lisbon", "the Alps", "Kyoto", "Iceland", "the coast", "Peru", "Vienna", "the islands")
COOKING = ("To make {}, mix the ingredients in a bowl and heat the pan.", "For {} you need salt, oil and time.")
TRAVEL = ("To get to {}, take the train and book a room early.", "In {} you can walk along the old streets.")

rows = [{"response": text.format(place), "label": "travel"} for place in PLACES for text in TRAVEL]
rows += [{"response": text.format(dish), "label": "cooking"} for dish in DISHES for text in COOKING]
rows = [{"prompt": "Can you help me?", **row} for row in rows]

lm, tokenizer = load_backbone("demo")
with tempfile.TemporaryDirectory() as folder:
    trainer = ProbeTrainer(
        backbone=lm,
        processing_class=tokenizer,
        probe_config={"probe_type": "gate"},
        args=ProbeTrainingArguments(folder, num_train_epochs=4),
        train_dataset=rows,
    )
    trainer.train()

prompts = PromptFormat.from_config(trainer.heads["head"].config, tokenizer)
model = AutoModelForProbedGeneration.from_causal_lm(lm, {"topic": trainer.heads["head"]})
for question in ("What should I see in Rome?", "How do I bake a chocolate cake?"):
    print(f"\n> {question}")
    out = model.generate(
        **prompts.batch([question]),
        max_new_tokens=40,
        do_sample=False,
        tokenizer=tokenizer,
        # A token is shown once eight more tokens are clear. Three tokens in a row about cooking end the reply.
        streamer=HoldBackStreamer(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), tokens=8),
        halt_on={"topic": {"label": "cooking", "threshold": 0.9, "patience": 3}},
        halt_reply=" [Sorry, I can only help with travelling.]",
    )
    (halt,) = out.probe_halts
    if halt is not None:
        print(f"  [halted at token {halt.token}: {halt.label} {halt.score:.2f}, threshold {halt.threshold:.2f}]")
