"""`llama-probe benchmark`: the cost of heads while a model serves, beside other ways to the same labels."""
