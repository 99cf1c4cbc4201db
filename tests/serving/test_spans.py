"""The window that gave a head's score: in every output, in halts, and as a passage of the user's text."""

import copy
import pickle
from dataclasses import asdict

import pytest
import torch
from cases import MULTI
from conftest import make_probe, make_prompts, make_tokenizer, padded, probed

from llama_probe import Halt, ProbeConfig, ProbeError
from llama_probe.backbone import passes as passes_module
from llama_probe.data.prompts import PromptFormat
from llama_probe.heads.decision import describe_predictions
from llama_probe.serving.pipeline import ProbedTextGenerationPipeline
from llama_probe.serving.texts import join_outputs


WINDOW = 4
GREEDY = {"max_new_tokens": 3, "do_sample": False}
BAD = {"id2label": {0: "fine", 1: "bad"}, "flagged": ["bad"], "window": WINDOW}
TOPICS = {"id2label": {0: "a", 1: "b", 2: "c"}, "window": WINDOW, **MULTI}


@pytest.fixture
def model():
    heads = {"plain": make_probe(0), "bad": make_probe(1, **BAD), "topics": make_probe(2, probe_type="gate", **TOPICS)}
    return probed(heads)


def expected_spans(model, name, ids, mask=None):
    """The spans of the whole-tensor path, one row at a time without its padding."""
    spans = []
    for row, kept in zip(ids, torch.ones_like(ids) if mask is None else mask, strict=True):
        start = int(kept.argmax())
        with torch.no_grad():
            states = model(row[kept.bool()][None], output_hidden_states=True, probes=[]).hidden_states
            spans.append(model.probes[name](hidden_states=states).spans + start)
    return torch.cat(spans)


def assert_spans(model, found, ids, mask=None):
    assert list(found) == ["bad", "topics"], "of the heads with windows alone"
    for name, spans in found.items():
        assert spans.dtype == torch.long and torch.equal(spans, expected_spans(model, name, ids, mask))


def test_each_call_returns_them(model):
    ids = make_prompts(3, 19)
    for mask in (None, padded(ids)):
        assert_spans(model, model.generate(ids, attention_mask=mask, **GREEDY).probe_spans, ids, mask)
        outputs = model.classify(ids, attention_mask=mask)
        assert outputs.pop("plain").spans is None
        assert_spans(model, {name: output.spans for name, output in outputs.items()}, ids, mask)
    assert_spans(model, model(ids).probe_spans, ids)
    spans = model.generate(ids, **GREEDY).probe_spans["topics"]
    assert len(spans.unique()) > 4 and (spans.diff(dim=-1) <= WINDOW).all(), "or any window would pass"
    ways = ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 5})
    for way in ways:
        assert_spans(model, model.generate(ids, **{**GREEDY, **way}).probe_spans, ids)
    assert model.generate(ids, probes="plain", **GREEDY).probe_spans is None


def test_tokens_that_the_user_chooses_have_windows_too(model):
    ids = make_prompts(2, 19)
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, probes=[]).hidden_states
        expected = model.probes["bad"](hidden_states=states, attention_mask=chosen)
    found = model.classify(ids, probe_mask=chosen, probes=["bad"])["bad"]
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.spans, expected.spans)


def test_long_prompts_and_copies_of_outputs(model, monkeypatch):
    ids = make_prompts(2, 31)
    out = model.generate(ids, **GREEDY)
    monkeypatch.setattr(passes_module, "PASS_TOKENS", 6)
    assert_spans(
        model, {name: output.spans for name, output in model.classify(ids, probes=["bad", "topics"]).items()}, ids
    )
    for copied in (copy.copy(out), pickle.loads(pickle.dumps(out))):
        assert_spans(model, copied.probe_spans, ids)


def test_a_prompt_that_goes_on_from_a_cache(model):
    ids = make_prompts(1, 23)
    start = model(ids[:, :11], use_cache=True)
    found = model.classify(ids, cache=start.cache, probe_state=start.probe_state, probes=["bad", "topics"])
    assert_spans(model, {name: output.spans for name, output in found.items()}, ids)


