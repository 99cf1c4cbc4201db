"""What `--halt-on` may say, on every command line."""

import pytest

from llama_probe.errors import ProbeError
from llama_probe.serving.halting_words import read_halting


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], {}),
        (["guard"], {"guard": {}}),
        (
            ["guard:bad", "a-b_1:no way:0.25"],
            {"guard": {"label": "bad"}, "a-b_1": {"label": "no way", "threshold": 0.25}},
        ),
        (['guard={"threshold": 0.6}'], {"guard": {"threshold": 0.6}}),
        (['guard={"label": "a:b=c", "patience": 2}'], {"guard": {"label": "a:b=c", "patience": 2}}),
    ],
)
def test_what_each_head_halts_by(words, found):
    assert read_halting(words) == found


@pytest.mark.parametrize(
    "word",
    [
        "",
        ":bad",
        "guard:",
        "guard:bad:",
        "guard:bad:high",
        "guard:bad:0.5:2",
        "guard=",
        "guard={",
        "guard=3",
        "a b",
    ],
)
def test_other_words(word):
    with pytest.raises(ProbeError, match="must be HEAD\\[:LABEL"):
        read_halting([word])


def test_a_head_that_is_named_twice():
    with pytest.raises(ProbeError, match="names guard more than once"):
        read_halting(["guard:bad:0.9", "guard"])
