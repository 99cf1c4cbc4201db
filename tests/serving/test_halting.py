"""Halting: flagged prompts get no token of a reply, and the others get what they would have got."""

import gc
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import MODES as ALL_MODES
from conftest import VOCAB, expected_logits, make_probe, make_prompts, make_tokenizer, padded, probed
from observers import Recorder, passes_of

from llama_probe import Halt, ProbeConfig, ProbeError
from llama_probe.data.prompts import PromptFormat
from llama_probe.heads import probe_types
from llama_probe.heads.decision import ProbeOutput
from llama_probe.serving import session
from llama_probe.serving.halting import Halter, HaltRule


MODES = {**ALL_MODES, "at least three tokens": {"min_new_tokens": 3}}
PAD = 0


def flag(*rows):
    """A policy that halts these prompts."""
    return lambda outputs: [i in rows for i in range(len(outputs["mood"].logits))]


@pytest.fixture
def model():
    return probed({"mood": make_probe(id2label={0: "fine", 1: "awful"}, flagged=["awful"])})


@pytest.fixture
def passes(model):
    return passes_of(model)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_decoded_if_all_are_halted(model, passes, prompts, mode):
    out = model.generate(prompts, max_new_tokens=5, halt_on=flag(0, 1, 2), **MODES[mode])
    copies = MODES[mode].get("num_return_sequences", 1)
    assert torch.equal(out.sequences, prompts.repeat_interleave(copies, dim=0))
    assert sum(passes) == prompts.shape[1], "the prefill, and no more"
    assert out.probe_halts == [Halt(), Halt(), Halt()] and len(out.probe_logits["mood"]) == 3
    plain = model.generate(prompts, max_new_tokens=3, **MODES[mode])
    assert type(out) is type(plain) and plain.probe_halts is None


def test_processes_that_share_the_model_are_waited_for(model, prompts, monkeypatch):
    unfinished = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, **kwargs: unfinished.append(flag.item()))
    out = model.generate(prompts, max_new_tokens=3, halt_on=flag(0, 1, 2), halt_reply=[5, 6], synced_gpus=True)
    assert unfinished == [1, 0] and out.sequences[:, 9:].tolist() == [[5, 6]] * 3


def test_the_model_tells_if_processes_share_it(model, passes, prompts, monkeypatch):
    monkeypatch.setattr(session, "is_fsdp_managed_module", lambda lm: lm is model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for processes, count in ((1, 1), (2, 2)):
        passes.clear()
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda number=processes: number)
        model.generate(prompts, max_new_tokens=2, halt_on=flag(0, 1, 2), eos_token_id=None)
        assert len(passes) == count


@pytest.mark.parametrize("mode, eos", [*((mode, 2) for mode in MODES), ("greedy", None), ("beams", None)])
def test_the_others_get_what_they_would_have_got(prompts, mode, eos):
    model = probed({"mood": make_probe()}, eos_token_id=eos)
    torch.manual_seed(3)
    free = model.generate(prompts, max_new_tokens=5, **MODES[mode])
    torch.manual_seed(3)
    out = model.generate(prompts, max_new_tokens=5, halt_on=flag(1), **MODES[mode])
    length, copies = prompts.shape[1], MODES[mode].get("num_return_sequences", 1)
    assert [halt is None for halt in out.probe_halts] == [True, False, True]
    expected = free.sequences.clone()
    expected[copies : 2 * copies, length:] = PAD
    width = out.sequences.shape[1]  # the halted row may have been the longest
    assert torch.equal(out.sequences, expected[:, :width]) and (expected[:, width:] == PAD).all()
    torch.testing.assert_close(out.probe_logits["mood"], free.probe_logits["mood"])


def test_prompts_given_as_embeddings(model, prompts):
    embeds = model.get_input_embeddings()(prompts)
    assert model.generate(inputs_embeds=embeds, max_new_tokens=4, halt_on=flag(0, 1, 2)).sequences.shape == (3, 0)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=4, halt_on=flag(0), halt_reply=[9, 8])
    free = model.generate(inputs_embeds=embeds, max_new_tokens=4)
    assert torch.equal(out.sequences[1:], free.sequences[1:]) and out.sequences[0].tolist() == [9, 8, PAD, PAD]


@pytest.mark.parametrize("kwargs", [{"halt_on": flag()}, {"on_probe_token": lambda scores: None, "probe_state": True}])
def test_the_cache_goes_with_the_output(model, prompts, kwargs):
    """Nothing that a call leaves behind waits for the garbage collector."""
    model.add_probe("both", make_probe(token_scope="all"))
    gc.collect()
    gc.disable()
    try:
        cache = weakref.ref(model.generate(prompts, max_new_tokens=3, **kwargs).cache)
        assert cache() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
