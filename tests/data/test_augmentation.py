"""Augmentations: what they change, what they leave, where the original text stands, and what they refuse."""

import html
import json

import numpy as np
import pytest

from llama_probe import ProbeError
from llama_probe.data.augmentation import AUGMENTATIONS, augment
from llama_probe.data.disguises import HELD_OUT, LEARNED, disguised
from llama_probe.data.labelled_texts import LabelledTexts


SYSTEM = ["You sell shoes.", "Answer in French."]
TEXTS = [f"harmless request number {i} about the garden" for i in range(40)] + [f"BAD{i} request" for i in range(40)]
LABELS = np.repeat([0, 1], 40)
AROUND = [name for name in AUGMENTATIONS if name != "disguise"]  # these leave the text as it is
MULTI = "multi_label_classification"


def rows_of(texts=TEXTS, labels=LABELS, problem_type="single_label_classification", names=("safe", "unsafe")):
    columns = {"id": list(range(len(texts)))}
    return LabelledTexts(texts, np.array(labels), list(names), problem_type, columns, ["unsafe"])


def turns(text):
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def count_bad(text):
    return sum(turn["content"].count("BAD") for turn in turns(text))


def augmented(rows, names, seed=0, share=1.0, **options):
    return LabelledTexts.join(augment(rows, names, seed, SYSTEM, share, **options))


def at_place(text, place):
    turn, first, end = place
    return turns(text)[turn]["content"][first:end]


def with_request(rows):
    """The rows that have a place, because half of the documents have no request."""
    return rows.select([row for row, place in enumerate(rows.places) if place is not None])


@pytest.mark.parametrize("name", AROUND)
def test_labels_and_the_text_stay_and_nothing_harmful_is_added(name):
    rows = rows_of()
    new = with_request(augmented(rows, [name]))
    assert len(new) == (40 if name == "document" else 80)
    for text, place, label, number in zip(new.texts, new.places, new.labels, new.columns["id"], strict=True):
        old = rows.texts[number]
        assert text != old and count_bad(text) == old.count("BAD") and label == rows.labels[number]
        assert at_place(text, place) == old
        assert place[0] == (0 if name == "later_turns" else len(turns(text)) - 1)
        assert turns(text)[-1]["role"] == "user"


class TestPlaces:
    def test_a_record_writes_the_text_with_its_escapes(self):
        odd = 'Say "BAD" <b>\nnaïve</b> & go'
        new = augmented(rows_of([*TEXTS, *[odd] * 20], [*LABELS, *[1] * 20]), ["record"])
        written = {at_place(*row) for row in zip(new.texts, new.places, strict=True) if "BAD" in at_place(*row)}
        forms = {json.dumps(odd)[1:-1], json.dumps(odd, ensure_ascii=False)[1:-1], html.escape(odd), odd}
        assert {text for text in written if "Say" in text} == forms

    @pytest.mark.parametrize("name", AROUND)
    def test_the_place_of_a_row_moves_with_it(self, name):
        rows = rows_of()
        rows.places = [(0, 2, len(text) - 3) if row % 2 else None for row, text in enumerate(rows.texts)]
        new = with_request(augmented(rows, [name]))
        for text, place, number in zip(new.texts, new.places, new.columns["id"], strict=True):
            old = rows.texts[number]
            assert at_place(text, place) == (old[2:-3] if number % 2 else old)

    def test_of_a_chat_of_several_turns_it_is_not_known(self):
        asked, reply = {"role": "user", "content": "BAD"}, {"role": "assistant", "content": "No."}
        system = {"role": "system", "content": "mine"}
        chats = [[system, asked], [asked, reply, asked], [asked, reply]]
        rows = rows_of([*TEXTS[:40], *chats], [0] * 40 + [1] * 3)
        new = augmented(rows, ["earlier_turns"])
        assert [at_place(new.texts[40], new.places[40]), *new.places[41:]] == ["BAD", None, None]


