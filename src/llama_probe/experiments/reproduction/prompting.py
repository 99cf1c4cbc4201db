"""Classification by prompting: the likelihood of each label as the LM's reply to an instruction, without training.

The baseline that arXiv 2601.13288 calls zero-shot and few-shot prompting. Likelihood in place of generated text gives every row
a score for every label (Brown et al., arXiv 2005.14165, section 2.4).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...backbone.cache import repeat_cache
from ...backbone.passes import Pass, plan_passes
from ...data.known import Benchmark
from ...data.prompts import constant_parts, pad_prompts
from ...data.texts import LabelledTexts
from ...errors import ProbeError


# A labelled text that the prompt shows: (text, label index).
Example = tuple[str, int]


@dataclass(frozen=True)
class Instruction:
    """The question before every text, and the reply that stands for each label index.

    Raises:
        ProbeError: a verbaliser is empty, or two are the same.
    """

    question: str
    verbalisers: tuple[str, ...]

    def __post_init__(self):
        if len(set(self.verbalisers)) != len(self.verbalisers) or not all(self.verbalisers):
            raise ProbeError(f"verbalisers={list(self.verbalisers)} must be different texts")

    @classmethod
    def derive(cls, label_names: Sequence[str], benchmark: Benchmark | None = None) -> Instruction:
        """Return the instruction of a known data set, or one that asks for the label names.

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


def draw_examples(
    train: LabelledTexts, per_label: int, seed: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 96
) -> list[Example]:
    """Draw training rows as few-shot examples, in random order.

    Args:
        per_label: examples a label.
        max_tokens: longer texts are cut.

    Raises:
        ProbeError: a label has fewer training rows.
    """
    rng = np.random.default_rng(seed)
    chosen: list[Example] = []
    for label, name in enumerate(train.label_names):
        rows = np.flatnonzero(train.labels == label)
        if len(rows) < per_label:
            raise ProbeError(f"label {name!r} has {len(rows)} training rows; few-shot prompting wants {per_label}")
        for row in rng.choice(rows, per_label, replace=False):
            text = _as_text(train.texts[row])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            chosen.append((text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens]), label))
    return [chosen[i] for i in rng.permutation(len(chosen))]


class LabelPrompt:
    """A renderer of texts under an instruction, with the tokenizer's chat template if it has one.

    Examples become earlier turns of the chat. The question stands in its first turn.

    Args:
        examples: shown before each text.
        max_length: most tokens that differ from row to row. A longer text is cut at its end. `None`: no limit.

    Attributes:
        prefix_ids, suffix_ids: the token ids before and after every text.

    Raises:
        ProbeError: `max_length` leaves no room for a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: Instruction,
        examples: Sequence[Example] = (),
        max_length: int | None = 512,
    ):
        self.tokenizer, self.instruction, self.examples = tokenizer, instruction, examples
        self.max_length = max_length
        self.prefix_ids, self.suffix_ids = constant_parts(self._ids)
        if max_length is not None and max_length <= len(self.suffix_ids):
            raise ProbeError(f"max_length={max_length} must be above {len(self.suffix_ids)}, to leave room for a text")

    @property
    def label_ids(self) -> list[list[int]]:
        """Token ids of each verbaliser, as the start of the reply."""
        before = "" if self.tokenizer.chat_template else " "
        texts = [before + text for text in self.instruction.verbalisers]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def encode(self, texts: Sequence) -> list[list[int]]:
        """Return the token ids of each prompt, up to the start of the reply.

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
        users = [*(shown for shown, _ in self.examples), text]
        users[0] = f"{self.instruction.question}\n\n{users[0]}"
        replies = [self.instruction.verbalisers[label] for _, label in self.examples]
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
    """Return log p(label | prompt) of each prompt and label, in nats, summed over the label's tokens.

    The start that many prompts share runs once, and each prompt runs once for all labels.

    Args:
        lm: a causal LM in eval mode.
        tokenizer: the LM's own, for padding.
        prompts: token ids of each row, at least one. labels: token ids of each label, at least one.
        batch_tokens: see `plan_passes`.

    Returns:
        `torch.FloatTensor` of shape `[rows, labels]`, on the CPU.
    """
    found = torch.empty(len(prompts), len(labels))
    passes = plan_passes(lm, prompts, [len(ids) - 1 for ids in prompts], batch_tokens)
    with torch.no_grad(), tqdm(total=len(prompts), desc="prompting", unit=" prompts", leave=False) as progress:
        for each in passes:
            batch = pad_prompts([prompts[row][each.skip :] for row in each.rows], tokenizer, "left")
            found[each.rows] = _score_batch(lm, batch, labels, each).cpu()
            progress.update(len(each.rows))
    return found


def _score_batch(lm, batch: dict[str, torch.Tensor], labels, shared: Pass) -> torch.Tensor:
    """Return `[rows, labels]` of left-padded rows that follow the cached start of a pass."""
    input_ids, mask = (batch[name].to(lm.device) for name in ("input_ids", "attention_mask"))
    rows = len(input_ids)
    # Padding lies between the start and the row, so positions do not follow from the columns.
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
        if more := len(ids) - 1:
            ids = torch.tensor(ids, device=lm.device).expand(rows, -1)
            logits = lm(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([mask, mask.new_ones(rows, more)], dim=1),
                position_ids=positions[:, -1:] + torch.arange(1, more + 1, device=lm.device),
                cache=copy.deepcopy(output.cache),
                use_cache=True,
                logits_to_keep=more,
            ).logits
            rest = logits[:, -more:].float().log_softmax(dim=-1).gather(2, ids[:, 1:].unsqueeze(-1))
            score = score + rest.squeeze(-1).sum(dim=1)
        scores.append(score)
    return torch.stack(scores, dim=1)


def _as_text(text) -> str:
    if not isinstance(text, str):
        raise ProbeError("prompting takes texts, not chat messages")
    return text
