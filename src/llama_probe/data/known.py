"""Data sets known by name: their place on the Hub, and how their rows become labelled texts.

`llama_probe.data.texts` reads the rows from the Hub or from local copies. A new data set is one entry in `BENCHMARKS`.
The ids, configurations, splits and columns are those of public code in 2026. No revision is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ProbeError


Row = dict[str, Any]


HubSplit = tuple[str, str | None]  # a split of a Hub data set, and its configuration; None is the default one


@dataclass(frozen=True)
class Benchmark:
    """A data set known by name, in English.

    Attributes:
        name, title: name on the command line, and in a sentence.
        hub_id: the data set on the Hub.
        splits: split -> split on the Hub.
        text, label: a column, or a function of a row. A label is an index, a name, or a list of either.
        label_names: names by index.
        flagged: the one of two labels that a head is to find; see `ProbeConfig`.
        license, note: licence as the Hub spells it; origin and licence in a sentence, for cards.
        problem_type: as in `ProbeConfig`.
        exchange: columns of the prompts and the replies, for heads that read replies.
        columns, slices: further columns to keep, and columns to report results by.
        question: question to a language model about a text, for prompting. Derived from the label names by default.
        verbalisers: reply that means each label, by index. Defaults to the label names.
    """

    name: str
    title: str
    hub_id: str
    splits: Mapping[str, HubSplit]
    text: str | Callable[[Row], Any]
    label: str | Callable[[Row], Any]
    label_names: tuple[str, ...]
    license: str
    note: str
    flagged: str | None = None
    problem_type: str = "single_label_classification"
    exchange: tuple[str, str] | None = None
    columns: tuple[str, ...] = ()
    slices: tuple[str, ...] = ()
    question: str | None = None
    verbalisers: tuple[str, ...] = ()

    def convert(self, table: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Convert columns of the Hub into `text`, `label` (which may be None) and those of `columns` that they have."""
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        sources = {"text": self.text, "label": self.label} | {name: name for name in self.columns if name in table}
        try:
            return {
                name: [source(row) if callable(source) else row[source] for row in rows]
                for name, source in sources.items()
            }
        except KeyError as error:
            raise ProbeError(f"{self.name} has no column {error}; it has: {', '.join(table)}") from None


def find_benchmark(source: str | None) -> tuple[Benchmark, str | None] | None:
    """Return the data set that `NAME` or `NAME:SPLIT` means, and the split or None.

    Return None for anything else: a file, a folder (`./imdb`) or another Hub data set.
    """
    name, _, split = str(source).partition(":")
    known = name in BENCHMARKS and not split.startswith(":")  # `imdb::test` is a split of a file or folder of rows
    return (BENCHMARKS[name], split or None) if known else None


_MODERATION_CATEGORIES = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")


def _any_category(row: Row) -> int:
    """Return 1 if an annotator flagged any category. A missing value counts as 0."""
    return int(any(row.get(name) == 1 for name in _MODERATION_CATEGORIES))


def _aegis_vote(row: Row) -> int | None:
    """Return 0 if most annotators of a prompt say `Safe`, 1 for ties and `Needs Caution`, None for other texts."""
    if row["text_type"] != "user_message":
        return None
    votes = [row.get(f"labels_{i}") for i in range(5)]
    votes = [vote for vote in votes if vote not in (None, "", "None")]
    if not votes:
        return None
    return int(2 * sum(vote == "Safe" for vote in votes) <= len(votes))


def _dialogue(row: Row) -> str | None:
    prompt, reply = row["prompt"], row["response"]
    return None if None in (prompt, reply) else f"User: {prompt}\n\nAssistant: {reply}"


_GO_EMOTIONS = (
    "admiration amusement anger annoyance approval caring confusion curiosity desire disappointment disapproval disgust "
    "embarrassment excitement fear gratitude grief joy love nervousness optimism pride realization relief remorse sadness "
    "surprise neutral"
)