def test_fields_that_the_output_was_asked_to_hold(model, prompts, rows):
    """If all are halted, they are there and empty."""
    asked = ("scores", "logits", "attentions", "hidden_states")
    fields = {f"output_{name}": True for name in asked}
    out = model.generate(prompts, max_new_tokens=4, halt_on=flag(*rows), eos_token_id=None, **fields)
    assert [len(out[name]) for name in asked] == [out.sequences.shape[1] - prompts.shape[1]] * 4
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    out = model.generate(prompts, halt_on=flag(*rows), output_scores=True, **beams)
    assert out.sequences_scores.shape == (6,) and out.sequences_scores[0] == 0, "no token, or one without alternative"
    tensor = model.generate(prompts, max_new_tokens=4, halt_on=flag(*rows), return_dict_in_generate=False)
    assert isinstance(tensor, torch.Tensor) and (tensor[0, 9:] == PAD).all()


class TestReplies:
    def test_token_ids(self, model, prompts):
        reply = [5, 6, 7, 8, 9, 10]
        out = model.generate(prompts, max_new_tokens=4, halt_on=flag(0, 2), halt_reply=torch.tensor([reply]))
        free = model.generate(prompts, max_new_tokens=4)
        assert out.sequences[0].tolist() == [*prompts[0].tolist(), *reply]
        assert out.sequences[1].tolist() == [*free.sequences[1].tolist(), PAD, PAD], "padded to the longest"
        assert out.sequences[2, 9:].tolist() == reply

    def test_a_text(self):
        model = probed({"mood": make_probe()}, vocab_size=260)
        tokenizer, ids, text = make_tokenizer(), make_prompts(1), "I would rather not."
        streamer = Recorder()
        processor = SimpleNamespace(tokenizer=tokenizer)  # as multimodal backbones have
        out = model.generate(ids, halt_on=flag(0), halt_reply=text, tokenizer=processor, streamer=streamer)
        assert tokenizer.decode(out.sequences[0, ids.shape[1] :]) == text
        assert streamer.tokens[0] == ids[0].tolist() and streamer.ended
        assert tokenizer.decode(streamer.reply) == text


class TestPolicies:
    def test_an_error_lets_nothing_through(self, model, prompts):
        def policy(outputs):
            raise RuntimeError("out of order")

        streamer = Recorder()
        with pytest.raises(RuntimeError, match="out of order"):
            model.generate(prompts[:1], halt_on=policy, streamer=streamer)
        assert streamer.tokens == [prompts[0].tolist()] and streamer.ended, "a reader of the stream does not wait"
        assert len(model.generate(prompts, max_new_tokens=2).probe_logits["mood"]) == 3, "the model is as it was"

    def test_it_may_call_the_model(self, model, prompts):
        """Heads run there as anywhere else, and halt."""
        model.add_probe("reply", make_probe(token_scope="response"))
        kwargs, inner = {"max_new_tokens": 4, "eos_token_id": None}, []
        expected = model.generate(prompts, **kwargs)

        def call(*_):
            inner.append(model.generate(prompts, max_new_tokens=3, halt_on={"mood": {"threshold": 0.0}}))
            passed = model(prompts, probes="mood").probe_logits["mood"]
            torch.testing.assert_close(passed, expected.probe_logits["mood"])
            return [False] * 3

        out = model.generate(prompts, halt_on=call, on_probe_token=call, **kwargs)
        assert torch.equal(out.sequences, expected.sequences) and out.probe_halts == [None] * 3
        torch.testing.assert_close(out.probe_token_logits, expected.probe_token_logits)
        assert len(inner) == 1 + 3
        assert all(torch.equal(each.sequences, prompts) and all(each.probe_halts) for each in inner)

    FORMS = [None, Halt("mood", "awful", 0.7, 0.5), 1], torch.tensor([False, True, True])

    @pytest.mark.parametrize("decisions", [*FORMS, [torch.tensor([0]), np.bool_(True), np.True_]])
    def test_forms_of_decisions(self, model, prompts, decisions):
        halts = model.generate(prompts, max_new_tokens=2, halt_on=lambda outputs: decisions).probe_halts
        assert halts[0] is None and halts[2] == Halt()
        assert halts[1] == (decisions[1] if isinstance(decisions[1], Halt) else Halt())

    @pytest.mark.parametrize("decisions", [None, [False, False], {0: True, 1: True, 2: True}, [math.nan, 0, 0]])
    def test_anything_else_is_no_decision(self, model, passes, prompts, decisions):
        with pytest.raises(ProbeError, match="the halting policy returned"):
            model.generate(prompts, halt_on=lambda outputs: decisions)
        assert len(passes) == 1, "no token was decoded"


