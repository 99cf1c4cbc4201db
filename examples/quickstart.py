"""Text and labels from one forward pass, on the demo backbone.

Run it with `python examples/quickstart.py` (extra `demo`).
"""

from transformers import AutoModel

from llama_probe.backbone.loading import load_tokenizer


backbone = "demo"  # or a Hub id or folder that the heads were trained for
tokenizer = load_tokenizer(backbone)  # AutoTokenizer does not know the demo
model = AutoModel.from_pretrained(backbone, probe=["safety", "sst2-mha"])  # llama_probe adds the argument probe

chat = [{"role": "user", "content": "This film was a delight from start to finish."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=30, do_sample=False, tokenizer=tokenizer)

print("reply: ", out.texts[0])
for name, labels in out.probe_labels.items():
    print(f"{name}: {labels[0]} {out.probe_probabilities[name][0].tolist()}")
