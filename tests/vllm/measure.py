"""What heads cost on vLLM: tokens that the KV cache holds, and CPU seconds of the engine's worker for prefill and decoding, with
and without heads, in turn.

    VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ALLOW_INSECURE_SERIALIZATION=1 \
        python tests/vllm/measure.py [HEAD]

An engine is a process of its own; each figure is the least of three calls, and each engine is started twice. The last variable
lets the engine run the function that reads the worker's clock.
"""

import subprocess
import sys
import time


PROMPT, NEW = 128, 65


def cpu_seconds(_) -> float:
    return time.process_time()


def measure(head: str | None) -> None:
    """Prints the tokens that the cache holds, and the CPU seconds of a prefill and of a decoding step, for one request and for
    eight."""
    from vllm import LLM, SamplingParams

    from llama_probe.backbone.loading import demo_backbone
    from llama_probe.vllm import engine_kwargs

    common = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True}
    llm = LLM(**(engine_kwargs("demo", head, **common) if head else {"model": str(demo_backbone()), **common}))
    cache = llm.llm_engine.vllm_config.cache_config
    print("tokens", cache.num_gpu_blocks * cache.block_size)
    for requests in (1, 8):
        prompts = [{"prompt_token_ids": list(range(100 + i, 100 + i + PROMPT))} for i in range(requests)]
        least = {}
        for new in (1, NEW):
            spent = []
            for _ in range(3):
                llm.reset_prefix_cache()
                (begin,) = llm.collective_rpc(cpu_seconds)
                params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
                llm.generate(prompts, params, use_tqdm=False)
                spent.append(llm.collective_rpc(cpu_seconds)[0] - begin)
            least[new] = min(spent)
        print(requests, least[1], (least[NEW] - least[1]) / (NEW - 1))


def main(head: str) -> None:
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    tokens = {}
    for engine in ("plain", head) * 2:
        done = subprocess.run([sys.executable, __file__, "--engine", engine], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        for line in done.stdout.splitlines():
            words = line.split()
            if len(words) == 3 and words[0] in ("1", "8"):
                found.setdefault((int(words[0]), engine), []).append((float(words[1]), float(words[2])))
            elif len(words) == 2 and words[0] == "tokens":
                tokens[engine] = int(words[1])
    print(
        f"the cache holds {tokens['plain']:,} tokens, with {head} {tokens[head]:,}: {tokens['plain'] / tokens[head]:.2f}x"
    )
    for requests in (1, 8):
        (prefill, step), (probed_prefill, probed_step) = (
            [sum(part) / len(part) for part in zip(*found[requests, engine], strict=True)]
            for engine in ("plain", head)
        )
        print(
            f"{requests} at once: prefill of {PROMPT} tokens {1000 * prefill:.0f} ms, with {head} {probed_prefill / prefill:.2f}x; "
            f"a decoding step {1000 * step:.1f} ms, {probed_step / step:.2f}x"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        measure(None if sys.argv[2] == "plain" else sys.argv[2])
    else:
        main(*sys.argv[1:] or ["toxicchat-mha"])