def output_of(logits, **changes):
    config = ProbeConfig(probe_type="gate", **changes)
    return config, ProbeOutput.from_logits(torch.tensor(logits, dtype=torch.float32), config)


TWO, MANY, THREE = [[0.0, 0.1], [0.0, 1.0]], [[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]], (3 * torch.eye(3) - 1).tolist()
SEVERAL = {"num_labels": 3, "problem_type": "multi_label_classification", "threshold": [0.5, 0.9, 0.5]}
VALUE = {"num_labels": 1, "problem_type": "regression"}
FLAGS_TWO = {"num_labels": 3, "flagged": ["LABEL_0", "LABEL_2"]}
NAN, EITHER = [[math.nan, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]


class TestRules:
    @pytest.mark.parametrize(
        "logits, changes, options, halted",
        [
            (TWO, {"threshold": 0.6}, {}, [None, "LABEL_1"]),
            (TWO, {"thresholds": {"fpr-2%": 0.6}}, {"threshold": "fpr-2%"}, [None, "LABEL_1"]),
            (MANY, {"num_labels": 3}, {"label": "LABEL_2"}, ["LABEL_2", None]),
            (MANY, {"num_labels": 3}, {"label": "LABEL_2", "threshold": 0.1}, ["LABEL_2", "LABEL_2"]),
            ([[0.0, 1.0, 1.0]], SEVERAL, {"label": "LABEL_1"}, [None]),  # its saved threshold is 0.9
            ([[0.0, 1.0, 1.0]], SEVERAL, {"label": "LABEL_2"}, ["LABEL_2"]),
            ([[2.5], [3.5]], VALUE, {"threshold": 3}, [None, "LABEL_0"]),
            (NAN, {}, {}, ["LABEL_1", None]),
            # by its name, wherever it stands
            (EITHER, {"id2label": {0: "good", 1: "bad"}, "flagged": ["bad"]}, {}, ["bad", None]),
            (EITHER, {"id2label": {0: "bad", 1: "good"}, "flagged": ["bad"]}, {}, [None, "bad"]),
            (THREE, FLAGS_TWO, {}, ["LABEL_0", None, "LABEL_2"]),
            (THREE, {**SEVERAL, **FLAGS_TWO, "threshold": 0.5}, {}, ["LABEL_0", None, "LABEL_2"]),
            (THREE, FLAGS_TWO, {"label": "LABEL_1"}, [None, "LABEL_1", None]),
        ],
    )
    def test_the_label_that_a_rule_halts_on(self, logits, changes, options, halted):
        config, output = output_of(logits, **changes)
        halts = Halter({"h": options}, {"h": config}).decide({"h": output}, len(logits))
        assert [halt and halt.label for halt in halts] == halted

    def test_the_first_rule_counts(self):
        config, output = output_of([[0.0, 1.0], [1.0, 0.0]])
        halter = Halter({"a": {"threshold": 0.9}, "b": None}, {"a": config, "b": config})
        assert [halt and halt.head for halt in halter.decide({"a": output, "b": output}, 2)] == ["b", None]

    @pytest.mark.parametrize("chunks", [{}, {"prefill_chunk_size": 2}])
    @pytest.mark.parametrize("head_type", probe_types())
    def test_an_lm_that_gives_nan_lets_nothing_through(self, head_type, chunks, prompts):
        values = {"probe_type": head_type, "vocab_size": VOCAB}
        heads = {scope: make_probe(token_scope=scope, **values) for scope in ("prompt", "all")}
        model, mask = probed(heads), padded(prompts)
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
        for scope, head in heads.items():
            rule = {"label": "LABEL_1", "threshold": 1.0, "patience": 2 if scope == "all" else 1}
            halting = {"halt_on": {scope: rule}, **chunks}
            out = model.generate(prompts, attention_mask=mask, max_new_tokens=2, probes=scope, **halting)
            assert out.probe_logits[scope].isnan().all() and torch.equal(out.sequences, prompts)
            assert expected_logits(head, prompts, mask, model).isnan().all()

    @pytest.mark.parametrize(
        "changes, options, words",
        [
            ({"num_labels": 3}, {}, "label"),
            (VALUE, {}, "threshold"),
            (VALUE, {"threshold": math.nan}, "threshold"),
            ({"num_labels": 2, "problem_type": "regression"}, {"threshold": 1.0}, "label"),
            ({}, {"threshold": True}, "threshold"),
            ({"thresholds": {"low": 0.1, "high": 0.9}}, {"threshold": "middle"}, "'middle'.* low, high"),
            ({"thresholds": {"low": 0.1}}, {"label": "LABEL_0", "threshold": "low"}, "'low'"),
            ({}, {"patience": 2}, "patience"),
            ({"token_scope": "all"}, {"patience": 0}, "patience"),
            ({}, {"window": 2}, "window"),
            *(({}, {"ask": bool, "unsure": band}, "unsure") for band in (None, 0.5, (0.6, 0.2))),
            ({}, {"unsure": (0, 1)}, "unsure"),
            ({"token_scope": "response"}, {"ask": bool, "unsure": (0, 1)}, "unsure"),
            ({"token_scope": "tool"}, {"label": "LABEL_0"}, "does not flag"),
        ],
    )
    def test_options_that_a_head_refuses(self, changes, options, words):
        with pytest.raises(ProbeError, match=words):
            HaltRule.create_all("h", ProbeConfig(probe_type="gate", **changes), **options)


class TestAsking:
    """`unsure` with `ask`: another judge decides on prompts in the band, before the first token."""

    TEXTS = ["bake bread", "rob a bank", "write a poem", "sum two numbers"]

    @pytest.fixture(scope="class")
    def served(self):
        tokenizer = make_tokenizer()
        tokenizer.chat_template += "{{ '<think>\n\n</think>\n\n' if add_generation_prompt }}"
        prompts = PromptFormat(tokenizer)
        head = make_probe(probe_type="gate", token_scope="user", **prompts.config_fields())
        model = probed({"guard": head}, vocab_size=260)
        inputs = prompts.batch(self.TEXTS)
        return model, inputs, model.classify(**inputs)["guard"].probabilities[:, 1].tolist()

    @staticmethod
    def generate(served, answer=bool, call=None, **options):
        """Have the judge answer by a function of each text. Return the halts, and the texts that it was asked about."""
        asked = []

        def ask(texts):
            asked.extend(texts)
            return [answer(text) for text in texts]

        rule = {"threshold": 1.0, "unsure": (0, 1), "ask": ask, **options}
        call = {**served[1], "tokenizer": make_tokenizer(), "max_new_tokens": 2, **(call or {})}
        return served[0].generate(**call, halt_on={"guard": rule}).probe_halts, asked

    def test_the_judge_gets_what_users_wrote_and_decides(self, served):
        halts, asked = self.generate(served, lambda text: "bank" in text)
        assert asked == self.TEXTS
        assert halts == [None, Halt("guard", "LABEL_1", pytest.approx(served[2][1], abs=1e-5), 1.0), None, None]
        halts, _ = self.generate(served, lambda text: False, threshold=0.0)
        assert halts == [None] * 4, "it may let through what the head would halt"

    def test_only_the_band_is_asked(self, served):
        scores = served[2]
        low, middle, high = sorted(scores)[:3]
        halts, asked = self.generate(served, lambda text: False, threshold=high, unsure=(middle, high))
        assert asked == [self.TEXTS[scores.index(middle)]]
        assert [halt is not None for halt in halts] == [score >= high for score in scores]
        assert self.generate(served, threshold=0.0, unsure=(low - 1e-6, low - 1e-7))[1] == []

    def test_several_turns_are_one_text(self, served):
        turns = (("user", "one"), ("assistant", "two"), ("user", "three"))
        chat = [{"role": role, "content": text} for role, text in turns]
        _, (asked,) = self.generate(served, lambda text: False, PromptFormat(make_tokenizer()).batch([chat]))
        assert "one" in asked and "three" in asked and "two" not in asked and "assistant" not in asked

    @pytest.mark.parametrize(
        "options, error, words",
        [
            ({"answer": lambda text: "yes"}, ProbeError, "ask of 'guard'"),
            ({"answer": lambda text: 1 / 0}, ZeroDivisionError, "division"),
            ({"call": {"tokenizer": None}}, ProbeError, "tokenizer="),
        ],
    )
    def test_no_reply_without_an_answer(self, served, options, error, words):
        with pytest.raises(error, match=words):
            self.generate(served, **options)
