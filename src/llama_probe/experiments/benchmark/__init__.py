"""`llama-probe benchmark`: what heads cost while a model serves, beside other ways to the same labels."""
