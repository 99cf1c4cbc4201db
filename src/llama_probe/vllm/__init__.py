"""vLLM with probe heads: scores, labels and text of every request from the same pass.

`vllm.LLM(**engine_kwargs(model, probe=...))` loads an engine; `python -m llama_probe.vllm MODEL --probe HEAD` serves one over
HTTP. The result of a request is in its output's `kv_transfer_params`. This is the only field that vLLM lets a plugin fill in the
engine and carries to the HTTP response; see `results` and docs/http.md.

A request passes these files:

1. `middleware` checks the body of an HTTP request, and leaves the rest to vLLM's server. A request for labels alone becomes a
   request for completions (`label_routes`).
2. `scheduler` begins the prompt as vLLM does: in chunks, or with a part of it from the prefix cache. `connector` notes which
   prompts a step completes and which tokens of replies the step reads, and tells the workers.
3. `models` are vLLM's model classes with one more cache (`paged_states`): of hidden states, or of the features that heads make of
   them (`cache_plan`). vLLM pages, fills and shares this cache as it does with keys and values.
4. In a worker, `connector` has the heads read the pages of complete prompts, and of the newest token of each reply (`scoring`).
   The logits of a step go back in one copy (`step_scores`).
5. `scheduler` ends a halted request before a token is delivered, holds tokens of replies back until they are scored (`replies`),
   and puts the results into outputs (`results`).
6. `middleware` puts the results into the response (`payloads`) or its stream (`events`), and counts them (`counters`). If a head
   is unsure, a `judge` decides first.

Before any request, `__main__` (with `halting_words`) and `engine` make the arguments of an engine, and refuse those that do not go
with heads (`compatibility`, `backbone_check`). `settings` carries the heads to all processes, in which `plugin` registers the model
classes. `patches` starts vLLM's server.
"""

import importlib
from typing import Any


__all__ = ["engine_kwargs"]


def __getattr__(name: str) -> Any:
    """Import the function on first use: the import takes seconds, too long for `--help` or a refused option."""
    if name in __all__:
        return getattr(importlib.import_module(".engine", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
