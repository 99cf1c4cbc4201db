"""Train a head on your own rows with ProbeTrainer, then use it while the model replies.

Run it with `python examples/train_own_head.py` (extras `train` and `demo`).
"""

import tempfile

from llama_probe import AutoModelForProbedGeneration, ProbeTrainer, ProbeTrainingArguments
from llama_probe.backbone.loading import load_backbone
from llama_probe.data.prompts import PromptFormat


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

rows = [(text, "cooking") for text in COOKING] + [(text, "travel") for text in TRAVEL]
lm, tokenizer = load_backbone("demo")
with tempfile.TemporaryDirectory() as folder:
    trainer = ProbeTrainer(
        backbone=lm,
        processing_class=tokenizer,
        probe_config={"probe_type": "gate"},
        args=ProbeTrainingArguments(folder, num_train_epochs=4),
        train_dataset=[row for i, row in enumerate(rows) if i % 4 < 3],
        eval_dataset=rows[3::4],
    )
    trainer.train()
    print("held-back accuracy:", trainer.evaluate()["eval_accuracy"])

model = AutoModelForProbedGeneration.from_causal_lm(lm, {"topic": trainer.model})
prompts = PromptFormat.from_config(trainer.model.config, tokenizer)
for text in ("How do I cook rice?", "What can I see in Porto?"):
    out = model.generate(**prompts.batch([text]), max_new_tokens=20, do_sample=False)
    print(text, "->", out.probe_labels["topic"][0])
