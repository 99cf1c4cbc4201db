"""Augmentations of training rows: the label stays, and what is around the text changes (system prompt, document, other turns)."""

from __future__ import annotations

import html
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest

import numpy as np

from ..errors import ProbeError
from ..hub.folder import flagged_by
from .labelled_texts import LabelledTexts
from .prompts import Chat, as_chat


SHARE = 0.15  # of the rows, which each augmentation changes
# The least and the most words.
_LEAD_IN_WORDS = (8, 80)
_QUOTE_WORDS = (50, 1000)
_TURN_WORDS = (2, 60)
_NOISE_WORDS = (6, 24)
_CHARACTERS = list(string.ascii_letters + string.digits + string.punctuation)

# Places of a text in a document. `a` and `b` are the two parts of the document.
_QUOTES = (
    "{a}\n\n{text}\n\n{b}",
    "{a} {text} {b}",
    "{a}\n\n{b}\n\n{text}",
    "{text}\n\n{a}\n\n{b}",
    '{a}\n\n"{text}"\n\n{b}',
    "Here is a document:\n\n{a}\n\n{b}\n\nNow: {text}",
    "{text}\n\nText: {a} {b}",
)
_BREAKS = (" ", "\n", "\n\n")
# Layouts in which writers and programs put a text.
_LAYOUTS = (
    "```\n{text}\n```", "```text\n{text}\n```", "    {text}", "\t{text}", "\n\n{text}", "{text}    ", "{text}\n\n",
    "> {text}", "- {text}", '"{text}"',
)  # fmt: skip
# Results of tools: records, pages, notes, code, mails.
_FORMATS: tuple[Callable[[str], str], ...] = (
    lambda text: json.dumps({"status": "ok", "result": text}),
    lambda text: json.dumps([{"id": 1, "title": "Note", "body": text}], indent=2, ensure_ascii=False),
    lambda text: f"<div class='post'>\n<p>{html.escape(text)}</p>\n</div>",
    lambda text: f"## Notes\n\n- {text}\n- Done.",
    lambda text: f'def load():\n    """{text}"""\n    return 0',
    lambda text: (
        f"Date: Mon, 3 Mar 2025 09:14:00 +0000\nFrom: office@example.com\nSubject: Update\n\n{text}\n\nBest,\nSam"
    ),
)


@dataclass
class Augmenter:
    """Changes chats at random. Each public method is an augmentation, which returns a changed chat and leaves its argument alone.

    Attributes:
        harmless: texts for lead-ins, quotes and other turns.
        system_prompts: texts for system turns.
        drawn: the rows of `harmless` that were drawn since the caller cleared the set.
    """

    harmless: LabelledTexts
    system_prompts: Sequence[str]
    rng: np.random.Generator
    drawn: set[int] = field(default_factory=set)

    def lead_in(self, messages: Chat) -> Chat:
        """Put the first words of a harmless text before the last text of the user."""
        words = self._words(*_LEAD_IN_WORDS)
        return _rewrite(messages, lambda text: words + self._one(_BREAKS) + text)

    def quote(self, messages: Chat) -> Chat:
        """Put the last text of the user before, into or behind a harmless document."""
        words = self._words(*_QUOTE_WORDS).split(" ")
        cut = int(self.rng.integers(1, len(words) + 1))
        a = " ".join(words[:cut])
        b = " ".join(words[cut:])
        return _rewrite(messages, lambda text: self._one(_QUOTES).format(a=a, b=b, text=text).strip())

    def document(self, messages: Chat) -> Chat:
        """Put the last text of the user into a record, a page, notes, code or a mail."""
        return _rewrite(messages, self._one(_FORMATS))

    def layout(self, messages: Chat) -> Chat:
        """Put blanks around the last text of the user, or put it into a code fence, a quotation or a list."""
        return _rewrite(messages, lambda text: self._one(_LAYOUTS).format(text=text))

    def noise(self, messages: Chat) -> Chat:
        """Append shuffled words and random characters to the last text of the user, like an adversarial suffix."""
        words = self._words(*_NOISE_WORDS).split()
        junk = ["".join(self.rng.choice(_CHARACTERS, self.rng.integers(1, 7))) for _ in words[::2]]
        pieces = self.rng.permutation([*words, *junk])
        return _rewrite(messages, lambda text: f"{text} {' '.join(pieces)}")

    def earlier_turns(self, messages: Chat) -> Chat:
        """Put a harmless exchange before the user's first turn."""
        start = int(messages[0]["role"] == "system")
        return [*messages[:start], self._user_turn(), self._reply(), *messages[start:]]

    def later_turns(self, messages: Chat) -> Chat:
        """Append a reply and a harmless turn of the user."""
        return [*messages, self._reply(), self._user_turn()]

    def system_prompt(self, messages: Chat) -> Chat:
        """Put a system turn first, unless there is one."""
        if messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self._one(self.system_prompts)}, *messages]

    def _user_turn(self) -> dict[str, str]:
        return {"role": "user", "content": " ".join(self._harmless().split(" ")[: _TURN_WORDS[1]])}

    def _reply(self) -> dict[str, str]:
        return {"role": "assistant", "content": self._words(*_TURN_WORDS)}

    def _harmless(self) -> str:
        row = int(self.rng.integers(len(self.harmless)))
        self.drawn.add(row)
        return self.harmless.texts[row]

    def _one(self, items: Sequence[str]) -> str:
        return items[int(self.rng.integers(len(items)))]

    def _words(self, least: int, most: int) -> str:
        """Return the first words of one or more harmless texts. The number of words is drawn log-uniformly."""
        count = round(float(np.exp(self.rng.uniform(np.log(least), np.log(most)))))
        words: list[str] = []
        while len(words) < count:
            words += self._harmless().split(" ")
        return " ".join(words[:count]).strip()