SENTENCES = [f"This is sentence {i} of a quiet text. It goes on.\n\nHere is more of {i}." for i in range(30)]


class TestDocuments:
    def of(self, count=200, **options):
        rows = rows_of([f"BAD{i}." for i in range(count)] + TEXTS[:40], [1] * count + [0] * 40)
        pool = rows_of(SENTENCES, [0] * 30)
        pool.columns["source"] = ["mails"] * 15 + ["notes"] * 15
        rows.columns["source"] = ["requests"] * len(rows)
        return rows, augmented(rows, ["document"], documents=pool, **options)

    def test_half_have_no_request_and_the_label_that_is_not_flagged(self):
        rows, new = self.of()
        alone = [row for row, place in enumerate(new.places) if place is None]
        assert len(alone) == len(rows) / 2
        assert not any(count_bad(new.texts[row]) or new.labels[row] for row in alone)
        assert all(isinstance(new.texts[row], str) for row in alone)
        labels = np.tile([[0.0, 1.0]], (80, 1))
        labels[:40] = 0
        several = augmented(rows_of(labels=labels, problem_type=MULTI), ["document"])
        assert [row.any() for row in several.labels] == [count_bad(text) > 0 for text in several.texts]

    def test_length_and_place_vary(self):
        _, new = self.of(document_words=[20, 2000], introduces=False)
        sizes = [len(text.split()) for text in new.texts]
        assert min(sizes) >= 19 and max(sizes) <= 2003
        assert 150 < np.median(sizes) < 270, "log-uniform"
        shares = [first / (len(text) - end + first) for text, (_, first, end) in self.placed(new)]
        assert sum(share == 0 for share in shares) > 15 and sum(share == 1 for share in shares) > 15
        assert sum(0.4 < share < 0.6 for share in shares) > 15 and sum(0 < share < 0.4 for share in shares) > 5

    def placed(self, rows):
        return [(text, place) for text, place in zip(rows.texts, rows.places, strict=True) if place is not None]

    def test_requests_stand_between_sentences_or_lines(self):
        _, new = self.of(introduces=False)
        for text, (_, first, end) in self.placed(new):
            if len(text) - end < 2:
                continue  # behind a document that was cut anywhere
            before = text[:first].removesuffix('"').removesuffix("Now: ").rstrip()
            assert not before or before[-1] == "."

    def test_introductions(self):
        texts = self.of()[1].texts
        defended = sum("ny instruction" in text or "instructions that" in text or "commands" in text for text in texts)
        asked = sum("ummarise" in text or "Here is a document" in text or "text " in text[-30:] for text in texts)
        assert 15 < defended < 100 and 60 < defended + asked < 180, "half of them"
        assert "ummarise" not in str(self.of(introduces=False)[1].texts)

    def test_a_document_is_of_one_source_as_long_as_it_has_texts(self):
        _, new = self.of(document_words=[20, 100])
        for row, sources in enumerate(new.columns["source"]):
            requests, kinds = "requests" in sources.split("+"), set(sources.split("+")) - {"requests"}
            assert requests == (new.places[row] is not None) and len(kinds) == 1
        longer = self.of(document_words=[2000, 2000])[1].columns["source"]
        assert {"mails+notes", "mails+notes+requests"} == set(longer)

    def test_languages_without_spaces(self):
        pool = rows_of(["今天天气很好。我们去公园散步。" * 200], [0])
        new = augmented(rows_of(), ["document"], documents=pool, document_words=[100, 100], introduces=False)
        assert all(180 < len(text) < 300 for text in new.texts)

    def test_a_row_with_a_reply_stays(self):
        chats = [[*turns(text), {"role": "assistant", "content": "No."}] for text in TEXTS]
        new = augmented(rows_of([*chats, *TEXTS[:40]], [*LABELS, *[0] * 40]), ["document"])
        replies = [row for row, text in enumerate(new.texts) if not isinstance(text, str)]
        assert len(replies) == 80 and all(new.texts[row][-1]["content"] == "No." for row in replies)
        assert sum(new.labels[replies]) == 40


