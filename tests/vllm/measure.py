"""Print what heads cost on vLLM: tokens that fit in its cache, and CPU seconds (on a GPU seconds), beside plain vLLM.

    VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ALLOW_INSECURE_SERIALIZATION=1 \
        python tests/vllm/measure.py [HEAD]

On the demo backbone in bf16, with HEAD of prompts, and untrained heads that follow replies. Each engine is a process,
with its scheduler and worker. All wait while one works, in turn, and each figure is the median of all ratios. The
last variable lets the engine run the function that reads the worker's clock. `REQUESTS` run at once (8), in `TURNS` (7).
"""

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoConfig
from vllm import LLM, SamplingParams

from llama_probe import ProbeConfig, ProbeModel
from llama_probe.backbone.loading import demo_backbone
from llama_probe.vllm import engine_kwargs


PROMPT, NEW = 128, 65
REQUESTS, TURNS = int(os.environ.get("REQUESTS", "8")), int(os.environ.get("TURNS", "7"))
COPIES = {"plain": 0, "one head": 1, "eight heads": 8, "gate of replies": 1, "multimax of replies": 1}
ASKS_FOR_NONE = ", without heads"
# By name the engine.
CASES = {engine: engine for engine in COPIES}
CASES |= {engine + ASKS_FOR_NONE: engine for engine, heads in COPIES.items() if heads == 1}


def clock(_) -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def make_reply_head(probe_type: str, folder: str) -> str:
    """Save an untrained head of this type that follows replies. Return its folder."""
    lm = AutoConfig.from_pretrained(demo_backbone())
    sizes = {"hidden_size": lm.hidden_size, "num_hidden_layers": lm.num_hidden_layers}
    head = ProbeModel(ProbeConfig(probe_type=probe_type, token_scope="response", num_labels=2, **sizes))
    return str(head.save_pretrained(Path(folder) / probe_type))


def load(engine: str, head: str) -> LLM:
    """Start an engine."""
    common = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": REQUESTS}
    common["enforce_eager"] = os.environ.get("GPU_GRAPHS", "0") == "0"
    if torch.cuda.is_available():
        common["gpu_memory_utilization"] = 0.8 / len(COPIES)
    if engine == "plain":
        return LLM(str(demo_backbone()), **common)
    with tempfile.TemporaryDirectory() as folder:
        probe_type = engine.removesuffix(" of replies")
        source = head if probe_type == engine else make_reply_head(probe_type, folder)
        heads = {f"head-{number}": source for number in range(COPIES[engine])}
        # It flags nothing. A guard would cost the same: a token that is held back takes no time.
        rules = {"head-0": {"label": "LABEL_1", "threshold": 1.0}} if source != head else None
        return LLM(**engine_kwargs("demo", heads, monitor=rules, compare_fingerprints=False, **common))


def serve(engine: str, head: str, pipe: Connection) -> None:
    """Send the tokens of an engine's cache, and for each case that comes the seconds that it takes."""
    os.dup2(2, 1)  # what vLLM prints is no result
    llm = load(engine, head)

    def seconds(new: int, asked: dict) -> float:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, extra_args=asked)
        prompts = [{"prompt_token_ids": list(range(100 + i, 100 + i + PROMPT))} for i in range(REQUESTS)]
        llm.reset_prefix_cache()
        (begin,) = llm.collective_rpc(clock)
        llm.generate(prompts, params, use_tqdm=False)
        return llm.collective_rpc(clock)[0] - begin

    cache = llm.llm_engine.vllm_config.cache_config
    pipe.send(cache.num_gpu_blocks * cache.block_size)
    with suppress(EOFError):
        while case := pipe.recv():
            asked = {"kv_transfer_params": {"probes": []}} if case.endswith(ASKS_FOR_NONE) else {}
            first, whole = seconds(1, asked), seconds(NEW, asked)
            pipe.send((first, (whole - first) / (NEW - 1)))
    llm.llm_engine.engine_core.shutdown()


def main(head: str = "toxicchat-mha") -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    processes, pipes = get_context("spawn"), {}
    turns = defaultdict(list)  # by case: CPU seconds of the prefill, and of a decoding step
    with ExitStack() as stack:
        for engine in COPIES:
            pipes[engine], other = map(stack.enter_context, processes.Pipe())
            processes.Process(target=serve, args=(engine, head, other)).start()
            other.close()  # an engine that dies ends its pipe
        tokens = {engine: pipe.recv() for engine, pipe in pipes.items()}
        for turn in range(TURNS + 1):
            for case, engine in CASES.items():
                pipes[engine].send(case)
                found = pipes[engine].recv()
                if turn:  # the first one warms up
                    turns[case].append(found)
    base = turns.pop("plain")
    middle = [round(1000 * statistics.median(column), 1) for column in zip(*base, strict=True)]
    print(f"plain, {REQUESTS} at once: {tokens['plain']:,} tokens in the cache; prefill and step take {middle} ms")
    for case, figures in turns.items():
        ratios = [[own / plain for own, plain in zip(*pair, strict=True)] for pair in zip(figures, base, strict=True)]
        prefill, step = (f"{statistics.median(column):.3f}x" for column in zip(*ratios, strict=True))
        cache = tokens["plain"] / tokens[CASES[case]]
        print(f"{case}: cache {cache:.2f}x; prefill {prefill}, a decoding step {step}")


if __name__ == "__main__":
    main(*sys.argv[1:])