AUGMENTATIONS = ("lead_in", "quote", "document", "layout", "noise", "earlier_turns", "later_turns", "system_prompt")


def augment(
    rows: LabelledTexts, names: Sequence[str], seed: int, system_prompts: Sequence[str] = (), share: float = SHARE
) -> list[LabelledTexts]:
    """Return changed rows with the labels of the original rows, for each augmentation by itself.

    Each augmentation changes a random share of the rows: as many rows of each label, while there are rows with the label. Texts for
    lead-ins, documents and other turns come from rows without a flagged label (multi-label: without any label). If the rows have a
    column `source`, a changed row names the sources of all its texts, with `+` between them.

    Args:
        names: names of augmentations, of `AUGMENTATIONS`.
        system_prompts: texts for the augmentation `system_prompt`.

    Raises:
        ProbeError: the rows are of a regression, or have no plain text without a flagged label.
    """
    if not names:
        return []
    shown = ", ".join(names)
    if rows.problem_type == "regression":
        raise ProbeError(f"augmentations ({shown}) need rows with labels, not {rows.problem_type}")
    harmless: list[int] = []
    if set(names) != {"system_prompt"}:
        harmless = [row for row in _harmless_rows(rows).tolist() if isinstance(rows.texts[row], str)]
        if not harmless:
            raise ProbeError(f"augmentations ({shown}) need plain texts without a flagged label")
    augmenter = Augmenter(rows.select(harmless), system_prompts, np.random.default_rng(seed))
    sources = augmenter.harmless.columns.get("source")
    groups = _rows_by_label(rows.labels)
    parts = []
    for name in names:
        part = rows.select(_draw(groups, max(1, round(share * len(rows))), augmenter.rng))
        for row, text in enumerate(part.texts):
            augmenter.drawn.clear()
            messages = getattr(augmenter, name)(as_chat(text))
            stays_text = isinstance(text, str) and len(messages) == 1
            part.texts[row] = messages[0]["content"] if stays_text else messages
            if sources is not None:
                used = {sources[drawn] for drawn in augmenter.drawn} | {part.columns["source"][row]}
                part.columns["source"][row] = "+".join(sorted(used))
        parts.append(part)
    return parts


def _harmless_rows(rows: LabelledTexts) -> np.ndarray:
    if rows.labels.ndim == 2:
        return np.flatnonzero(~rows.labels.any(axis=1))
    names = rows.label_names
    flagged = flagged_by({"flagged": rows.flagged}, names)
    if flagged is None:
        example = f"flagged=[{names[0]!r}] or --flagged {names[0]}"
        raise ProbeError(f"augmentations need the label to flag, such as {example}; labels: {', '.join(names)}")
    return np.flatnonzero(~np.isin(rows.labels, [names.index(name) for name in flagged]))


def _rows_by_label(labels: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each label. Multi-label rows without a label come first."""
    if labels.ndim == 1:
        return [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    has_label = labels == 1
    return [np.flatnonzero(~has_label.any(axis=1)), *map(np.flatnonzero, has_label.T)]


def _draw(groups: Sequence[np.ndarray], count: int, rng: np.random.Generator) -> list[int]:
    """Return `count` random rows, taken from the groups in turn."""
    shuffled = [rng.permutation(rows).tolist() for rows in groups]
    drawn = dict.fromkeys(chain.from_iterable(zip_longest(*shuffled)))
    drawn.pop(None, None)  # the filler for groups that have ended
    return sorted(islice(drawn, count))


def _rewrite(messages: Chat, change: Callable[[str], str]) -> Chat:
    """Change the content of the user's last turn, if it is a text."""
    last = max((place for place, turn in enumerate(messages) if turn["role"] == "user"), default=None)
    if last is None or not isinstance(messages[last].get("content"), str):
        return messages
    changed = {**messages[last], "content": change(messages[last]["content"])}
    return [*messages[:last], changed, *messages[last + 1 :]]
