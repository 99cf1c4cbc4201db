"""Tiny random backbones that vLLM's CPU kernels take, heads for them, and what `generate` says with these."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import conftest
import pytest
import torch
from conftest import make_probe, make_tokenizer
from tiny_families import TINY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vllm import LLM, RequestOutput, SamplingParams
from vllm.model_executor.models import registry

from llama_probe import AutoModelForProbedGeneration
from llama_probe.vllm import compatibility, engine_kwargs
from llama_probe.vllm.plugin import register


HIDDEN = 128
# With weights of 0.2, which the other tests have, rounding alone moves states by 3e-4 and scores by 1e-4: those in fp32
# of transformers are then as far from those in fp64 as vLLM's are.
SIZES = {"vocab_size": 260, "hidden_size": HIDDEN, "num_attention_heads": 4, "head_dim": 32}
SIZES |= {"max_position_embeddings": 1024, "initializer_range": 0.12}
PREFIX = [1, 30, 31]  # what "content" heads leave out
MULTI = {"probe_type": "multimax", "options": {"num_maxima": 1, "num_members": 5}, "num_labels": 3}
MULTI |= {"problem_type": "multi_label_classification"}
VALUE = {"probe_type": "last", "num_labels": 1, "problem_type": "regression"}
MAXIMA = {"probe_type": "multimax", "options": {"num_maxima": 2, "num_members": 3}}
NAMES = {0: "fine", 1: "bad"}
CONTENT = {"token_scope": "content", "prefix_ids": PREFIX}
# Together an odd number of features, which two ranks share.
HEADS = {
    "guard": {"probe_type": "mha", "downcast": 8, "id2label": NAMES, "threshold": 0.4, "temperature": 4.0, **CONTENT},
    "tone": {"probe_type": "gate", "layers": [1, 3], "num_labels": 3, "temperature": 2.0},
    "topics": MULTI,
    "size": VALUE,
    "mood": {**MAXIMA, "num_labels": 2},
}
REPLY_HEADS = {
    "watch": {"probe_type": "gate", "layers": [1, 3], "id2label": NAMES, "token_scope": "response"},
    "theme": {**MAXIMA, "num_labels": 3, "token_scope": "all", "prefix_ids": PREFIX},
    "tags": {**MULTI, "token_scope": "response"},
    "end": {**VALUE, "token_scope": "all"},
    "mean": {"probe_type": "pooling", "layers": [2, 4], "num_labels": 2, "token_scope": "response"},
}
OPTIONS = {"dtype": "float32", "enforce_eager": True}  # of every engine; `gpu` sets others
LENGTHS = (1, 5, 17, 31, 32, 33, 64, 90, 120, 150, 200)


def make_ids(length: int, seed: int) -> list[int]:
    return torch.randint(4, 260, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [PREFIX * (seed % 2) + make_ids(length, seed) for seed, length in enumerate(LENGTHS)]


@dataclass
class TinyServing:
    """Folders of a backbone and of heads by name, the probed model, and the thresholds of guards by head."""

    backbone: Path
    heads: dict[str, str]
    model: PreTrainedModel = field(repr=False)
    thresholds: dict[str, float] = field(default_factory=dict)
    _references: dict[tuple[int, ...], object] = field(default_factory=dict, repr=False)

    @property
    def rules(self) -> dict[str, dict] | None:
        return {head: {"label": "bad", "threshold": score} for head, score in self.thresholds.items()} or None

    def reference(self, ids: list[int], new: int = 1):
        """What `generate` gives for a prompt, greedily, also behind the end: at least `new` tokens with scores."""
        known = self._references.get(tuple(ids))
        if known is None or known.sequences.shape[1] <= len(ids) + new:
            options = {"max_new_tokens": new + 1, "do_sample": False, "eos_token_id": None}
            known = self._references[tuple(ids)] = self.model.generate(torch.tensor([ids]), **options)
        return known

    def expected(self, ids: list[int], new: int) -> tuple[list[int], tuple[str, int | None] | None]:
        """What a client may see of `new` tokens, and if they are halted the head that does, and at which token."""
        output = self.reference(ids, new)
        tokens = output.sequences[0, len(ids) : len(ids) + new].tolist()
        for head, threshold in self.thresholds.items():
            if head not in REPLY_HEADS and self.score(ids, head) >= threshold:
                return [], (head, None)
        if "watch" in self.thresholds:
            flagged = (output.probe_token_probabilities["watch"][0, :new, 1] >= self.thresholds["watch"]).nonzero()
            if len(flagged):
                return tokens[: int(flagged[0])], ("watch", int(flagged[0]))
        return tokens, None

    def score(self, ids: list[int], head: str = "guard") -> float:
        return float(self.reference(ids).probe_probabilities[head][0, 1])

    def set_thresholds(self, prompts: Sequence[list[int]], new: int = 0) -> None:
        """Have `guard` halt some of these prompts, and `watch` some replies of `new` tokens, far from all scores."""
        scores = sorted(map(self.score, prompts))
        self.thresholds = {"guard": middle_of_gap(scores[len(scores) // 2 - 1 : -1])}
        if new:
            replies = [
                self.reference(ids, new).probe_token_probabilities["watch"][0, :new, 1].tolist()
                for ids in prompts
                if self.expected(ids, 1)[1] is None
            ]
            highest = sorted(map(max, replies))
            third = len(highest) // 3
            low, high = highest[third], highest[-1 - third]
            between = sorted(score for scores in replies for score in scores if low <= score <= high)
            self.thresholds["watch"] = middle_of_gap(between)

    def token_logits(self, ids: list[int], reply: list[int]) -> dict[str, torch.Tensor]:
        """What heads say in `generate` after each token of a reply, `[tokens, num_labels]`, whoever wrote it."""
        known = self.reference(ids, len(reply))
        if known.sequences[0, len(ids) : len(ids) + len(reply)].tolist() != reply:

            def force(text: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                next_token = torch.tensor([*reply, 0])[text.shape[1] - len(ids)]
                return torch.full_like(scores, -torch.inf).index_fill(1, next_token, 0.0)

            options = {"max_new_tokens": len(reply) + 1, "do_sample": False, "eos_token_id": None}
            known = self.model.generate(torch.tensor([ids]), logits_processor=[force], **options)
        return {name: logits[0, : len(reply)] for name, logits in known.probe_token_logits.items()}

    def check_prompt(self, probes: dict, ids: list[int], heads: Sequence[str] | None = None) -> None:
        """Raises where what vLLM says of a prompt is not what transformers says."""
        reference = self.reference(ids)
        assert list(probes) == list(reference.probe_logits if heads is None else heads)
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

    def check_reply(self, ids: list[int], reply: list[int], said: dict, scored: int | None = None, atol=1e-5) -> None:
        """Raises where what vLLM says of a reply's tokens is not what the heads say of the whole text."""
        expected = self.token_logits(ids, reply)
        scored = len(reply) if scored is None else scored
        assert list(said["probes"]) == list(expected)
        for name, probe in said["probes"].items():
            assert probe["tokens"] == len(probe["token_logits"]) == scored
            rows = expected[name][:scored]
            torch.testing.assert_close(torch.tensor(probe["token_logits"]).view_as(rows), rows, rtol=1e-5, atol=atol)

    def check(self, outputs: Sequence[RequestOutput], prompts: Sequence[list[int]], new: int) -> set[str | None]:
        """Raises where scores, halts or the `new` tokens are not those of `generate`. Returns heads that halted."""
        halts = set()
        for ids, output in zip(prompts, outputs, strict=True):
            (reply,), known = output.outputs, output.kv_transfer_params
            tokens, halt = self.expected(ids, new)
            head, token = halt or (None, None)
            halts.add(head)
            self.check_prompt(known["probes"], ids)
            assert list(reply.token_ids) == tokens
            assert (reply.finish_reason, reply.stop_reason) == ("stop" if halt else "length", head)
            halted = known.get("halted")
            shown = halted and [halted[name] for name in ("head", "label", "threshold", "token")]
            assert shown == (halt and [head, "bad", self.thresholds[head], token])
            if halt and token is None:
                assert halted["score"] == known["probes"][head]["scores"]["bad"]
            # No guard of replies waits for the score of the last token.
            scored = new - ("watch" not in self.thresholds)
            if halt:
                scored = 0 if token is None else token + 1
            for said in known.get("replies", ()):
                whole = self.reference(ids, new).sequences[0, len(ids) : len(ids) + new].tolist()
                self.check_reply(ids, whole, said, scored)
                assert said["halted"] == (None if token is None else halted)
        return halts

    @contextmanager
    def running(self, **changes) -> Iterator[LLM]:
        """An engine in this process, that halts by the thresholds and takes prompts in chunks."""
        sizes = {"max_model_len": 256, "max_num_batched_tokens": 32, "max_num_seqs": 8, "disable_log_stats": False}
        kwargs = {**OPTIONS, **sizes, **changes}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # threads of earlier engines do not survive a fork
            llm = LLM(**engine_kwargs(self.backbone, self.heads, halt_on=self.rules, **kwargs))
            try:
                yield llm
            finally:
                llm.llm_engine.engine_core.shutdown()

    def next_turn(self, llm: LLM) -> tuple[list[int], RequestOutput]:
        """Ask a prompt of 120 tokens, then it with its reply of 20 and 30 more. Return the second and its output."""
        prompts = (make_ids(120, seed) for seed in range(100, 200))
        ids = next(ids for ids in prompts if self.expected(ids, 20)[1] is None)
        following = [*ids, *generate(llm, [ids], 20)[0].outputs[0].token_ids, *make_ids(30, 1)]
        (second,) = generate(llm, [following])
        self.check_prompt(second.kv_transfer_params["probes"], following)
        return following, second


