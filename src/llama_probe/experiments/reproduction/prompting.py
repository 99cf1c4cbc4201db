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


# A labelled text that the prompt shows: (text, label index).
Example = tuple[str, int]


def instruction(benchmark: Benchmark) -> tuple[str, tuple[str, ...]]:
    """Return the question before every text of a data set, and the reply for each label index; by default the label names."""
    names = benchmark.label_names
    question = f"Which label fits this text best: {', '.join(names)}? Answer with the label only."
    return benchmark.question or question, benchmark.verbalisers or names


def draw_examples(
    train: LabelledTexts, per_label: int, seed: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 96
) -> list[Example]:
    """Draw at most `per_label` training rows of each label as examples, in random order; cut those above `max_tokens`."""
    rng = np.random.default_rng(seed)
    chosen: list[Example] = []
    for label in range(len(train.label_names)):
        rows = np.flatnonzero(train.labels == label)
        for row in rng.choice(rows, min(per_label, len(rows)), replace=False):
            text = train.texts[row]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            chosen.append((text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens]), label))
    return [chosen[i] for i in rng.permutation(len(chosen))]


@dataclass
class LabelPrompt:
    """A renderer of texts under a question, with the tokenizer's chat template if it has one.

    Examples become earlier turns of the chat. The question is in its first turn. `max_length` is for tokens that differ from
    row to row: a longer text is cut at its end.
    """

    tokenizer: PreTrainedTokenizerBase
    question: str
    verbalisers: Sequence[str]
    examples: Sequence[Example] = ()
    max_length: int = 512

    def __post_init__(self):
        self.prefix_ids, self.suffix_ids = constant_parts(self._ids)

    @property
    def label_ids(self) -> list[list[int]]:
        """Token ids of each verbaliser, as the start of the reply."""
        before = "" if self.tokenizer.chat_template else " "
        texts = [before + text for text in self.verbalisers]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def encode(self, texts: Sequence) -> list[list[int]]:
        """Return the token ids of each prompt, up to the start of the reply."""
        prompts = map(self._ids, texts)
        limit = len(self.prefix_ids) + self.max_length
        keep = limit - len(self.suffix_ids)
        return [ids if len(ids) <= limit else [*ids[:keep], *self.suffix_ids] for ids in prompts]

    def _ids(self, text: str) -> list[int]:
        users = [*(shown for shown, _ in self.examples), text]
        users[0] = f"{self.question}\n\n{users[0]}"
        replies = [self.verbalisers[label] for _, label in self.examples]
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
    """Return log p(label | prompt) `[rows, labels]` in nats, summed over the label's tokens, on the CPU.

    The start that many prompts share runs once, and each prompt runs once for all labels.

    Args:
        prompts, labels: token ids of each row and of each label, at least one.
        batch_tokens: see `plan_passes`.
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
    # Padding is between the start and the row, so positions do not follow from the columns.
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
