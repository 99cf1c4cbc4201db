"""A guard over the reply: a head scores each token, and a reply that leaves the topic is halted before it is shown.

Run it with `python examples/streaming_guard.py` (extras `train` and `demo`).
"""

import tempfile

import numpy as np
from transformers import TextStreamer

from llama_probe import AutoModelForProbedGeneration, HoldBackStreamer, ProbeConfig, ProbeModel
from llama_probe.backbone.loading import load_backbone
from llama_probe.data.prompts import PromptFormat
from llama_probe.data.states import PromptDataset
from llama_probe.training.trainer import create_trainer, training_arguments


# A toy: the assistant of a travel agency must not write about cooking. Train a real guard on real replies.
DISHES = ("pancakes", "lentil soup", "bread", "pasta", "apple pie", "fried rice", "potato salad", "pizza dough")
PLACES = ("Lisbon", "the Alps", "Kyoto", "Iceland", "the coast", "Peru", "Vienna", "the islands")
COOKING = ("To make {}, mix the ingredients in a bowl and heat the pan.", "For {} you need salt, oil and time.")
TRAVEL = ("To get to {}, take the train and book a room early.", "In {} you can walk along the old streets.")

replies = [text.format(place) for place in PLACES for text in TRAVEL]
labels = [0] * len(replies)
replies += [text.format(dish) for dish in DISHES for text in COOKING]
labels = np.array(labels + [1] * (len(replies) - len(labels)))
question = {"role": "user", "content": "Can you help me?"}
chats = [[question, {"role": "assistant", "content": reply}] for reply in replies]

lm, tokenizer = load_backbone("demo")
prompts = PromptFormat.create(tokenizer)
config = ProbeConfig(
    probe_type="gate", id2label={0: "travel", 1: "cooking"}, token_scope="response", **prompts.config_fields()
)
probe = ProbeModel(config, backbone=lm)
ids, masks, _ = prompts.encode_for(config, chats)
with tempfile.TemporaryDirectory() as folder:
    settings = {"num_train_epochs": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    args = training_arguments(folder, "accuracy", **settings, eval_strategy="no", load_best_model_at_end=False)
    create_trainer(probe, args, PromptDataset(ids, labels, masks)).train()

model = AutoModelForProbedGeneration.from_causal_lm(lm, {"topic": probe})
for question in ("What should I see in Rome?", "How do I bake a chocolate cake?"):
    print(f"\n> {question}")
    out = model.generate(
        **prompts.batch([question]),
        max_new_tokens=40,
        do_sample=False,
        tokenizer=tokenizer,
        # A token is shown after eight more; three in a row about cooking end the reply.
        streamer=HoldBackStreamer(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), tokens=8),
        halt_on={"topic": {"label": "cooking", "threshold": 0.9, "patience": 3}},
        halt_reply=" [Sorry, I can only help with travelling.]",
    )
    (halt,) = out.probe_halts
    if halt is not None:
        print(f"  [halted at token {halt.token}: {halt.label} {halt.score:.2f}, threshold {halt.threshold:.2f}]")
