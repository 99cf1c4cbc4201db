"""`llama-probe benchmark`: what heads cost while a model serves.

`benchmark_options`: what to measure. `meters`: time, memory and operations of a call. `systems`: the model with heads and without.
"""