def middle_of_gap(scores: Sequence[float]) -> float:
    """Where some sorted scores are farthest from each other."""
    low, high = max(itertools.pairwise(scores), key=lambda pair: pair[1] - pair[0])
    assert high - low > 1e-4
    return (low + high) / 2


def inspect_models(architecture: str) -> None:
    """Have vLLM look at a model class, with heads and without. It keeps what it finds for all processes.

    vLLM itself starts a process for it, which imports vLLM once more: most of the time that a tiny engine takes to start.
    """
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
        for name in (architecture, compatibility.PREFIX + architecture):
            registry.ModelRegistry.models[name].inspect_model_cls()


def make_serving(folder: Path, family: str = "llama", heads: Mapping[str, dict] = HEADS) -> TinyServing:
    """A backbone of a family, and heads of each problem type, reading all layers, some, or one, as folders."""
    inspect_models(TINY[family][1])
    more = TINY[family][2] if family.endswith("_moe") else {}
    if family != "llama":
        more = {**more, "sliding_window": 16}  # shorter than the prompts, where a family has one
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**conftest.SIZES, **more, **SIZES})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "lm")
    make_tokenizer().save_pretrained(folder / "lm")
    folders = {name: str(folder / name) for name in heads}
    for seed, (name, values) in enumerate(heads.items()):
        probe = make_probe(seed, hidden_size=HIDDEN, **values)
        for parameter in probe.parameters():  # logits of the size that trained heads give
            parameter.data *= 0.2 if values["probe_type"] == "last" else 0.5
        probe.save_pretrained(folders[name])
    model = AutoModelForProbedGeneration.from_pretrained(folder / "lm", probe=folders)
    return TinyServing(folder / "lm", folders, model)


def generate(llm: LLM, prompts: Sequence[list[int]], new: int = 1, asked=None, lora=None, **params):
    """The outputs of an engine for `new` greedy tokens, with the scores of each."""
    extra = {"kv_transfer_params": {"token_scores": True} if asked is None else asked}
    params = {"max_tokens": new, "temperature": 0.0, "ignore_eos": True, "extra_args": extra, **params}
    texts = [{"prompt_token_ids": ids} for ids in prompts]
    return llm.generate(texts, SamplingParams(**params), use_tqdm=False, lora_request=lora)


def metric(llm: LLM, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
