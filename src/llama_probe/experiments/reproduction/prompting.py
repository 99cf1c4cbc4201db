"""Classification by prompting: how likely the LM finds each label as its reply to an instruction, and no training.

The baseline that arXiv 2601.13288 calls zero-shot and few-shot prompting, but by likelihood instead of by generated text, so
that every row gets a score for every label (Brown et al., arXiv 2005.14165, section 2.4).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...backbone.cache import repeat_cache
from ...backbone.passes import Pass, plan_passes
from ...data.prompts import constant_parts, pad_prompts
from ...errors import ProbeError


if TYPE_CHECKING:
    from ...data.known import Benchmark
    from ...data.texts import LabelledTexts


@dataclass(frozen=True)
class Instruction:
    """What the LM is asked of each text, and the reply that stands for each label.

    Attributes:
        question: comes before every text.
        verbalisers: by label index; different texts.

    Raises:
        ProbeError: a verbaliser is empty, or two are the same.
    """

    question: str
    verbalisers: tuple[str, ...]

    def __post_init__(self):
        if len(set(self.verbalisers)) != len(self.verbalisers) or not all(self.verbalisers):
            raise ProbeError(f"verbalisers={list(self.verbalisers)} must be texts, each once: one a label")

    @classmethod
    def derive(cls, label_names: Sequence[str], benchmark: Benchmark | None = None) -> Instruction:
        """The instruction of a data set that is known by name; for others, and where it has none, one from the label names.

        Raises:
            ProbeError: the data set's verbalisers are not one a label.
        """
        question = f"Which label fits this text best: {', '.join(label_names)}? Answer with the label only."
        if benchmark is None or benchmark.question is None:
            return cls(question, tuple(label_names))
        verbalisers = benchmark.verbalisers or tuple(label_names)
        if len(verbalisers) != len(label_names):
            raise ProbeError(f"{benchmark.name} has {len(verbalisers)} verbalisers for {len(label_names)} labels")
        return cls(benchmark.question, verbalisers)


@dataclass(frozen=True)
class Example:
    """A labelled text that the prompt shows before the one to be judged."""

    text: str
    label: int


def draw_examples(
    train: LabelledTexts, per_label: int, seed: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 96
) -> list[Example]:
    """Examples for few-shot prompting, in random order.

    Args:
        train: the only rows that examples come from.
        per_label: examples a label.
        seed: of the draw and of the order.
        max_tokens: longer texts are cut to so many tokens.

    Raises:
        ProbeError: a label has fewer training rows, or the rows have no single label each.
    """
    if train.problem_type != "single_label_classification":
        raise ProbeError(f"prompting is for single-label data, not for {train.problem_type}")
    rng = np.random.default_rng(seed)
    chosen: list[Example] = []
    for label, name in enumerate(train.label_names):
        rows = np.flatnonzero(train.labels == label)
        if len(rows) < per_label:
            raise ProbeError(f"label {name!r} has {len(rows)} training rows; few-shot prompting wants {per_label}")
        for row in rng.choice(rows, per_label, replace=False):
            chosen.append(Example(_cut(_as_text(train.texts[row]), tokenizer, max_tokens), label))
    return [chosen[i] for i in rng.permutation(len(chosen))]


@dataclass(frozen=True)
class LabelPrompt:
    """Renders texts under an instruction, with the tokenizer's chat template where it has one.

    Examples become earlier turns of the chat; the question stands in its first turn.

    Attributes:
        tokenizer: of the LM.
        instruction: see there.
        examples: shown before each text.
        max_length: tokens at most of what differs from row to row; the text is cut at its end. `None` for no limit.
        prefix_ids, suffix_ids: the constant token ids before and after every text.

    Raises:
        ProbeError: `max_length` leaves no room for a text.
    """

    tokenizer: PreTrainedTokenizerBase
    instruction: Instruction
    examples: Sequence[Example] = ()
    max_length: int | None = 512
    prefix_ids: list[int] = field(init=False)
    suffix_ids: list[int] = field(init=False)

    def __post_init__(self):
        prefix, suffix = constant_parts(self._ids)
        object.__setattr__(self, "prefix_ids", prefix)
        object.__setattr__(self, "suffix_ids", suffix)
        if self.max_length is not None and self.max_length <= len(suffix):
            raise ProbeError(f"max_length={self.max_length} leaves no room for a text")

    @property
    def label_ids(self) -> list[list[int]]:
        """Token ids of each verbaliser, as the reply begins with them."""
        before = "" if self.tokenizer.chat_template else " "
        return [
            self.tokenizer(before + text, add_special_tokens=False)["input_ids"]
            for text in self.instruction.verbalisers
        ]

    def encode(self, texts: Sequence) -> list[list[int]]:
        """Token ids of each prompt, up to where the reply begins.

        Raises:
            ProbeError: a text is a chat.
        """
        prompts = [self._ids(_as_text(text)) for text in texts]
        if self.max_length is None:
            return prompts
        limit = len(self.prefix_ids) + self.max_length
        keep = limit - len(self.suffix_ids)
        return [ids if len(ids) <= limit else [*ids[:keep], *self.suffix_ids] for ids in prompts]

    def _ids(self, text: str) -> list[int]:
        users = [*(example.text for example in self.examples), text]
        users[0] = f"{self.instruction.question}\n\n{users[0]}"
        replies = [self.instruction.verbalisers[example.label] for example in self.examples]
        if not self.tokenizer.chat_template:
            parts = [f"{user}\nAnswer: {reply}" for user, reply in zip(users, replies, strict=False)]
            return self.tokenizer("\n\n".join([*parts, f"{users[-1]}\nAnswer:"]))["input_ids"]
        messages = [{"role": "user", "content": users[0]}]
        for reply, user in zip(replies, users[1:], strict=True):
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": user}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template has written every special token already.
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]


def label_log_likelihoods(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    batch_tokens: int = 4096,
) -> torch.Tensor:
    """log p(label | prompt) of each prompt and label, in nats, summed over the label's tokens.

    What many prompts begin with is run once and kept, and so is each prompt while its labels are tried.

    Args:
        lm: a causal LM in eval mode. tokenizer: its own, for the padding.
        prompts: token ids of each row. labels: token ids of each label.
        batch_tokens: see `plan_passes`.

    Returns:
        `torch.FloatTensor` of shape `[rows, labels]`, on the CPU.

    Raises:
        ProbeError: a prompt or a label has no tokens.
    """
    if not all(prompts) or not all(labels):
        raise ProbeError("every prompt and every label must have at least one token")
    found = torch.empty(len(prompts), len(labels))
    passes = plan_passes(lm, prompts, [len(ids) - 1 for ids in prompts], batch_tokens)
    with torch.no_grad(), tqdm(total=len(prompts), desc="prompting", unit=" prompts", leave=False) as progress:
        for each in passes:
            batch = pad_prompts([prompts[row][each.skip :] for row in each.rows], tokenizer, "left")
            found[each.rows] = _score_batch(lm, batch, labels, each).cpu()
            progress.update(len(each.rows))
    return found


def _score_batch(lm, batch: dict[str, torch.Tensor], labels, shared: Pass) -> torch.Tensor:
    """`[rows, labels]` for left-padded rows that come after what the pass has kept."""
    input_ids, mask = (batch[name].to(lm.device) for name in ("input_ids", "attention_mask"))
    rows = len(input_ids)
    # Padding lies between the prefix and the row: positions must be told, they do not follow from the columns.
    positions = (shared.skip + mask.cumsum(dim=1) - 1).clamp_min(0)
    mask = torch.cat([mask.new_ones(rows, shared.skip), mask], dim=1)
    kept = {} if shared.prefix is None else {"cache": repeat_cache(shared.prefix, rows)}
    output = lm(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **kept
    )
    first = output.logits[:, -1].float().log_softmax(dim=-1)  # [B, V]
    scores = []
    for ids in labels:
        score = first[:, ids[0]]
        if len(ids) > 1:
            more = len(ids) - 1
            steps = torch.arange(1, more + 1, device=lm.device)
            logits = lm(
                input_ids=torch.tensor([ids[:-1]], device=lm.device).expand(rows, -1),
                attention_mask=torch.cat([mask, mask.new_ones(rows, more)], dim=1),
                position_ids=positions[:, -1:] + steps,
                cache=copy.deepcopy(output.cache),
                use_cache=True,
                logits_to_keep=more,
            ).logits
            rest = torch.tensor(ids[1:], device=lm.device).expand(rows, -1).unsqueeze(-1)
            score = score + logits[:, -more:].float().log_softmax(dim=-1).gather(2, rest).squeeze(-1).sum(dim=1)
        scores.append(score)
    return torch.stack(scores, dim=1)


def _as_text(text) -> str:
    if not isinstance(text, str):
        raise ProbeError("prompting takes texts, not chat messages")
    return text


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens])
