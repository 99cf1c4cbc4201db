"""`llama-probe benchmark`: what heads cost while a model serves.

`options`: what to measure. `measure`: time, memory and operations of a call. `benchmark`: the model with heads and without.
"""