class TestDisguises:
    def test_each_form_occurs_as_often_for_each_label(self, monkeypatch):
        monkeypatch.setattr("llama_probe.data.augmentation.disguised", lambda text, form, rng: f"<{form}>")
        new = augmented(rows_of(), ["disguise"])
        for form in LEARNED:
            has_form = [f"<{form}>" in text for text in new.texts]
            assert np.bincount(new.labels[has_form]).tolist() == [4, 4]

    def test_half_are_disguised_in_part_and_the_place_is_that_of_the_text(self):
        text = "bring the small brown parcel to the northern gate"
        new = augmented(rows_of([text] * 80), ["disguise"])
        assert all(at_place(*row) == row[0] for row in zip(new.texts, new.places, strict=True))
        assert 20 < sum(not set(text.split()) & set(changed.split()) for changed in new.texts) < 60
        assert sum(changed.startswith("bring") or changed.endswith("gate") for changed in new.texts) > 15

    def test_a_place_is_disguised_with_its_document_or_alone(self):
        text = "the weather is fine. SEND IT NOW! we go for a walk."
        first = text.index("SEND")
        rows = rows_of([text] * 80)
        rows.places = [(0, first, first + len("SEND IT NOW!"))] * 80
        new = augmented(rows, ["disguise"])
        alone = 0
        for changed, place in zip(new.texts, new.places, strict=True):
            before, behind = changed[: place[1]], changed[place[2] :]
            alone += (before, behind) == (text[:first], " we go for a walk.")
            assert len(at_place(changed, place)) < 30 and "SEND IT NOW!" not in before + behind
        assert 20 < alone < 65

    @pytest.mark.parametrize("name", [*LEARNED, *HELD_OUT])
    def test_a_disguise_changes_letters_and_leaves_what_it_does_not_know(self, name):
        text = "How does the quick Brown fox jump over it, Max?" * 4
        first, again = (disguised(text, name, np.random.default_rng(3)) for _ in range(2))
        assert first == again != text
        assert disguised("", name, np.random.default_rng(3)) == ""
        assert disguised("今", name, np.random.default_rng(3)).startswith("今")

    def test_people_can_read_them(self):
        forms = {
            "spaced": "F i x   i t", "leetspeak": "F1x 17", "full width": "Ｆｉｘ ｉｔ", "bold of Unicode": "𝐅𝐢𝐱 𝐢𝐭",
            "Cyrillic look-alikes": "Fі\u0445 іt", "capitals": "FIX IT", "transliterated": "Фих ит",
        }  # fmt: skip
        assert {name: disguised("Fix it", name, np.random.default_rng(0)) for name in forms} == forms
        assert disguised("Шум ещё", "transliterated", np.random.default_rng(0)) == "Shum eshchyo"
        slips = disguised("keyboard " * 50, "keyboard slips", np.random.default_rng(0))
        assert 0.5 < sum(word == "keyboard" for word in slips.split()) / 50 < 0.8


def test_seed_and_share():
    first, again, other = (augmented(rows_of(), AUGMENTATIONS, seed).texts for seed in (3, 3, 4))
    assert first == again != other
    assert len(augmented(rows_of(), ["lead_in", "document"], share=0.25)) == 2 * 20


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


@pytest.mark.parametrize("name", AROUND)
def test_chats_keep_their_turns_and_their_system_prompt(name):
    contents = {"system": "mine", "user": "first", "assistant": "reply"}
    chat = [{"role": role, "content": content} for role, content in contents.items()]
    chat.append({"role": "user", "content": "last"})
    rows = rows_of([*TEXTS, *[chat] * 9], [*LABELS, *[1] * 9])
    new = next(text for text in augmented(rows, [name]).texts if len(turns(text)) >= 4)
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
        augment(rows_of(["a", "b"], labels, problem_type), ["document"], 0)
