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
        inside = {element.get("id") for element in self._open}
        element = {"tag": tag, "text": "", "inside": inside, **dict(attrs)}
        self.elements.append(element)
        if tag not in ("meta", "br"):
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag, "every element is closed"

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


def tokens_of(page):
    return [element for element in Parsed(page).all("span") if "text" in element["inside"]]


def level(token):
    return int(token["style"].removeprefix("--w: "))


def test_tokens_join_into_the_text_and_those_not_read_are_marked():
    tokens = tokens_of(reading_page(make_reading(TOKENS, unread=3)))
    shown = "".join(token["text"] for token in tokens)
    assert shown.replace("⏎", "\n").replace("⇥", "\t").replace("◦", "") == "".join(TOKENS)
    assert [token.get("class") for token in tokens] == ["unread"] * 3 + [None] * 6 + ["template"]
    assert all("not read by the head" in token["title"] and "style" not in token for token in tokens[:3])
    assert all("data-read" in token for token in tokens[3:])


def test_colors_are_the_weights():
    reading = make_reading(TOKENS, unread=3)
    tokens, combined = tokens_of(reading_page(reading))[3:], reading.token_weights[3:]
    assert level(tokens[int(combined.argmax())]) == 100
    for token, weight in zip(tokens, combined, strict=True):
        share = max(weight - 1 / 7, 0) / (combined.max() - 1 / 7)
        assert level(token) == pytest.approx(100 * share**0.5, abs=0.51)
        assert f"{weight:.1%} over all layers, {7 * weight:.1f} times an even share" in token["title"]
    reading.weights[:, 3:] = 1 / 7
    page = reading_page(reading)
    assert {level(token) for token in tokens_of(page)[3:]} == {0} and "not learned where to look" in page


def test_a_button_a_layer():
    reading = make_reading(TOKENS, unread=3, layers=[1, 4])
    page = reading_page(reading)
    first, *buttons = Parsed(page).all("button")
    assert [first["text"], *(button["text"] for button in buttons)] == ["all layers", "1", "4"]
    assert [first["aria-pressed"], *(button["aria-pressed"] for button in buttons)] == ["true", "false", "false"]
    assert first["data-weights"].split() == [str(level(token)) for token in tokens_of(page)[3:]]
    for slot, button in enumerate(buttons):
        levels, weights = [int(n) for n in button["data-weights"].split()], reading.weights[slot, 3:]
        assert len(levels) == 7 and levels[int(weights.argmax())] == 100
        assert all(n == 0 for n, weight in zip(levels, weights, strict=True) if weight <= 1 / 7)
        assert button["data-end"] == f"{weights.max():.1%}"
    heaviest = [reading.shown(int(i), 24) for slot in (0, 1) for i in np.argsort(-reading.weights[slot])[:5]]
    assert [code["text"] for code in Parsed(page).all("code")] == heaviest


def test_hostile_texts_and_names_stay_text():
    label = HOSTILE.translate(dict.fromkeys(map(ord, "\u202e\u2066")))  # names of labels cannot have these
    names = {"id2label": {0: label, 1: "{{ digest }} {% x %}"}}
    tokens = [HOSTILE, "a", HOSTILE + "\r", "<eos>"]
    reading = make_reading(tokens, 1, label, {label: 0.9, "{{ digest }} {% x %}": 0.1}, **names)
    page = reading_page(dataclasses.replace(reading, head=HOSTILE))
    parsed = Parsed(page)
    (script,) = parsed.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    (policy,) = [e["content"] for e in parsed.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|url\(|@import|<link|\bsrc=|\bhref=", reading_page(make_reading(TOKENS)))
    assert not parsed.all("img") and not any(key.startswith("on") for e in parsed.elements for key in e)
    assert not set("\u202e\u2066\r") & set(page) and "\\u202eabc\\u2066" in page and "{{ digest }} {% x %}" in page
    assert tokens_of(page)[2]["text"] == HOSTILE.replace("\u202e", "\\u202e").replace("\u2066", "\\u2066") + "␍"


def rows(page):
    """Return label, number, width of the bar and place of the line of each row."""
    body = page[: page.index("The text, token by token")]
    found = re.findall(r'<tr><th scope="row">(.*?)</th><td class="number">(.*?)</td>(.*?)</tr>', body)
    bars = [[*re.findall(r"(?:width|left): ([\d.]+)%", bar), None, None] for *_, bar in found]
    return [(name, number, *bar[:2]) for (name, number, _), bar in zip(found, bars, strict=True)]


def test_the_scores_of_each_kind_of_problem():
    page = reading_page(make_reading(TOKENS, threshold=0.6))
    assert rows(page) == [("yes", "75.0%", "75.0", "60.0"), ("no", "25.0%", "25.0", None)]
    value = {"problem_type": "regression", "id2label": {0: "score"}}
    page = reading_page(make_reading(TOKENS, 0, [-1.5], {"score": -1.5}, **value))
    assert rows(page) == [("score", "-1.5", None, None)] and "<h1>score -1.5</h1>" in page
    names = {f"label {i}": i / 28 for i in range(28)}
    multi = {"problem_type": "multi_label_classification", "id2label": dict(enumerate(names))}
    thresholds = [0.0, *(round(0.5 + i / 100, 2) for i in range(27))]
    page = reading_page(make_reading(TOKENS, 0, ["label 27"], names, threshold=thresholds, **multi))
    assert [row[0] for row in rows(page)] == list(names)[::-1]
    assert [float(row[3]) for row in rows(page)] == pytest.approx([100 * value for value in thresholds[::-1]])
    folded = page[page.index("<details>") : page.index("</details>")]
    assert "label 19<" in folded and "label 20<" not in folded
