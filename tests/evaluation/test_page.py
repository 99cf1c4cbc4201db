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
        self.elements.append({"tag": tag, "text": "", "inside": inside, **dict(attrs)})
        if tag not in ("meta", "br"):
            self._open.append(self.elements[-1])

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


def test_tokens_join_into_the_text_with_colors_by_their_weights():
    reading = make_reading(TOKENS, unread=3)
    tokens, combined = tokens_of(reading_page(reading)), reading.token_weights[3:]
    shown = "".join(token["text"] for token in tokens)
    assert shown.replace("⏎", "\n").replace("⇥", "\t").replace("◦", "") == "".join(TOKENS)
    assert [token.get("class") for token in tokens] == ["unread"] * 3 + [None] * 6 + ["template"]
    assert all("not read by the head" in token["title"] and "style" not in token for token in tokens[:3])
    assert all("data-read" in token for token in tokens[3:])
    for token, weight in zip(tokens[3:], combined, strict=True):
        share = max(weight - 1 / 7, 0) / (combined.max() - 1 / 7)
        assert level(token) == pytest.approx(100 * share**0.5, abs=0.51)
        assert f"{weight:.1%} over all layers, {7 * weight:.1f} times an even share" in token["title"]
    reading.weights[:, 3:] = 1 / 7
    assert {level(token) for token in tokens_of(reading_page(reading))[3:]} == {0}


def test_a_button_a_layer():
    reading = make_reading(TOKENS, unread=3, layers=[1, 4])
    page = reading_page(reading)
    first, *buttons = Parsed(page).all("button")
    assert [first["text"], *(button["text"] for button in buttons)] == ["all layers", "1", "4"]
    assert [first["aria-pressed"], *(button["aria-pressed"] for button in buttons)] == ["true", "false", "false"]
    assert first["data-weights"].split() == [str(level(token)) for token in tokens_of(page)[3:]]
    for slot, button in enumerate(buttons):
        levels, weights = [int(n) for n in button["data-weights"].split()], reading.weights[slot, 3:]
        assert levels[int(weights.argmax())] == 100 and button["data-end"] == f"{weights.max():.1%}"
        assert all(n == 0 for n, weight in zip(levels, weights, strict=True) if weight <= 1 / 7)
    heaviest = [reading.shown(int(i), 24) for slot in (0, 1) for i in np.argsort(-reading.weights[slot])[:5]]
    assert [code["text"] for code in Parsed(page).all("code")] == heaviest


def test_hostile_texts_and_names_stay_text():
    label, other = re.sub("[\u202e\u2066]", "", HOSTILE), "{{ digest }} {% x %}"  # names of labels are visible
    tokens = [HOSTILE, "a", HOSTILE + "\r", "<eos>"]
    reading = make_reading(tokens, 1, label, {label: 0.9, other: 0.1}, id2label={0: label, 1: other})
    page = reading_page(dataclasses.replace(reading, head=HOSTILE))
    parsed = Parsed(page)
    (script,) = parsed.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    (policy,) = [e["content"] for e in parsed.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|url\(|@import|<link|\bsrc=|\bhref=", reading_page(make_reading(TOKENS)))
    assert not parsed.all("img") and not any(key.startswith("on") for e in parsed.elements for key in e)
    assert not set("\u202e\u2066\r") & set(page) and "\\u202eabc\\u2066" in page and other in page
    assert tokens_of(page)[2]["text"] == HOSTILE.replace("\u202e", "\\u202e").replace("\u2066", "\\u2066") + "␍"


def scores_of(page):
    """Return the numbers of the labels, and the places of their thresholds."""
    table = page.partition("The text, token by token")[0]
    return [re.findall(part, table) for part in (r'<td class="number">(.*?)</td>', r'style="left: ([\d.]+)%')]


def test_the_scores_of_each_kind_of_problem():
    assert scores_of(reading_page(make_reading(TOKENS, threshold=0.6))) == [["75.0%", "25.0%"], ["60.0"]]
    page = reading_page(make_reading(TOKENS, threshold=0.3, flagged=["no"]))
    assert "“no” is given from" in page and "else “yes”" in page
    value = {"problem_type": "regression", "id2label": {0: "score"}}
    page = reading_page(make_reading(TOKENS, 0, [-1.5], {"score": -1.5}, **value))
    assert scores_of(page) == [["-1.5"], []] and "<h1>score -1.5</h1>" in page
    shares = {f"label {i}": i / 28 for i in range(28)}
    multi = {"problem_type": "multi_label_classification", "id2label": dict(enumerate(shares))}
    page = reading_page(make_reading(TOKENS, 0, ["label 27"], shares, threshold=[0.0] + [0.5] * 27, **multi))
    numbers = [f"{share:.1%}" for share in sorted(shares.values(), reverse=True)]
    assert scores_of(page) == [numbers, ["50.0"] * 27 + ["0.0"]]
    folded = page[page.index("<details>") : page.index("</details>")]
    assert "label 19<" in folded and "label 20<" not in folded
