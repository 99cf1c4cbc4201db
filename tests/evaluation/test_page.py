"""The page: one file that shows a reading to anyone, and that a text cannot take over."""

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import make_reading

from llama_probe.evaluation.page import reading_page


TOKENS = ["<bos>", "system", "\n", "good", " mor", "ning", "日", "", "\t", "<eos>"]
HOSTILE = "<script>alert(1)</script><img src=x onerror='a()'>\"'&\u202eabc\u2066"


class Parsed(HTMLParser):
    """Elements with their attributes, and the text within each."""

    def __init__(self, page):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        element = {
            "tag": tag,
            "text": "",
            "inside": [e["tag"] + "#" + e.get("id", "") for e in self._open],
            **dict(attrs),
        }
        self.elements.append(element)
        if tag not in ("meta", "br"):
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag, "every element is closed"

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, inside=None, **attrs):
        return [
            e
            for e in self.elements
            if e["tag"] == tag and (inside is None or inside in e["inside"]) and attrs.items() <= e.items()
        ]


def tokens_of(page):
    return Parsed(page).all("span", "div#text")


def level(token):
    return int(token["style"].removeprefix("--w: "))


def test_tokens_join_into_the_text():
    shown = "".join(token["text"] for token in tokens_of(reading_page(make_reading(TOKENS, unread=3))))
    assert shown.replace("⏎", "\n").replace("⇥", "\t").replace("◦", "") == "".join(TOKENS)


def test_the_beginning_that_is_not_read_is_marked():
    tokens = tokens_of(reading_page(make_reading(TOKENS, unread=3)))
    assert [token.get("class") for token in tokens] == ["unread"] * 3 + [None] * 6 + ["template"]
    assert all("not read by the head" in token["title"] and "style" not in token for token in tokens[:3])
    assert all("data-read" in token for token in tokens[3:])
    assert "does not read it" not in reading_page(make_reading(TOKENS))


def test_colors_are_the_weights():
    reading = make_reading(TOKENS, unread=3)
    tokens = tokens_of(reading_page(reading))[3:]
    combined = reading.token_weights[3:]
    assert level(tokens[int(combined.argmax())]) == 100
    for token, weight in zip(tokens, combined, strict=True):
        share = max(weight - 1 / 7, 0) / (combined.max() - 1 / 7)
        assert level(token) == pytest.approx(100 * share**0.5, abs=0.51)
        assert f"{weight:.1%} over all layers, {7 * weight:.1f} times an even share" in token["title"]
    alike = make_reading(TOKENS, unread=3)
    alike.weights[:, 3:] = 1 / 7
    assert {level(token) for token in tokens_of(reading_page(alike))[3:]} == {0}
    assert "not learned where to look" in reading_page(alike)


def test_a_button_a_layer():
    reading = make_reading(TOKENS, unread=3, layers=[1, 4])
    buttons = Parsed(reading_page(reading)).all("button")
    assert [button["text"] for button in buttons] == ["all layers", "1", "4"]
    assert [button["aria-pressed"] for button in buttons] == ["true", "false", "false"]
    tokens = tokens_of(reading_page(reading))[3:]
    assert buttons[0]["data-weights"].split() == [str(level(token)) for token in tokens]
    for slot, button in enumerate(buttons[1:]):
        levels = [int(n) for n in button["data-weights"].split()]
        weights = reading.weights[slot, 3:]
        assert len(levels) == 7 and levels[int(weights.argmax())] == 100
        assert all(n == 0 for n, weight in zip(levels, weights, strict=True) if weight <= 1 / 7)
        assert button["data-end"] == f"{weights.max():.1%}"


def test_the_heaviest_tokens_of_a_layer():
    reading = make_reading(TOKENS, layers=[2])
    shown = [code["text"] for code in Parsed(reading_page(reading)).all("code")]
    order = np.argsort(-reading.weights[0])[:5]
    assert shown == [reading.shown(int(position), 24) for position in order]


def test_hostile_texts_and_names_stay_text():
    label = HOSTILE.translate(dict.fromkeys(map(ord, "\u202e\u2066")))  # which names of labels have not
    names = {"id2label": {0: label, 1: "$digest ${x}"}}
    reading = make_reading(
        [HOSTILE, "a", HOSTILE + "\r", "<eos>"], 1, label, {label: 0.9, "$digest ${x}": 0.1}, **names
    )
    page = reading_page(dataclasses.replace(reading, head=HOSTILE))
    parsed = Parsed(page)
    (script,) = parsed.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    policy = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert not parsed.all("img") and not any(key.startswith("on") for e in parsed.elements for key in e)
    assert not set("\u202e\u2066\r") & set(page) and "\\u202eabc\\u2066" in page
    assert tokens_of(page)[2]["text"] == HOSTILE.replace("\u202e", "\\u202e").replace("\u2066", "\\u2066") + "␍"
    assert "$digest ${x}" in page


def test_it_needs_nothing_else():
    page = reading_page(make_reading(TOKENS))
    assert not re.search(r"https?:|url\(|@import|<link|\bsrc=|\bhref=", page)


def rows(page):
    """Label, number, width of the bar, place of the line."""
    body = page[: page.index("The text, token by token")]
    found = re.findall(r'<tr><th scope="row">(.*?)</th><td class="number">(.*?)</td>(.*?)</tr>', body)
    return [
        (name, number, *([*re.findall(r"(?:width|left): ([\d.]+)%", bar), None, None])[:2])
        for name, number, bar in found
    ]


def test_two_labels():
    page = reading_page(make_reading(TOKENS, threshold=0.6))
    assert rows(page) == [("yes", "75.0%", "75.0", "60.0"), ("no", "25.0%", "25.0", None)]
    assert "“yes” is given from a probability of 60.0% on (the line), else “no”." in page
    assert "<h1>yes (75%)</h1>" in page and "and gives the text a label" in page.replace("\n", " ")
    page = reading_page(make_reading(TOKENS))
    assert "The label with the largest probability is given." in page and rows(page)[0][3] is None


def test_many_labels_at_once():
    names = {f"label {i}": i / 28 for i in range(28)}
    multi = {"problem_type": "multi_label_classification", "id2label": dict(enumerate(names))}
    thresholds = [0.0, *(round(0.5 + i / 100, 2) for i in range(27))]
    page = reading_page(make_reading(TOKENS, 0, ["label 27"], names, threshold=thresholds, **multi))
    assert [row[0] for row in rows(page)] == list(names)[::-1]
    assert [float(row[3]) for row in rows(page)] == pytest.approx([100 * value for value in thresholds[::-1]])
    folded = page[page.index("<details>") : page.index("</details>")]
    assert "20 more labels" in folded and "label 19<" in folded and "label 20<" not in folded
    assert "<h1>no label</h1>" in reading_page(make_reading(TOKENS, 0, [], names, **multi))


def test_values():
    page = reading_page(
        make_reading(TOKENS, 0, [-1.5], {"score": -1.5}, problem_type="regression", id2label={0: "score"})
    )
    assert rows(page) == [("score", "-1.5", None, None)] and "<h1>score -1.5</h1>" in page
    assert "gives the text a number" in page.replace("\n", " ") and "How sure" not in page


def test_a_long_text_and_one_that_was_cut():
    page = reading_page(make_reading([f" w{i}" for i in range(2000)], max_length=2000))
    assert len(tokens_of(page)) == 2000 and "What goes beyond 2000 tokens is cut off." in page
    assert "is cut off" not in reading_page(make_reading(TOKENS, max_length=2000))
