"""`halt_on` with `unsure` and `ask`: another judge decides on prompts in the band, before the first token."""

import pytest
from conftest import make_probe, make_tokenizer, probed

from llama_probe import ProbeError
from llama_probe.data.prompts import PromptFormat


TEXTS = ["bake bread", "rob a bank", "write a poem", "sum two numbers"]


@pytest.fixture(scope="module")
def served():
    tokenizer = make_tokenizer()
    prompts = PromptFormat(tokenizer)
    head = make_probe(probe_type="gate", token_scope="user", **prompts.config_fields())
    model = probed({"guard": head}, vocab_size=260)
    inputs = prompts.batch(TEXTS)
    scores = model.classify(**inputs)["guard"].probabilities[:, 1].tolist()
    return model, tokenizer, inputs, scores


def generate(served, asked=None, answer=bool, **options):
    model, tokenizer, inputs, _ = served

    def ask(texts):
        if asked is not None:
            asked.extend(texts)
        return [answer(text) for text in texts]

    rule = {"threshold": 1.0, "unsure": (0, 1), "ask": ask, **options}
    return model.generate(**inputs, tokenizer=tokenizer, max_new_tokens=2, halt_on={"guard": rule})


def test_the_judge_gets_what_users_wrote_and_decides(served):
    asked = []
    out = generate(served, asked, answer=lambda text: "bank" in text)
    assert asked == TEXTS
    assert [halt is not None for halt in out.probe_halts] == [False, True, False, False]
    halt = out.probe_halts[1]
    assert halt.head == "guard" and halt.score == pytest.approx(served[3][1], abs=1e-5) and halt.token is None


def test_only_the_band_is_asked(served):
    *_, scores = served
    low, middle, high = sorted(scores)[:3]
    asked = []
    out = generate(served, asked, answer=lambda _: False, threshold=high, unsure=(middle, high))
    assert asked == [TEXTS[scores.index(middle)]]
    assert [halt is not None for halt in out.probe_halts] == [score >= high for score in scores]
    asked.clear()
    generate(served, asked, threshold=0.0, unsure=(low - 1e-6, low - 1e-7))
    assert asked == []


def test_the_judge_may_let_through_what_the_head_would_halt(served):
    out = generate(served, answer=lambda _: False, threshold=0.0)
    assert out.probe_halts == [None] * 4


def test_an_error_of_the_judge_begins_no_reply(served):
    with pytest.raises(ZeroDivisionError):
        generate(served, answer=lambda text: 1 / 0)
    with pytest.raises(ProbeError, match="ask of 'guard'"):
        generate(served, answer=lambda text: "yes")


@pytest.mark.parametrize("options", [{"ask": None}, {"unsure": None}, {"unsure": (0.6, 0.2)}, {"unsure": 0.5}])
def test_wrong_options(served, options):
    with pytest.raises(ProbeError, match="unsure"):
        generate(served, **options)


def test_texts_need_a_tokenizer(served):
    with pytest.raises(ProbeError, match="tokenizer="):
        generate((served[0], None, *served[2:]))


def test_several_turns_are_one_text(served):
    model, tokenizer, _, _ = served
    chat = [
        {"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "two"), ("user", "three"))
    ]
    inputs, asked = PromptFormat(tokenizer).batch([chat]), []
    rule = {"unsure": (0, 1), "ask": lambda texts: asked.extend(texts) or [False]}
    model.generate(**inputs, tokenizer=tokenizer, max_new_tokens=2, halt_on={"guard": rule})
    assert "one" in asked[0] and "three" in asked[0] and "two" not in asked[0] and "assistant" not in asked[0]
