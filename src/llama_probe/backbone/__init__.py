"""The frozen language model: its layers, hidden states, cache and fingerprint. Knows no head."""
