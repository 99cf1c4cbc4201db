"""Augmentations: what they change, what they leave, and what they refuse."""

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data.augmentation import AUGMENTATIONS, augment
from llama_probe.data.labelled_texts import LabelledTexts


SYSTEM = ["You sell shoes.", "Answer in French."]
TEXTS = [f"harmless request number {i} about the garden" for i in range(40)] + [f"BAD{i} request" for i in range(40)]
LABELS = np.repeat([0, 1], 40)
MULTI = "multi_label_classification"


def rows_of(texts=TEXTS, labels=LABELS, problem_type="single_label_classification", names=("safe", "unsafe")):
    columns = {"id": list(range(len(texts)))}
    return LabelledTexts(texts, np.array(labels), list(names), problem_type, columns, ["unsafe"])


def turns(text):
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def count_bad(text):
    return sum(turn["content"].count("BAD") for turn in turns(text))


def augmented(rows, names, seed=0, share=1.0):
    return LabelledTexts.join(augment(rows, names, seed, SYSTEM, share))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_labels_and_the_text_stay_and_nothing_harmful_is_added(name):
    rows = rows_of()
    new = augmented(rows, [name])
    assert (new.labels == rows.labels).all() and new.columns == rows.columns
    for text, old in zip(new.texts, rows.texts, strict=True):
        assert text != old and count_bad(text) == old.count("BAD")
        assert old in turns(text)[0 if name == "later_turns" else -1]["content"]
        assert turns(text)[-1]["role"] == "user"
    if name == "quote":
        lengths = [len(turns(text)[-1]["content"].split()) for text in new.texts]
        assert min(lengths) >= 50 and max(lengths) > 200, "it can be long"


def test_seed_and_share():
    first, again, other = (augmented(rows_of(), AUGMENTATIONS, seed).texts for seed in (3, 3, 4))
    assert first == again != other
    assert len(augmented(rows_of(), ["lead_in", "quote"], share=0.25)) == 2 * 20


def test_rare_labels_are_drawn_as_often():
    rows = rows_of(TEXTS[:60], LABELS[:60])
    assert np.bincount(augmented(rows, ["lead_in"], share=0.8).labels).tolist() == [28, 20]


def test_rows_of_a_multi_label_head_are_drawn_once_and_draw_from_rows_without_a_label():
    labels = np.zeros((80, 2), np.float32)
    labels[40:] = 1, 0
    labels[40:45, 1] = 1
    new = augmented(rows_of(labels=labels, problem_type=MULTI), ["earlier_turns"], share=0.375)
    assert len({text[-1]["content"] for text in new.texts}) == len(new) == 30
    assert (new.labels == labels[new.columns["id"]]).all()
    assert new.labels[:, 1].sum() == 5, "all rows with the rare label"
    assert not any("BAD" in text[0]["content"] for text in new.texts)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_chats_keep_their_turns_and_their_system_prompt(name):
    contents = {"system": "mine", "user": "first", "assistant": "reply"}
    chat = [{"role": role, "content": content} for role, content in contents.items()]
    chat.append({"role": "user", "content": "last"})
    new = augmented(rows_of([*TEXTS, chat], [*LABELS, 1]), [name]).texts[-1]
    if name == "later_turns":
        assert new[:4] == chat and len(new) == 6
    else:
        assert new[0] == chat[0] and new[-3:-1] == chat[1:3] and "last" in new[-1]["content"]
    assert chat[-1]["content"] == "last"


def test_lead_ins_come_from_what_is_not_flagged():
    """Also if the label to flag is the first: BAD rows would teach a guard that harm may stand anywhere."""
    rows = rows_of(labels=1 - LABELS, names=("unsafe", "safe"))
    assert list(map(count_bad, augmented(rows, ["lead_in"]).texts)) == list(map(count_bad, TEXTS))
    rows.flagged = None
    with pytest.raises(ProbeError, match="--flagged"):
        augment(rows, ["lead_in"], 0)


@pytest.mark.parametrize(
    "labels, problem_type, named",
    [
        ([1, 1], "single_label_classification", "flagged"),
        ([[1.0, 0.0], [0.0, 1.0]], MULTI, "flagged"),
        ([[0.5], [0.7]], "regression", "regression"),
    ],
)
def test_rows_that_cannot_be_changed_are_refused(labels, problem_type, named):
    with pytest.raises(ProbeError, match=named):
        augment(rows_of(["a", "b"], labels, problem_type), ["quote"], 0)
