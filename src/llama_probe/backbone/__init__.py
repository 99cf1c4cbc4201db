"""The frozen language model: its layers, hidden states, KV cache and fingerprint. Knows no head."""
