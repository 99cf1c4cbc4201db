"""Train a head on your own rows with the stock Trainer, then use it while the model replies.

Run it with `python examples/train_own_head.py` (extras `train` and `demo`).
"""

import tempfile

import numpy as np

from llama_probe import AutoModelForProbedGeneration, ProbeConfig, ProbeModel
from llama_probe.backbone.loading import load_backbone
from llama_probe.data.prompts import PromptFormat
from llama_probe.data.states import PromptDataset
from llama_probe.training.trainer import create_trainer, training_arguments


DISHES = (
    "pancakes",
    "a lentil soup",
    "bread",
    "a quick pasta",
    "an apple pie",
    "fried rice",
    "a salad",
    "pizza dough",
)
PLACES = ("Lisbon", "the Alps", "Kyoto", "Iceland", "the coast", "Peru", "Vienna", "an island")
COOKING = [text.format(dish) for dish in DISHES for text in ("How do I make {}?", "What do I need for {}?")]
TRAVEL = [text.format(place) for place in PLACES for text in ("What is there to see in {}?", "How do I get to {}?")]

lm, tokenizer = load_backbone("demo")
prompts = PromptFormat.create(tokenizer)
ids = prompts.encode(COOKING + TRAVEL)
labels = np.array([0] * len(COOKING) + [1] * len(TRAVEL))
rows = np.arange(len(ids))
train, held_back = (PromptDataset([ids[i] for i in part], labels[part]) for part in (rows[rows % 4 < 3], rows[3::4]))

config = ProbeConfig(
    probe_type="gate", id2label={0: "cooking", 1: "travel"}, token_scope="last_user", **prompts.config_fields()
)
probe = ProbeModel(config, backbone=lm)
with tempfile.TemporaryDirectory() as folder:
    args = training_arguments(
        folder, "accuracy", num_train_epochs=4, learning_rate=1e-2, per_device_train_batch_size=8
    )
    trainer = create_trainer(probe, args, train, held_back)
    trainer.train()
    print("held-back accuracy:", trainer.evaluate()["eval_accuracy"])

model = AutoModelForProbedGeneration.from_causal_lm(lm, {"topic": probe})
for text in ("Which spices go into a curry?", "What can I see in Porto?"):
    out = model.generate(**prompts.batch([text]), max_new_tokens=20, do_sample=False)
    print(text, "->", out.probe_labels["topic"][0])