_ALL = (
    Benchmark(
        # Half of the rows were judged by people, the others by a filter; the paper tests on the former only.
        name="toxicchat",
        title="ToxicChat 0124",
        hub_id="lmsys/toxic-chat",
        splits={"train": ("train", "toxicchat0124"), "test": ("test", "toxicchat0124")},
        text="user_input",
        label="toxicity",
        label_names=("non-toxic", "toxic"),
        flagged="toxic",
        license="cc-by-nc-4.0",
        note="ToxicChat 0124 (prompts of real users of a chat service), CC BY-NC 4.0: non-commercial use only.",
        columns=("conv_id", "human_annotation", "jailbreaking"),
        slices=("human_annotation",),
        question="Is this message, which a user sent to an assistant, toxic? A message is toxic if it is rude, hateful, "
        "sexual or violent, or asks for such content. Answer with Yes or No.",
        verbalisers=("No", "Yes"),
    ),
    Benchmark(
        # Gated. Some rows have no label of the prompt, or no prompt.
        name="wildguardmix",
        title="WildGuardMix",
        hub_id="allenai/wildguardmix",
        splits={"train": ("train", "wildguardtrain"), "test": ("test", "wildguardtest")},
        text="prompt",
        label="prompt_harm_label",
        label_names=("unharmful", "harmful"),
        flagged="harmful",
        license="odc-by",
        note="WildGuardMix (synthetic, adversarial and real prompts with a label of their harm), ODC-BY.",
        columns=("adversarial", "subcategory"),
        question="Is this request, which a user sent to an assistant, harmful? A request is harmful if a good answer to it "
        "could hurt people. Answer with Yes or No.",
        verbalisers=("No", "Yes"),
    ),
    Benchmark(
        name="imdb",
        title="IMDB",
        hub_id="stanfordnlp/imdb",
        splits={"train": ("train", None), "test": ("test", None)},
        text="text",
        label="label",
        label_names=("negative", "positive"),
        flagged="positive",
        license="other",
        note="IMDB Large Movie Review Dataset v1.0 (Maas et al. 2011); its authors state no licence.",
        question="Is this film review negative or positive? Answer with one word.",
        verbalisers=("Negative", "Positive"),
    ),
    Benchmark(
        # GLUE hides the labels of its test split (all are -1), so results, the paper's too, are of its validation split.
        # Local copies may have more splits: the test sentences, and `train_sentences` without the phrases of `train`.
        name="sst2",
        title="SST-2",
        hub_id="stanfordnlp/sst2",
        splits={"train": ("train", None), "test": ("validation", None)},
        text="sentence",
        label="label",
        label_names=("negative", "positive"),
        flagged="positive",
        license="unknown",
        note="SST-2 (Stanford Sentiment Treebank, two classes); its authors state no licence (research use).",
        question="Is the sentiment of this sentence from a film review negative or positive? Answer with one word.",
        verbalisers=("Negative", "Positive"),
    ),
    Benchmark(
        name="emotion",
        title="Emotion",
        hub_id="dair-ai/emotion",
        splits={name: (name, "split") for name in ("train", "validation", "test")},
        text="text",
        label="label",
        label_names=("sadness", "joy", "love", "anger", "fear", "surprise"),
        license="other",
        note="Emotion (dair-ai/emotion, English Twitter posts), for educational and research purposes only.",
        question="Which emotion does the writer of this text express: sadness, joy, love, anger, fear or surprise? Answer "
        "with one word.",
        verbalisers=("Sadness", "Joy", "Love", "Anger", "Fear", "Surprise"),
    ),
    Benchmark(
        name="goemotions",
        title="GoEmotions",
        hub_id="google-research-datasets/go_emotions",
        splits={name: (name, "simplified") for name in ("train", "validation", "test")},
        text="text",
        label="labels",
        label_names=tuple(_GO_EMOTIONS.split()),
        license="apache-2.0",
        note="GoEmotions (Reddit comments with one or more of 28 labels), Apache-2.0.",
        problem_type="multi_label_classification",
        columns=("id",),
    ),
    Benchmark(
        # By an author of the set; `walledai/XSTest` has the same prompts, gated.
        name="xstest",
        title="XSTest v2",
        hub_id="Paul/XSTest",
        splits={"test": ("train", None)},
        text="prompt",
        label="label",
        label_names=("safe", "unsafe"),
        flagged="unsafe",
        license="cc-by-4.0",
        note="XSTest v2 (250 safe prompts that look unsafe, 200 unsafe ones), CC BY 4.0.",
        columns=("id", "type", "focus", "note"),
    ),
    Benchmark(
        name="openai_moderation",
        title="OpenAI moderation evaluation set",
        hub_id="mmathys/openai-moderation-api-evaluation",
        splits={"test": ("train", None)},
        text="prompt",
        label=_any_category,
        label_names=("unflagged", "flagged"),
        flagged="flagged",
        license="mit",
        note="OpenAI's moderation evaluation set (1,680 texts, flagged in any of 8 categories), MIT.",
        columns=_MODERATION_CATEGORIES,
    ),
    Benchmark(
        # May be gated. Prompts only: the other rows are whole conversations. Published counts of the 359 test prompts
        # differ by one row (126 or 127 harmless), by how ties are broken.
        name="aegis",
        title="Aegis 1.0",
        hub_id="nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
        splits={"train": ("train", None), "test": ("test", None)},
        text="text",
        label=_aegis_vote,
        label_names=("unharmful", "harmful"),
        flagged="harmful",
        license="cc-by-4.0",
        note="Aegis 1.0 (prompts, label by majority of the annotators), CC BY 4.0.",
        columns=("id",),
    ),
    Benchmark(
        # The label is of question and answer together.
        name="beavertails",
        title="BeaverTails-30k",
        hub_id="PKU-Alignment/BeaverTails",
        splits={"train": ("30k_train", None), "test": ("30k_test", None)},
        text=_dialogue,
        label=lambda row: None if row["is_safe"] is None else int(not row["is_safe"]),
        label_names=("unharmful", "harmful"),
        flagged="harmful",
        license="cc-by-nc-4.0",
        note="BeaverTails-30k (pairs of question and answer), CC BY-NC 4.0: non-commercial use only.",
        exchange=("prompt", "response"),
        columns=("prompt", "response", "category"),
    ),
    Benchmark(
        # Gated.
        name="advbench",
        title="AdvBench",
        hub_id="walledai/AdvBench",
        splits={"test": ("train", None)},
        text="prompt",
        label=lambda row: 1,
        label_names=("unharmful", "harmful"),
        flagged="harmful",
        license="mit",
        note="AdvBench (520 harmful requests, no harmless ones), MIT.",
    ),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
# The prompts alone, for heads that read no replies. A prompt with several replies has a row for each.
BENCHMARKS["beavertails_prompts"] = replace(
    BENCHMARKS["beavertails"],
    name="beavertails_prompts",
    title="BeaverTails-30k, prompts",
    text="prompt",
    note="Prompts of BeaverTails-30k (the label is of prompt and reply together), CC BY-NC 4.0: non-commercial use only.",
    exchange=None,
)
