"""Print what heads cost on vLLM: tokens that the KV cache holds, CPU seconds and latency, beside plain vLLM.

    VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ALLOW_INSECURE_SERIALIZATION=1 \
        python tests/vllm/measure.py [HEAD]

Eight requests at once, on the demo backbone in bf16. Each engine is a process of its own. All of them wait while one works, in
turn, and each figure is the median of the turns' ratios. The last variable lets the engine run the function that reads the
worker's clock.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict


REQUESTS, PROMPT, NEW, TURNS = 8, 128, 65, 7
COPIES = {"plain": 0, "one head": 1, "eight heads": 8}  # heads by engine
CASES = {"plain": "plain", "one head": "one head", "cache without heads": "one head", "eight heads": "eight heads"}
_MARK = "measured "  # vLLM logs to the same stream


def cpu_seconds(_) -> float:
    return time.process_time()


def serve(engine: str, head: str) -> None:
    """Start an engine, print the tokens of its cache, and for each case on standard input the seconds that it takes."""
    from vllm import LLM, SamplingParams

    from llama_probe.backbone.loading import demo_backbone
    from llama_probe.vllm import engine_kwargs

    common = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": REQUESTS, "enforce_eager": True}
    heads = {f"head-{number}": head for number in range(COPIES[engine])}
    llm = LLM(**(engine_kwargs("demo", heads, **common) if heads else {"model": str(demo_backbone()), **common}))
    prompts = [{"prompt_token_ids": list(range(100 + i, 100 + i + PROMPT))} for i in range(REQUESTS)]

    def seconds(new: int, asked: dict) -> tuple[float, float]:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, extra_args=asked)
        llm.reset_prefix_cache()
        (cpu,), wall = llm.collective_rpc(cpu_seconds), time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return llm.collective_rpc(cpu_seconds)[0] - cpu, time.perf_counter() - wall

    cache = llm.llm_engine.vllm_config.cache_config
    print(f"{_MARK}{cache.num_gpu_blocks * cache.block_size}", flush=True)
    for line in sys.stdin:
        asked = {"kv_transfer_params": {"probes": []}} if line.strip() == "cache without heads" else {}
        first, whole = seconds(1, asked), seconds(NEW, asked)
        steps = [(long - short) / (NEW - 1) for short, long in zip(first, whole, strict=True)]
        print(f"{_MARK}{json.dumps([*first, *steps])}", flush=True)


def main(head: str) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    running = {
        engine: subprocess.Popen([sys.executable, __file__, engine, head], env=quiet, **pipes) for engine in COPIES
    }

    def answer(engine: str) -> str:
        lines = (line for line in running[engine].stdout if line.startswith(_MARK))
        return next(lines).removeprefix(_MARK)

    try:
        tokens = {engine: int(answer(engine)) for engine in COPIES}
        turns = defaultdict(list)  # by case: CPU seconds and latency of the prefill, then of a decoding step
        for turn in range(TURNS + 1):
            for case, engine in CASES.items():
                print(case, file=running[engine].stdin, flush=True)
                found = json.loads(answer(engine))
                if turn:  # the first one warms up
                    turns[case].append(found)
    finally:
        for process in running.values():
            process.stdin.close()  # which ends it
            process.wait()
    plain = turns.pop("plain")
    medians = [round(1000 * statistics.median(each), 1) for each in zip(*plain, strict=True)]
    print(f"plain: {tokens['plain']:,} tokens in the cache; milliseconds {medians}")
    for case, figures in turns.items():
        ratios = [[each / base for each, base in zip(*pair, strict=True)] for pair in zip(figures, plain, strict=True)]
        middle = [f"{statistics.median(each):.2f}x" for each in zip(*ratios, strict=True)]
        print(
            f"{case}: cache {tokens['plain'] / tokens[CASES[case]]:.2f}x; prefill {middle[0]} CPU, {middle[1]} latency; "
            f"a decoding step {middle[2]} CPU, {middle[3]} latency"
        )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COPIES:
        serve(*sys.argv[1:])
    else:
        main(*sys.argv[1:] or ["toxicchat-mha"])
