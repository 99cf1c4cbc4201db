"""Texts, prompts, and hidden states of a data set."""