def test_descriptions_have_the_spans_of_flagged_labels(model):
    ids = make_prompts(3, 19)
    out = model.generate(ids, num_return_sequences=2, do_sample=True, max_new_tokens=2)
    records = out.describe(6)
    labels = out.probe_labels
    for row, record in enumerate(records):
        prompt = row // 2
        assert "span" not in record["probes"]["plain"]
        spans = {name: found.tolist()[prompt] for name, found in out.probe_spans.items()}
        flagged = {"bad": spans["bad"][1]} if labels["bad"][prompt] == "bad" else {}
        assert record["probes"]["bad"]["span"] == flagged
        assert record["probes"]["topics"]["span"] == {
            label: spans["topics"]["abc".index(label)] for label in labels["topics"][prompt]
        }
    output = model.classify(ids)["bad"]
    assert [row["span"] for row in output.describe()] == [record["probes"]["bad"]["span"] for record in records[::2]]
    config = ProbeConfig(**TOPICS | {"flagged": ["c"]})
    scores = torch.tensor([[0.9, 0.1, 0.8]])
    spans = torch.tensor([[[0, 4], [2, 6], [4, 8]]])
    (row,) = describe_predictions([["a", "c"]], scores, config, None, spans)
    assert row["span"] == {"c": [4, 8]}, "a head says which labels it is there to find"
    (row,) = describe_predictions([None], scores, config, None, spans)
    assert row["span"] == {}, "it abstains"


def test_a_halt_says_where(model):
    ids = make_prompts(3, 19)
    rules = {"bad": {"threshold": 0.0}}
    out = model.generate(ids, attention_mask=padded(ids), halt_on=rules, **GREEDY)
    spans = out.probe_spans["bad"][:, 1].tolist()
    assert [halt.span for halt in out.probe_halts] == [tuple(span) for span in spans]
    assert out.describe(3)[0]["halted"] == asdict(out.probe_halts[0])
    topic = model.generate(ids, halt_on={"topics": {"label": "b", "threshold": 0.0}}, **GREEDY)
    assert [list(halt.span) for halt in topic.probe_halts] == topic.probe_spans["topics"][:, 1].tolist()
    plain = model.generate(ids, halt_on={"plain": {"label": "LABEL_1", "threshold": 0.0}}, **GREEDY)
    assert all(halt.span is None for halt in plain.probe_halts)
    asked = {"bad": {"unsure": (0.0, 1.0), "ask": lambda texts: [True, Halt(label="mine"), False]}}
    answers = model.generate(ids, halt_on=asked, tokenizer=TOKENIZER, **GREEDY)
    first, mine, none = answers.probe_halts
    assert list(first.span) == answers.probe_spans["bad"][0, 1].tolist() and mine.span is none is None
    own = model.generate(ids, halt_on=lambda outputs: [True] * 3, **GREEDY)
    assert all(halt.span is None for halt in own.probe_halts), "a function has decided"


TOKENIZER = make_tokenizer()
TEXTS = ["Hi", "A much longer text than that one, to be read in many windows", "Something between", "x"]


@pytest.fixture
def reader():
    """A model of texts, with a head that flags all of them."""
    fields = PromptFormat(TOKENIZER).config_fields()
    head = make_probe(1, **BAD, **fields, token_scope="content", threshold=0.0)
    return probed({"bad": head}, vocab_size=260)


def test_texts_of_all_lengths_keep_their_order(reader, monkeypatch):
    monkeypatch.setattr(passes_module, "BATCH_TOKENS", 100)
    found = reader.classify(TEXTS, tokenizer=TOKENIZER)["bad"]
    alone = torch.cat([reader.classify(text, tokenizer=TOKENIZER)["bad"].spans for text in TEXTS])
    assert torch.equal(found.spans, alone)
    picked = join_outputs([found], torch.tensor([2, 0]), found.config_of())
    assert torch.equal(picked.spans, alone[[2, 0]])


def test_spans_count_from_the_start_that_many_texts_share(reader):
    texts = [f"text {number:02} of several windows" for number in range(12)]
    alone = torch.cat([reader.classify(text, tokenizer=TOKENIZER)["bad"].spans for text in texts])
    passes = []
    reader.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    assert torch.equal(reader.classify(texts, tokenizer=TOKENIZER)["bad"].spans, alone)
    assert passes == [1, 12], "the start ran once"
    assert alone.unique(dim=0).shape[0] > 1, "or any span would pass"


