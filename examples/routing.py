"""Routing by topic: a head trained on forty prompts names the topic of a request in the pass that begins the reply.

Run it with `python examples/routing.py` (extras `train` and `demo`). Training takes seconds: the frozen model reads each
prompt once, and the head has about 2,000 parameters.
"""

import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from llama_probe import ProbeTrainer
from llama_probe.backbone.loading import load_tokenizer
from llama_probe.data.prompts import PromptFormat


PROMPTS = {
    "code": (
        "Why does my Python loop skip every second item?",
        "Write a function that reverses a linked list.",
        "How do I undo the last commit in git?",
        "What does a segmentation fault mean in C?",
        "Explain the difference between a list and a tuple.",
        "My unit test passes alone but fails in the suite.",
        "Convert this SQL query so that it uses a join.",
        "How can I read a large CSV file line by line?",
        "Rename a variable in all files of my project.",
        "Which HTTP status should my API return for a missing row?",
    ),
    "cooking": (
        "How long should I boil eggs so that the yolk stays soft?",
        "What can I use instead of butter in a cake?",
        "Give me a recipe for lentil soup.",
        "My bread dough does not rise. What went wrong?",
        "Which spices go well with roasted carrots?",
        "How do I stop rice from sticking to the pot?",
        "At what temperature do I bake a lasagne?",
        "Can I freeze fresh herbs for the winter?",
        "Suggest a quick dinner with chickpeas and spinach.",
        "Which knife should I use to cut onions?",
    ),
    "travel": (
        "What should I see in Lisbon in two days?",
        "Is the night train from Vienna to Rome worth it?",
        "Do I need a visa to visit Japan for a month?",
        "Which month is best for hiking in the Alps?",
        "How do I get from the airport to the old town of Prague?",
        "Recommend a quiet island in Greece for a family.",
        "What should I pack for a week in Iceland?",
        "Can I bring a bicycle on the ferry to Denmark?",
        "How early must I be at the gate for an international flight?",
        "Find me a hostel near the beach in Barcelona.",
    ),
    "other": (
        "Who painted the Mona Lisa?",
        "Write a birthday wish for my grandmother.",
        "How far away is the moon?",
        "My neighbour plays loud music at night. What can I do?",
        "Explain inflation in simple words.",
        "Which exercises help against back pain?",
        "Tell me a joke about penguins.",
        "What is the square root of 144?",
        "Give my new puppy a name.",
        "How do I remove ink from a shirt?",
    ),
}
REQUESTS = (
    "Why is my regular expression so slow?",
    "What do I do with overripe bananas?",
    "Plan a long weekend in Edinburgh for me.",
    "How do I catch an exception in Java?",
    "How thin should I roll out pasta?",
    "Where can I watch whales in Norway?",
    "Who wrote Don Quixote?",
)

with tempfile.TemporaryDirectory() as folder:
    rows = Path(folder) / "prompts.jsonl"
    lines = [json.dumps({"text": text, "label": topic}) for topic, texts in PROMPTS.items() for text in texts]
    rows.write_text("\n".join(lines))
    # The number of rows decides on head type, learning rate and epochs, and on validation by folds.
    recipe = {"labels": {"names": list(PROMPTS)}, "train": [str(rows)]}
    trainer = ProbeTrainer.from_recipe(recipe, backbone="demo", output_dir=Path(folder) / "topic")
    trainer.train()
    trainer.save_model()
    results = trainer.results
    model = AutoModel.from_pretrained("demo", probe={"topic": Path(folder) / "topic"})

validation = results["summary"]["validation"]["accuracy"]["mean"]
print(
    f"a {results['probe_type']} head of {results['num_parameters']:,} parameters, cross-validation accuracy "
    f"{validation:.0%} on {results['data']['validation']['rows']} prompts"
)

tokenizer = load_tokenizer("demo")
inputs = PromptFormat.from_config(model.probes["topic"].config, tokenizer).batch(REQUESTS)
out = model.generate(**inputs, max_new_tokens=12, do_sample=False, tokenizer=tokenizer)

table = Table("request", "topic", "probability", "the reply begins")
scores = out.probe_probabilities["topic"].max(dim=-1).values.tolist()
for request, topic, score, reply in zip(REQUESTS, out.probe_labels["topic"], scores, out.texts, strict=True):
    table.add_row(request, topic, f"{score:.2f}", " ".join(reply.split()))
Console().print(table)
