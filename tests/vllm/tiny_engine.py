"""Tiny random backbones that vLLM's CPU kernels take, heads for them, and what transformers says with these."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import make_probe, make_tokenizer
from transformers import PreTrainedModel
from vllm import LLM, RequestOutput, SamplingParams

from llama_probe import AutoModelForProbedGeneration
from llama_probe.vllm import engine_kwargs


HIDDEN = 128
# With weights of 0.2, which the other tests have, rounding alone moves states by 3e-4, and scores by 1e-4: states in fp32 of transformers
# are then as far from those in fp64 as the ones in vLLM's cache are. So it is no kernel of vLLM's that differs.
SIZES = {
    "vocab_size": 260,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.12,
}
PREFIX = [1, 30, 31]  # what "content" heads leave out
HEADS = {
    "guard": {
        "probe_type": "mha",
        "downcast": 8,
        "id2label": {0: "fine", 1: "bad"},
        "token_scope": "content",
        "prefix_ids": PREFIX,
        "threshold": 0.4,
        "temperature": 4.0,
    },
    "tone": {"probe_type": "gate", "layers": [1, 3], "num_labels": 3, "temperature": 2.0},
    "topics": {
        "probe_type": "attentive",
        "options": {"num_queries": 1, "value_rank": 4},  # an odd number of features, which two ranks share
        "num_labels": 3,
        "problem_type": "multi_label_classification",
    },
    "size": {"probe_type": "last", "num_labels": 1, "problem_type": "regression"},
    "mood": {"probe_type": "multimax", "options": {"num_maxima": 2, "num_members": 3}, "num_labels": 2},
}
REPLY_HEADS = {
    "watch": {"probe_type": "gate", "layers": [1, 3], "id2label": {0: "fine", 1: "bad"}, "token_scope": "response"},
    "theme": {
        "probe_type": "multimax",
        "options": {"num_maxima": 2, "num_members": 3},
        "num_labels": 3,
        "token_scope": "all",
        "prefix_ids": PREFIX,
    },
    "tags": {
        "probe_type": "attentive",
        "num_labels": 2,
        "problem_type": "multi_label_classification",
        "token_scope": "response",
    },
    "end": {"probe_type": "last", "num_labels": 1, "problem_type": "regression", "token_scope": "all"},
    "mean": {"probe_type": "pooling", "layers": [2, 4], "num_labels": 2, "token_scope": "response"},
}
OPTIONS = {"dtype": "float32", "enforce_eager": True}  # of every engine; `gpu` sets others
LENGTHS = (1, 5, 17, 31, 32, 33, 64, 90, 120, 150, 200)


def make_ids(length: int, seed: int) -> list[int]:
    return torch.randint(4, 260, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [PREFIX * (seed % 2) + make_ids(length, seed) for seed, length in enumerate(LENGTHS)]


@dataclass
class TinyServing:
    """Folders of a backbone and of heads by name, and the probed model of transformers."""

    backbone: Path
    heads: dict[str, str]
    model: PreTrainedModel = field(repr=False)

    def reference(self, ids: list[int], max_new_tokens: int = 1):
        """What `generate` gives for one prompt, greedily, whatever the end-of-sequence token."""
        prompt = torch.tensor([ids])
        return self.model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None)

    def token_logits(self, ids: list[int], reply: list[int], name: str) -> torch.Tensor:
        """What a head says after each token of a reply, `[tokens, num_labels]`: of the states of the whole text so far."""
        head, text = self.model.probes[name], torch.tensor([[*ids, *reply]])
        with torch.no_grad():
            states = self.model(text, output_hidden_states=True, probes=[]).hidden_states
            mask = torch.ones(1, len(ids))
            mask[:, : len(PREFIX) if ids[: len(PREFIX)] == head.config.prefix_ids else 0] = 0
            mask = mask * (head.config.token_scope == "all")
            lengths = [len(ids) + number + 1 for number in range(len(reply))]
            masks = [torch.cat([mask, torch.ones(1, length - len(ids))], dim=1) for length in lengths]
            found = [
                head(hidden_states=[state[:, :length] for state in states], attention_mask=mask).logits
                for length, mask in zip(lengths, masks, strict=True)
            ]
        return torch.cat(found) if found else torch.zeros(0, head.config.num_labels)

    def check_tokens(self, ids: list[int], reply: list[int], said: dict, scored: int | None = None, atol=1e-5) -> None:
        """Raises where what vLLM says of a reply's tokens is not what the heads say of the whole text."""
        assert list(said["probes"]) == [name for name in self.heads if name in REPLY_HEADS]
        for name, probe in said["probes"].items():
            expected = self.token_logits(ids, reply, name)
            logits = torch.tensor(probe["token_logits"]).view(-1, expected.shape[1])
            scored = len(reply) if scored is None else scored
            assert probe["tokens"] == len(logits) == scored
            torch.testing.assert_close(logits, expected[:scored], rtol=1e-5, atol=atol)

    def threshold(self, prompts: list[list[int]]) -> float:
        """From which on `guard` flags about half of some prompts; far from the probability of each."""
        scores = sorted(float(self.reference(ids).probe_probabilities["guard"][0, 1]) for ids in prompts)
        middle = range(len(scores) // 3, 2 * len(scores) // 3 + 1)
        low, high = max(((scores[i - 1], scores[i]) for i in middle), key=lambda pair: pair[1] - pair[0])
        assert high - low > 1e-3
        return (low + high) / 2

    def is_flagged(self, ids: list[int], threshold: float) -> bool:
        return float(self.reference(ids).probe_probabilities["guard"][0, 1]) >= threshold

    def check(self, probes: dict, ids: list[int], heads=tuple(HEADS)) -> None:
        """Raises where what vLLM says of a prompt is not what transformers says."""
        reference = self.reference(ids)
        assert list(probes) == list(heads)
        for name, said in probes.items():
            logits = torch.tensor(said["logits"])
            torch.testing.assert_close(logits, reference.probe_logits[name][0], rtol=1e-5, atol=1e-5)
            probabilities = reference.probe_probabilities[name][0].tolist()
            config = self.model.probes[name].config
            if config.problem_type == "regression":
                assert said["score"] == pytest.approx(probabilities[0], abs=1e-5)
            else:
                assert said["label"] == reference.probe_labels[name][0]
                assert list(said["scores"]) == list(config.id2label.values())
                assert list(said["scores"].values()) == pytest.approx(probabilities, abs=1e-5)

    def check_replies(
        self, outputs: Sequence[RequestOutput], prompts: Sequence[list[int]], threshold: float, new: int
    ):
        """Raises where a prompt's scores, its halt or its `new` tokens are not those of transformers."""
        for ids, output in zip(prompts, outputs, strict=True):
            self.check(output.kv_transfer_params["probes"], ids)
            (reply,), why = output.outputs, output.kv_transfer_params["halted"]
            if self.is_flagged(ids, threshold):
                assert (reply.text, list(reply.token_ids)) == ("", [])
                assert (reply.finish_reason, reply.stop_reason) == ("stop", "guard")
                assert (why["head"], why["label"], why["threshold"]) == ("guard", "bad", threshold)
                assert why["score"] == output.kv_transfer_params["probes"]["guard"]["scores"]["bad"]
            else:
                expected = self.reference(ids, max_new_tokens=new).sequences[0, len(ids) :]
                assert list(reply.token_ids) == expected.tolist()
                assert (reply.finish_reason, why) == ("length", None)


def make_serving(folder: Path, lm: PreTrainedModel, kinds: Mapping[str, dict] = HEADS) -> TinyServing:
    """A backbone and heads of each kind of problem, reading all layers, some, or one, as folders."""
    lm.save_pretrained(folder / "lm")
    make_tokenizer().save_pretrained(folder / "lm")
    heads = {name: str(folder / name) for name in kinds}
    for seed, (name, config) in enumerate(kinds.items()):
        probe = make_probe(seed, hidden_size=HIDDEN, **config)
        for parameter in probe.parameters():  # logits of the size that trained heads give
            parameter.data *= 0.2 if config["probe_type"] == "last" else 0.5
        probe.save_pretrained(heads[name])
    return TinyServing(folder / "lm", heads, AutoModelForProbedGeneration.from_pretrained(folder / "lm", probe=heads))


@contextmanager
def running(tiny: TinyServing, threshold: float, processes: int = 1, guard: str = "guard", **changes) -> Iterator[LLM]:
    """An engine that halts by one head and takes prompts in chunks. One process of it can be looked at."""
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 32, "max_num_seqs": 8}
    kwargs = {**OPTIONS, **sizes, **changes}
    halt_on = {guard: {"label": "bad", "threshold": threshold}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(processes > 1)))
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # threads of earlier engines do not survive a fork
        llm = LLM(**engine_kwargs(tiny.backbone, tiny.heads, halt_on=halt_on, **kwargs))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def generate(llm: LLM, prompts: Sequence[list[int]], max_tokens: int = 1, lora=None, **params) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **params)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, lora_request=lora)


def next_turn(llm: LLM, tiny: TinyServing, threshold: float) -> tuple[list[int], RequestOutput]:
    """Ask a prompt of 120 tokens, then the same with its reply of 20 and 30 more; the second prompt and its output."""
    ids = next(ids for ids in (make_ids(120, seed) for seed in range(100, 200)) if not tiny.is_flagged(ids, threshold))
    (first,) = generate(llm, [ids], max_tokens=20)
    following = [*ids, *first.outputs[0].token_ids, *make_ids(30, 1)]
    (second,) = generate(llm, [following])
    tiny.check(second.kv_transfer_params["probes"], following)
    return following, second