def test_passages_are_the_tokens_of_the_spans(reader):
    prompts = PromptFormat.from_config(reader.probes["bad"].config, TOKENIZER)
    chat = [{"role": "user", "content": TEXTS[1]}]
    found = reader.classify([*TEXTS, chat], tokenizer=TOKENIZER, passages=True)["bad"]
    for text, ids, row in zip([*TEXTS, chat], prompts.encode([*TEXTS, chat]), found.describe(), strict=True):
        first, end = row["span"]["bad"]
        (passage,) = row["passages"]
        assert passage["label"] == "bad" and passage.get("message") == (0 if text is chat else None)
        content = TEXTS[1] if text is chat else text
        if passage["start"] is not None:
            assert content[passage["start"] : passage["end"]] == passage["text"]
            assert passage["text"] in TOKENIZER.decode(ids[first:end])
    assert found.describe()[1]["passages"][0]["start"] is not None, "or nothing was compared"
    assert "passages" not in reader.classify(TEXTS, tokenizer=TOKENIZER)["bad"].describe()[0]
    reader.probes["bad"].config.threshold = 1.0
    assert [
        row["passages"] for row in reader.classify(TEXTS, tokenizer=TOKENIZER, passages=True)["bad"].describe()
    ] == [[]] * 4


def test_a_text_without_numbers_has_no_passage(reader):
    """One text must not stop a job over many."""
    reader.probes["bad"].classifier.bias.data.fill_(float("nan"))
    output = reader.classify(TEXTS, tokenizer=TOKENIZER, passages=True)["bad"]
    assert output.passages == [[]] * 4
    with pytest.raises(ProbeError, match="no number"):
        output.describe()


def test_passages_that_cannot_be_found(reader, model):
    with pytest.raises(ProbeError, match=r"'plain' judges no windows"):
        model.classify(TEXTS, tokenizer=TOKENIZER, passages=True)
    with pytest.raises(ProbeError, match="passages is for texts"):
        model.classify(make_prompts(), passages=True)


def test_the_pipeline_reads_a_text_whole():
    fields = PromptFormat(TOKENIZER, max_length=60).config_fields()
    head = make_probe(1, **BAD, **fields, token_scope="content", threshold=0.0)
    model = probed({"bad": head}, vocab_size=260)
    pipe = ProbedTextGenerationPipeline(model, TOKENIZER)
    chat = [{"role": "user", "content": TEXTS[1] * 3}]
    (record,) = pipe(chat, halt_on="bad", **GREEDY)
    (whole,) = model.classify([chat], tokenizer=TOKENIZER)["bad"].describe()
    (cut,) = model.classify([chat], tokenizer=TOKENIZER, max_length=60)["bad"].describe()
    found = record["probes"]["bad"]
    assert found["span"] == whole["span"] != cut["span"] and found["score"] == pytest.approx(whole["score"], abs=1e-4)
    assert record["halted"]["span"] == tuple(found["span"]["bad"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_pipeline_gives_passages_of_the_prompt(batch_size):
    tokenizer = make_tokenizer()
    guard = make_probe(1, **BAD, threshold=0.0, **PromptFormat(tokenizer).config_fields())
    pipe = ProbedTextGenerationPipeline(probed({}, vocab_size=260), tokenizer, probe={"bad": guard}, device="cpu")
    texts = ["A text of some length that is read.", "Short."]
    chats = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}] for text in texts]
    for prompts in (texts, chats):
        for prompt, (record,) in zip(prompts, pipe(prompts, batch_size=batch_size, **GREEDY), strict=True):
            (passage,) = record["probes"]["bad"]["passages"]
            assert passage["label"] == "bad" and passage["text"]
            if passage["start"] is not None:
                source = prompt if isinstance(prompt, str) else prompt[passage["message"]]["content"]
                assert source[passage["start"] : passage["end"]] == passage["text"]
            alone = pipe(prompt, **GREEDY)[0]["probes"]["bad"]["passages"]
            assert alone == [passage], "padding does not move it"
    (record,) = pipe(texts[0], prefix="Words before. ", **GREEDY)
    assert "span" in record["probes"]["bad"] and "passages" not in record["probes"]["bad"], "it is more than the text"
