"""Augmentations: what they wrap, what they leave, and what they refuse."""

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data.augmentation import AUGMENTATIONS, wrapped_copies
from llama_probe.data.labelled_texts import LabelledTexts


SYSTEM = ["You sell shoes.", "Answer in French."]


def rows_of(texts, labels, problem_type="single_label_classification"):
    return LabelledTexts(
        texts, np.array(labels), ["safe", "unsafe"], problem_type, {"id": list(range(len(texts)))}, ["unsafe"]
    )


@pytest.fixture
def rows():
    texts = [f"harmless request number {i} about the garden" for i in range(40)]
    texts += [f"BAD{i} request" for i in range(40)]
    return rows_of(texts, [0] * 40 + [1] * 40)


def turns(text):
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def copies(rows, *args, **kwargs):
    return LabelledTexts.join(wrapped_copies(rows, *args, **{"share": 1.0, **kwargs}))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_labels_and_the_text_stay_and_nothing_harmful_is_added(rows, name):
    new = copies(rows, [name], 0, SYSTEM)
    assert (new.labels == rows.labels).all() and new.columns == rows.columns
    for text, old in zip(new.texts, rows.texts, strict=True):
        assert text != old
        assert old in turns(text)[0 if name == "later_turns" else -1]["content"]
        assert turns(text)[-1]["role"] == "user"
        assert sum(turn["content"].count("BAD") for turn in turns(text)) == old.count("BAD")


def test_seed_and_share(rows):
    names = list(AUGMENTATIONS)
    first, again, other = (copies(rows, names, seed, SYSTEM).texts for seed in (3, 3, 4))
    assert first == again != other
    assert len(copies(rows, ["lead_in", "quote"], 3, share=0.25)) == 2 * 20


def test_rare_labels_are_copied_as_often(rows):
    rows = rows_of(rows.texts[:60], rows.labels[:60])
    assert np.bincount(copies(rows, ["lead_in"], 0, share=0.8).labels).tolist() == [28, 20]


def test_rows_of_a_multi_label_head_are_copied_once_and_draw_from_rows_without_a_label(rows):
    labels = np.zeros((80, 2), np.float32)
    labels[40:] = 1, 0
    labels[40:45, 1] = 1
    new = copies(rows_of(rows.texts, labels, "multi_label_classification"), ["earlier_turns"], 0, share=0.375)
    assert len({text[-1]["content"] for text in new.texts}) == len(new) == 30
    assert (new.labels == labels[new.columns["id"]]).all()
    assert new.labels[:, 1].sum() == 5, "all rows with the rare label"
    assert not any("BAD" in text[0]["content"] for text in new.texts)


def test_chats_keep_their_turns_and_their_system_prompt(rows):
    chat = [
        {"role": "system", "content": "mine"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": "last"},
    ]
    rows = rows_of([*rows.texts, chat], [*rows.labels, 1])
    for name in AUGMENTATIONS:
        new = copies(rows, [name], 0, SYSTEM).texts[-1]
        if name == "later_turns":
            assert new[:4] == chat and len(new) == 6
        else:
            assert new[0] == chat[0] and new[-3:-1] == chat[1:3] and "last" in new[-1]["content"]
    assert chat[-1]["content"] == "last"


def test_a_quote_can_be_long(rows):
    lengths = [len(turns(text)[-1]["content"].split()) for text in copies(rows, ["quote"], 0).texts]
    assert min(lengths) >= 50 and max(lengths) > 200


def test_refused():
    with pytest.raises(ProbeError, match="flagged"):
        wrapped_copies(rows_of(["a", "b"], [1, 1]), ["quote"], 0)
    with pytest.raises(ProbeError, match="flagged"):
        wrapped_copies(rows_of(["a", "b"], [[1.0, 0.0], [0.0, 1.0]], "multi_label_classification"), ["quote"], 0)
    with pytest.raises(ProbeError, match="regression"):
        wrapped_copies(rows_of(["a", "b"], [[0.5], [0.7]], "regression"), ["quote"], 0)


def test_lead_ins_come_from_what_is_not_flagged(rows):
    """Also if the label to flag is the first: BAD rows would teach a guard that harm may stand anywhere."""
    turned = LabelledTexts(
        rows.texts, 1 - rows.labels, ["unsafe", "safe"], rows.problem_type, rows.columns, ["unsafe"]
    )
    texts = copies(turned, ["lead_in"], 0).texts
    assert all(
        turns(text)[-1]["content"].count("BAD") == old.count("BAD")
        for text, old in zip(texts, rows.texts, strict=True)
    )
    turned.flagged = None
    with pytest.raises(ProbeError, match="--flag"):
        wrapped_copies(turned, ["lead_in"], 0)
