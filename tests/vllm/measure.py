"""Print what heads cost on vLLM: tokens that the KV cache holds, CPU seconds and latency, beside plain vLLM.

    VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ALLOW_INSECURE_SERIALIZATION=1 \
        python tests/vllm/measure.py [HEAD]

Eight requests at once, on the demo backbone in bf16. Each engine is a process of its own, and each figure the least of three
calls. The last variable lets the engine run the function that reads the worker's clock.
"""

import json
import subprocess
import sys
import time


REQUESTS, PROMPT, NEW = 8, 128, 33
COPIES = {"plain": 0, "one head": 1, "eight heads": 8}


def cpu_seconds(_) -> float:
    return time.process_time()


def measure(engine: str, head: str) -> None:
    """Print as JSON the tokens of the cache and by case CPU and wall seconds of a prefill and of a decoding step."""
    from vllm import LLM, SamplingParams

    from llama_probe.backbone.loading import demo_backbone
    from llama_probe.vllm import engine_kwargs

    common = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": REQUESTS, "enforce_eager": True}
    heads = {f"head-{number}": head for number in range(COPIES[engine])}
    llm = LLM(**(engine_kwargs("demo", heads, **common) if heads else {"model": str(demo_backbone()), **common}))
    prompts = [{"prompt_token_ids": list(range(100 + i, 100 + i + PROMPT))} for i in range(REQUESTS)]

    def seconds(new: int, asked: dict) -> tuple[float, float]:
        calls = []
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, extra_args=asked)
        for _ in range(3):
            llm.reset_prefix_cache()
            (cpu,), wall = llm.collective_rpc(cpu_seconds), time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            calls.append((llm.collective_rpc(cpu_seconds)[0] - cpu, time.perf_counter() - wall))
        return tuple(map(min, zip(*calls, strict=True)))

    cases = {engine: {}}
    if engine == "one head":
        cases["cache without heads"] = {"kv_transfer_params": {"probes": []}}
    cache = llm.llm_engine.vllm_config.cache_config
    found = {"tokens": cache.num_gpu_blocks * cache.block_size}
    for case, asked in cases.items():
        short, long = seconds(1, asked), seconds(NEW, asked)
        found[case] = [*short, *((whole - first) / (NEW - 1) for first, whole in zip(short, long, strict=True))]
    print(json.dumps(found))


def main(head: str) -> None:
    plain = None
    for engine in COPIES:
        done = subprocess.run([sys.executable, __file__, engine, head], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # vLLM logs there
        tokens = found.pop("tokens")
        for case, figures in found.items():
            if plain is None:
                plain = tokens, figures
                print(
                    f"plain: {tokens:,} tokens in the cache; milliseconds {[round(1000 * each, 1) for each in figures]}"
                )
            ratios = [each / base for each, base in zip(figures, plain[1], strict=True)]
            print(
                f"{case}: cache {plain[0] / tokens:.2f}x; prefill {ratios[0]:.2f}x CPU, {ratios[1]:.2f}x latency; "
                f"a decoding step {ratios[2]:.2f}x CPU, {ratios[3]:.2f}x latency"
            )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COPIES:
        measure(*sys.argv[1:])
    else:
        main(*sys.argv[1:] or ["toxicchat-mha"])
