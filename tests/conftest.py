"""Tiny random models: every test runs on them, without a network and within seconds."""

import copy
import gc
import gzip
import json
import os
import sys
from itertools import pairwise


os.environ["TOKENIZERS_PARALLELISM"] = "false"
gc.disable()  # while modules are loaded, none of which is garbage; see pytest_collection_finish
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, and their models gain nothing from threads
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the processors to the other tests

from importlib.util import find_spec
from pathlib import Path

import hub_server  # noqa: F401 - before all that imports huggingface_hub
import pytest
import torch
import transformers.pipelines  # noqa: F401 - before this package, which test_auto_classes.py imports first
from hub_server.fixture import alices_token, hub  # noqa: F401 - fixtures for all tests
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_probe import LlamaForProbedGeneration, ProbeConfig, ProbeModel
from llama_probe.data import prompts as prompts_module
from llama_probe.evaluation import plots
from llama_probe.heads import import_head_types, registry
from llama_probe.heads.novelty import Novelty, novelty_layers


# These run in an environment of their own: make test-vllm.
collect_ignore = [] if find_spec("vllm.version") else ["vllm"]


def pytest_collection_finish(session):
    """The Trainer collects garbage at the end of each training. Modules that are loaded by now are none."""
    gc.freeze()
    gc.enable()


