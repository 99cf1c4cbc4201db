"""vLLM with probe heads: scores, labels and text of every request from the same pass.

`vllm.LLM(**engine_kwargs(model, probe=...))` loads an engine; `python -m llama_probe.vllm MODEL --probe HEAD` serves one over
HTTP, with OpenAI's API. Each request's output then carries what the heads say of its prompt:

    output = llm.generate(prompts)[0]
    output.kv_transfer_params["probes"]["toxicchat-mha"]
    # {"logits": [...], "label": "non-toxic", "score": 0.98, "scores": {"non-toxic": 0.98, "toxic": 0.02}}

and with `halt_on=` `kv_transfer_params["halted"]`: why a prompt got no reply, or `None`. A request may ask for some of the
heads alone with `SamplingParams(extra_args={"kv_transfer_params": {"probes": [names]}})`, over HTTP
`"kv_transfer_params": {"probes": [names]}`; those in `halt_on` run in any case. `kv_transfer_params` is the one field that
vLLM lets a plugin fill in from the engine to the HTTP response.

How it works, by file: `models` are vLLM's model classes with a cache (`state_cache`) of hidden states, or of the numbers that
heads make of them (`cache_plan`), paged, and filled and shared between requests as the keys and values are; so prompts may come
in chunks, or be found in the prefix cache.
`connector` notes which prompts are complete after a step, has their heads run on what is cached (`scoring`), and
takes the logits to the scheduler's process, where `scheduler` adds what they mean (`answers`) to the outputs, and ends
requests that are halted before a token is delivered. `middleware`, `payloads`, `label_routes` and `metrics` are for what
clients see over HTTP.
"""

import importlib
from typing import Any


__all__ = ["engine_kwargs"]


def __getattr__(name: str) -> Any:
    """Import the function on first use: that takes seconds, too long for `--help` or a refusal of the server."""
    if name in __all__:
        return getattr(importlib.import_module(".engine", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
