"""The frozen language model. Nothing here knows a head.

- `loading`: loads it. `dtype`: the dtype in which a CPU runs it.
- `families`: where the models of each family keep their layers. `decoder`: the layers of one model.
- `capture`: its hidden states, from hooks while it runs. `passes`: which prompts run together. `kv_cache`: its KV cache.
- `fingerprint`: 32 numbers that tell it from a fine-tuned model.
"""