VOCAB, HIDDEN, LAYERS = 97, 32, 4
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make_lm(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama of four layers, large enough weights to make its states differ."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def make_probe(seed: int = 0, **changes) -> ProbeModel:
    """A head of the tiny model's sizes with random weights, the ones that start at zero included."""
    values = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "downcast": 4, "num_attention_heads": 2}
    probe = ProbeModel(ProbeConfig(**{**values, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in probe.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return probe.eval()


def score_turns(head: ProbeModel, states, mask: torch.Tensor, field: str = "logits") -> torch.Tensor:
    """Logits `[..., 1, 2]` of states `[1, tokens, hidden_size]` each: of all tokens that count, or of the turn flagged most, if more."""
    starts = [place for place, (old, new) in enumerate(pairwise([False, *mask[0].tolist()])) if new and not old]
    places, masks = torch.arange(mask.shape[1]), [mask]
    masks += [mask & (places >= first) & (places < end) for first, end in pairwise([*starts, mask.shape[1]])]
    with torch.no_grad():
        found = torch.stack([head(hidden_states=states, attention_mask=each)[field] for each in masks], dim=-2)
    best = (found[..., 1] - found[..., 0]).argmax(dim=-1)
    return found.take_along_dim(best[..., None, None], dim=-2).squeeze(-2)


def with_novelty(probe: ProbeModel, seed: int = 0, rank: int = 6) -> ProbeModel:
    """The head with a novelty that was fitted on random mean states."""
    generator, layers = torch.Generator().manual_seed(seed), novelty_layers(probe.config)
    sums = []
    for rows in (80, 60):
        count = torch.randint(2, 30, (rows,), generator=generator).float().expand(len(layers), -1)
        noise = torch.randn(len(layers), rows, probe.config.hidden_size, generator=generator)
        # Rows from near to far: prompts then have novelties from 0 to 1.
        far = 0.02 + 2 * torch.rand(rows, 1, generator=generator)
        sums.append((far * noise * count[..., None], count))
    settings = {"layers": layers, "rank": min(rank, len(layers) * probe.config.hidden_size - 1)}
    probe.set_novelty(Novelty.fit(probe.config.replace(novelty=settings), *sums))
    return probe


def probed(heads=None, **lm_changes) -> LlamaForProbedGeneration:
    """A fresh tiny model with these heads."""
    return LlamaForProbedGeneration.from_causal_lm(make_lm(**lm_changes), heads)


save_head, read_head = ProbeModel.save_pretrained, ProbeModel.from_pretrained


def make_prompts(rows: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Prompt ids without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(prompts: torch.Tensor) -> torch.Tensor:
    """A mask of prompts of which the first has three columns of padding before it."""
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    return mask


def expected_logits(probe: ProbeModel, ids: torch.Tensor, mask: torch.Tensor | None = None, lm=None) -> torch.Tensor:
    """A head's logits from a plain `output_hidden_states` pass and its whole-tensor path."""
    with torch.no_grad():
        states = (lm or make_lm())(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return probe(hidden_states=states, attention_mask=mask).logits


@pytest.fixture(scope="session", autouse=True)
def markers_are_learned_once():
    """Remember the turns of a chat template: they are learned from hundreds of texts, and most tests have the same."""
    learn, known = prompts_module.learn_turn_markers, {}

    def remember(render):
        tokenizer = render.__self__.tokenizer
        key = tokenizer.chat_template, tokenizer.backend_tokenizer.to_str()
        if key not in known:
            known[key] = learn(render)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_module, "learn_turn_markers", remember)
        yield


@pytest.fixture
def lm() -> LlamaForCausalLM:
    return make_lm()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def no_plots(monkeypatch):
    """Training runs draw nothing: plots take longer than the training of a tiny head."""
    monkeypatch.setattr(plots, "find_spec", lambda name: None)


@pytest.fixture
def prompts() -> torch.Tensor:
    return make_prompts()


CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<bos>system\nBe kind.<eos>\n{% endif %}"
    "{% for message in messages %}<bos>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def make_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 260 tokens with a chat template; with `adds_bos` it puts a BOS before raw text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def copies(tmp_path_factory) -> Path:
    """Local copies of data sets known by name, a few rows each."""
    folder = tmp_path_factory.mktemp("copies")
    words = ("kind", "rude", "odd", "sad", "shy", "loud")
    tables = {  # labels, and the first and last row of each split
        "toxicchat": (2, {"train": (0, 40), "test": (100, 112)}),
        "emotion": (6, {"train": (0, 30), "validation": (60, 72), "test": (80, 92)}),
        "xstest": (2, {"test": (200, 208)}),
        "goemotions": (2, {"test": (100, 112)}),
    }
    for name, (labels, splits) in tables.items():
        (folder / name).mkdir()
        for split, (first, end) in splits.items():
            lines = []
            for i in range(first, end):
                label = [i % 3 + 1, 27] if name == "goemotions" else i % labels
                row = {"text": f"{words[i % labels]} no {i}", "label": label, "human_annotation": i % 4 < 2}
                lines.append(json.dumps(row))
            (folder / name / f"{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """A tiny random chat model with its tokenizer, as a folder that transformers loads."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny-chat"
    make_lm(vocab_size=260).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


OWN_TYPE = """
import torch
from llama_probe.heads import Aggregator, Classifier, masked_max, register_probe_type


@register_probe_type("top")
class Top(Aggregator):
    @classmethod
    def create_classifier(cls, config):
        return Classifier(2 * config.hidden_size, config.num_labels)

    def update(self, state, x, mask, slots):
        top = masked_max(x, mask)
        return top if state is None else torch.maximum(state, top)

    def result(self, state, slots):
        return state if self.num_slots > 1 else torch.cat([state, -state], dim=-1)
"""


@pytest.fixture
def own_type(tmp_path, monkeypatch):
    """A saved head of a type that is then forgotten, as in another process. `top.py` beside the folder registers it."""
    monkeypatch.setattr(registry, "_PROBE_TYPES", dict(registry._PROBE_TYPES))
    forget_own_type()  # an earlier test may have imported it
    path = tmp_path / "top.py"
    path.write_text(OWN_TYPE)
    import_head_types(path)
    torch.manual_seed(0)
    config = ProbeConfig(probe_type="top", hidden_size=HIDDEN, num_hidden_layers=LAYERS)
    ProbeModel(config).save_pretrained(tmp_path / "head")
    forget_own_type()
    yield tmp_path / "head"
    forget_own_type()  # the test may have loaded it, and the next one imports it anew


def forget_own_type():
    registry._PROBE_TYPES.pop("top", None)
    registry._load_entry_points.cache_clear()
    for name in [name for name in sys.modules if name == "top" or name.startswith("top_")]:
        del sys.modules[name]
