"""`llama-probe reproduce`: methods trained, judged and laid side by side, as in the tables of arXiv 2601.13288."""
