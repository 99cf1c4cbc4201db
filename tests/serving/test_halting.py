"""Halting: flagged prompts get no token of a reply, and the others what they would have got."""

import gc
import math
import time
import weakref

import numpy as np
import pytest
import torch
from conftest import VOCAB, make_lm, make_probe, make_prompts, make_tokenizer
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from llama_probe import LlamaForProbedGeneration, ProbeConfig, ProbeError
from llama_probe.heads import probe_types
from llama_probe.heads.decision import ProbeOutput
from llama_probe.serving.halting import Halt, Halter, HaltRule, Reprompt


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams x return sequences": {"num_beams": 4, "num_return_sequences": 2},
    "sampling x return sequences": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
    "at least three tokens": {"min_new_tokens": 3},
    "guidance": {"guidance_scale": 1.5},
}
PAD = 0


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def flag(*rows):
    """A policy that halts these prompts."""
    return lambda outputs: [i in rows for i in range(len(outputs["mood"].logits))]


@pytest.fixture
def model():
    lm = LlamaForProbedGeneration.from_causal_lm(make_lm())
    lm.add_probe("mood", make_probe(id2label={0: "fine", 1: "awful"}))
    return lm


@pytest.fixture
def passes(model):
    """Widths of the LM's forward passes."""
    widths = []
    model.model.register_forward_hook(lambda module, args, output: widths.append(output[0].shape[1]))
    return widths


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_decoded_where_all_are_halted(model, passes, prompts, mode):
    out = model.generate(prompts, max_new_tokens=5, halt_on=flag(0, 1, 2), **MODES[mode])
    copies = MODES[mode].get("num_return_sequences", 1)
    assert torch.equal(out.sequences, prompts.repeat_interleave(copies, dim=0))
    assert sum(passes) == prompts.shape[1], "the prefill, and no more"
    assert out.probe_halts == [Halt(), Halt(), Halt()] and len(out.probe_logits["mood"]) == 3
    plain = model.generate(prompts, max_new_tokens=5, **MODES[mode])
    assert type(out) is type(plain) and plain.probe_halts is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eos", [2, None])
def test_the_others_get_what_they_would_have_got(prompts, mode, eos):
    model = LlamaForProbedGeneration.from_causal_lm(make_lm(eos_token_id=eos))
    model.add_probe("mood", make_probe())
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


def test_a_streamer_receives_no_token(model, prompts):
    streamer = Recorder()
    model.generate(prompts[:1], max_new_tokens=5, streamer=streamer, halt_on=flag(0))
    assert streamer.tokens == [prompts[0].tolist()] and streamer.ended
    streamer = Recorder()
    model.generate(prompts[:1], max_new_tokens=5, streamer=streamer, halt_on=flag(1))
    assert len(streamer.tokens) == 6 and streamer.ended


@pytest.mark.parametrize("kwargs", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_speculative_decoding(model, kwargs):
    ids = make_prompts(rows=1, length=6).repeat(1, 2)
    call = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    if call.pop("assistant", False):
        call["assistant_model"] = make_lm(seed=1)
    assert torch.equal(model.generate(ids, halt_on=flag(0), **call).sequences, ids)
    assert torch.equal(model.generate(ids, halt_on=flag(), **call).sequences, model.generate(ids, **call).sequences)


def test_prompts_given_as_embeddings(model, prompts):
    embeds = model.get_input_embeddings()(prompts)
    assert model.generate(inputs_embeds=embeds, max_new_tokens=4, halt_on=flag(0, 1, 2)).sequences.shape == (3, 0)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=4, halt_on=flag(0), halt_reply=[9, 8])
    free = model.generate(inputs_embeds=embeds, max_new_tokens=4)
    assert torch.equal(out.sequences[1:], free.sequences[1:]) and out.sequences[0].tolist() == [9, 8, PAD, PAD]


@pytest.mark.parametrize(
    "kwargs",
    [{"halt_on": flag()}, {"halt_on": flag(1)}, {"on_probe_token": lambda scores: None}, {"probe_state": True}],
)
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


def test_without_a_dict(model, prompts):
    out = model.generate(prompts, max_new_tokens=4, halt_on=flag(0), return_dict_in_generate=False)
    assert isinstance(out, torch.Tensor) and (out[0, 9:] == PAD).all() and not (out[1, 9:] == PAD).all()


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
def test_what_the_output_was_asked_to_hold(model, prompts, rows):
    """Whoever asked for tuples gets them, of no step where all are halted."""
    asked = ("scores", "logits", "attentions", "hidden_states")
    out = model.generate(
        prompts, max_new_tokens=4, halt_on=flag(*rows), eos_token_id=None, **{f"output_{name}": True for name in asked}
    )
    assert [len(out[name]) for name in asked] == [out.sequences.shape[1] - prompts.shape[1]] * 4
    out = model.generate(prompts, max_new_tokens=4, halt_on=flag(*rows), output_scores=True)
    assert out.logits is None and out.scores is not None


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
def test_what_beams_give_beside_the_tokens(model, prompts, rows):
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    out = model.generate(prompts, halt_on=flag(*rows), output_scores=True, **beams)
    tokens = out.sequences.shape[1] - prompts.shape[1]
    assert out.sequences_scores.shape == (6,) and out.beam_indices.shape == (6, tokens)
    assert out.sequences_scores[0] == 0, "of no token, or of one that nothing else could stand for"
    assert model.generate(prompts, halt_on=flag(*rows), **beams).sequences_scores is None


@pytest.mark.parametrize("place", ["the call", "the model"])
def test_a_config_that_would_not_halt_is_refused(model, passes, prompts, place):
    config = GenerationConfig(max_new_tokens=2, halt_on="mood")
    kwargs = {"generation_config": config} if place == "the call" else {}
    if not kwargs:
        model.generation_config = config
    with pytest.raises(ProbeError, match=r"halt_on in a generation_config: pass it to generate\(\) itself"):
        model.generate(prompts, **kwargs)
    assert not passes, "before any work"


class TestReplies:
    def test_token_ids(self, model, prompts):
        out = model.generate(prompts, max_new_tokens=4, halt_on=flag(0, 2), halt_reply=[5, 6, 7, 8, 9, 10])
        free = model.generate(prompts, max_new_tokens=4)
        assert out.sequences[0].tolist() == [*prompts[0].tolist(), 5, 6, 7, 8, 9, 10]
        assert out.sequences[1].tolist() == [*free.sequences[1].tolist(), PAD, PAD], "padded to the longest"
        assert out.sequences[2, 9:].tolist() == [5, 6, 7, 8, 9, 10]

    def test_a_text(self):
        model = LlamaForProbedGeneration.from_causal_lm(make_lm(vocab_size=260))
        model.add_probe("mood", make_probe())
        tokenizer, ids = make_tokenizer(), make_prompts(1)
        streamer = Recorder()
        out = model.generate(
            ids, halt_on=flag(0), halt_reply="I would rather not.", tokenizer=tokenizer, streamer=streamer
        )
        assert tokenizer.decode(out.sequences[0, ids.shape[1] :]) == "I would rather not."
        assert streamer.tokens[0] == ids[0].tolist() and streamer.ended
        assert tokenizer.decode([token for part in streamer.tokens[1:] for token in part]) == "I would rather not."

    def test_a_refusal_that_the_model_writes(self, model, passes, prompts):
        again = make_prompts(rows=1, length=4, seed=7)
        written = make_lm().generate(again, max_new_tokens=6, do_sample=False)[0, 4:]
        reprompt = Reprompt(again, {"max_new_tokens": 6, "do_sample": False})
        out = model.generate(prompts, max_new_tokens=3, halt_on=flag(0, 1, 2), halt_reply=reprompt)
        assert torch.equal(out.sequences[:, 9:], written.expand(3, -1))
        assert passes[:2] == [9, 4], "it is written once, after the prompts were read"
        assert len(out.probe_logits["mood"]) == 3, "the heads have read the prompts, not the re-prompt"

    @pytest.mark.parametrize(
        "reply, words",
        [
            ("no", "needs tokenizer="),
            ([[1, 2]], r"has the shape \(1, 2\)"),
            ([1, "a"], "must be token ids, a text or a Reprompt"),
            ([5, VOCAB], rf"halt_reply holds \[5, {VOCAB}\]; token ids are whole numbers from 0 to {VOCAB - 1}"),
            ([-1], r"halt_reply holds \[-1\]"),
            ([1.5], r"halt_reply holds \[1.5\]"),
            ([True], r"halt_reply holds \[True\]"),
            (Reprompt(torch.tensor([[5, VOCAB]])), r"Reprompt.input_ids holds"),
            (Reprompt([3, 4]), r"Reprompt.input_ids is a list; it must be a tensor of shape \[1, tokens\]"),
            (Reprompt(torch.ones(2, 3, dtype=torch.long)), r"Reprompt.input_ids has the shape \(2, 3\)"),
            (Reprompt(torch.ones(1, 0, dtype=torch.long)), r"shape \(1, 0\); it must be \[1, tokens\], with a token"),
            (Reprompt(torch.tensor([[5]]), "max_new_tokens=4"), "Reprompt.kwargs is a str; it must be a dict"),
            (
                Reprompt(torch.tensor([[5]]), {"attention_mask": torch.ones(1, 1)}),
                "Reprompt.kwargs has attention_mask",
            ),
            (Reprompt(torch.tensor([[5]]), {"probes": [], "halt_on": "mood"}), "Reprompt.kwargs has halt_on, probes"),
        ],
    )
    def test_what_cannot_be(self, model, passes, prompts, reply, words):
        with pytest.raises(ProbeError, match=words):
            model.generate(prompts, halt_on="mood", halt_reply=reply)
        assert not passes, "before any work"

    def test_without_anything_that_halts(self, model, passes, prompts):
        with pytest.raises(ProbeError, match="nothing halts here: pass halt_on="):
            model.generate(prompts, halt_reply=[5])
        assert not passes, "before any work"


class TestPolicies:
    def test_an_error_lets_nothing_through(self, model, prompts):
        def policy(outputs):
            raise RuntimeError("out of order")

        streamer = Recorder()
        with pytest.raises(RuntimeError, match="out of order"):
            model.generate(prompts[:1], halt_on=policy, streamer=streamer)
        assert streamer.tokens == [prompts[0].tolist()] and streamer.ended, "who waits for the stream is told"
        assert len(model.generate(prompts, max_new_tokens=2).probe_logits["mood"]) == 3, "the model is as it was"

    def test_it_may_call_the_model(self, model, prompts):
        """Whose heads run there as anywhere else, and halt."""
        model.add_probe("reply", make_probe(token_scope="response"))
        expected = model.generate(prompts, max_new_tokens=4, eos_token_id=None)
        inner = []

        def call(*_):
            inner.append(model.generate(prompts, max_new_tokens=3, halt_on={"mood": {"threshold": 0.0}}))
            inner.append(model(prompts, probes="mood"))
            return [False] * 3

        kwargs = {"max_new_tokens": 4, "eos_token_id": None, "halt_on": call, "on_probe_token": call}
        out = model.generate(prompts, **kwargs)
        assert torch.equal(out.sequences, expected.sequences) and out.probe_halts == [None] * 3
        torch.testing.assert_close(out.probe_token_logits, expected.probe_token_logits)
        assert len(inner) == 2 * (1 + 3)
        for generated, passed in zip(inner[::2], inner[1::2], strict=True):
            assert torch.equal(generated.sequences, prompts) and all(generated.probe_halts)
            torch.testing.assert_close(passed.probe_logits["mood"], expected.probe_logits["mood"])

    def test_a_streamer_may_call_the_model_with_a_policy(self, model, prompts):
        """Such a call is not the decoding method's, and what it is to halt is halted."""
        inner = []

        class Calling(Recorder):
            def put(self, value):
                super().put(value)
                inner.append(model.generate(prompts, max_new_tokens=3, halt_on=lambda outputs: [True] * 3))

        expected = model.generate(prompts[:1], max_new_tokens=4)
        out = model.generate(prompts[:1], max_new_tokens=4, streamer=Calling())
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(out.probe_logits, expected.probe_logits)
        assert len(inner) > 1 and all(torch.equal(each.sequences, prompts) for each in inner)

    def test_a_slow_one_is_waited_for(self, model, prompts):
        streamer, seen = Recorder(), []

        def policy(outputs):
            time.sleep(0.2)
            seen.extend(streamer.tokens[1:])
            return [False]

        model.generate(prompts[:1], max_new_tokens=2, halt_on=policy, streamer=streamer)
        assert seen == [] and len(streamer.tokens) == 3

    def test_it_may_say_why(self, model, prompts):
        why = Halt("mood", "awful", 0.7, 0.5)
        out = model.generate(prompts, max_new_tokens=2, halt_on=lambda outputs: [None, why, 1])
        assert out.probe_halts == [None, why, Halt()]

    def test_a_wrong_number_of_decisions(self, model, prompts):
        with pytest.raises(ProbeError, match="2 decisions for 3 prompts"):
            model.generate(prompts, halt_on=lambda outputs: [False, False])
        with pytest.raises(ProbeError, match="the halting policy returned a NoneType; it must return a list"):
            model.generate(prompts, halt_on=lambda outputs: None)

    @pytest.mark.parametrize(
        "policy, words",
        [
            (lambda outputs: dict.fromkeys(range(3), True), "a dict"),  # whose keys are 0, 1 and 2
            (lambda outputs: "yes", "a str"),
            (lambda outputs: outputs["mood"].labels, "a list with '(fine|awful)' in it"),
            (lambda outputs: outputs["mood"].probabilities > 0.5, "a list with tensor"),
            (lambda outputs: {0, 1, 2}, "a set"),  # numbers of the prompts, of which 0 would not be halted
            (lambda outputs: torch.ones(3).nonzero().flatten(), r"a list with tensor\(2\)"),
            (lambda outputs: outputs["mood"].probabilities[:, 1], "a list with tensor"),  # all true
            (lambda outputs: [0, 1, math.nan], "a list with nan"),
        ],
    )
    def test_what_is_no_decision_is_not_taken_for_one(self, model, passes, prompts, policy, words):
        with pytest.raises(ProbeError, match=rf"the halting policy returned {words}.*; it must return a list"):
            model.generate(prompts, halt_on=policy)
        assert len(passes) <= 1, "no token was decoded"

    def test_tensors_and_arrays_decide(self, model, prompts):
        for said in (
            torch.tensor([True, False, True]),
            np.array([1, 0, 1]),
            [torch.tensor([1]), None, np.bool_(True)],
        ):
            out = model.generate(prompts, max_new_tokens=2, halt_on=lambda outputs, said=said: said)
            assert out.probe_halts == [Halt(), None, Halt()]


class TestRules:
    def output(self, logits, **changes):
        config = ProbeConfig(probe_type="gate", **changes)
        return config, ProbeOutput.from_logits(torch.tensor(logits, dtype=torch.float32), config)

    def test_as_the_head_decides(self, model, prompts):
        out = model.generate(prompts, max_new_tokens=2, halt_on="mood")
        assert [halt is not None for halt in out.probe_halts] == [
            label == "awful" for label in out.probe_labels["mood"]
        ]
        config, output = self.output([[0.0, 0.1], [0.0, 1.0]], threshold=0.6)
        assert [halt is not None for halt in HaltRule.create("h", config).halts(output)] == [False, True]

    def test_a_label_and_a_threshold(self):
        config, output = self.output([[2.0, 0.0], [0.0, 0.5]], id2label={0: "no", 1: "yes"}, temperature=2.0)
        found = HaltRule.create("h", config, "no", 0.6).halts(output)
        assert found[1] is None and found[0] == Halt("h", "no", pytest.approx(1 / (1 + math.exp(-1))), 0.6)

    def test_one_of_many_labels(self):
        config, output = self.output([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]], num_labels=3)
        with pytest.raises(ProbeError, match="say by which label"):
            HaltRule.create("h", config)
        found = HaltRule.create("h", config, "LABEL_2").halts(output)
        assert found[0].label == "LABEL_2" and found[1] is None, "where it is the likeliest"
        assert all(HaltRule.create("h", config, "LABEL_2", 0.1).halts(output))

    def test_several_labels_at_once(self):
        several = {"num_labels": 3, "problem_type": "multi_label_classification", "threshold": [0.5, 0.9, 0.5]}
        config, output = self.output([[0.0, 1.0, 1.0]], **several)
        assert HaltRule.create("h", config, "LABEL_1").halts(output) == [None], "its saved threshold is 0.9"
        assert HaltRule.create("h", config, "LABEL_2").halts(output)[0].threshold == 0.5

    def test_values(self):
        config, output = self.output([[2.5], [3.5]], num_labels=1, problem_type="regression")
        assert [h is not None for h in HaltRule.create("h", config, threshold=3).halts(output)] == [False, True]
        with pytest.raises(ProbeError, match="say from which on"):
            HaltRule.create("h", config)

    def test_a_value_from_no_number_on(self):
        config = ProbeConfig(probe_type="gate", num_labels=1, problem_type="regression")
        with pytest.raises(ProbeError, match=r"is nan; it must be a number$"):
            HaltRule.create("h", config, threshold=float("nan"))

    def test_no_number_is_no_pass(self):
        config, output = self.output([[float("nan"), 0.0], [1.0, 0.0]])
        found = Halter("h", {"h": config}).decide({"h": output}, 2)
        assert found[0] is not None and math.isnan(found[0].score) and found[1] is None

    @pytest.mark.parametrize("scope", ["prompt", "all"])
    @pytest.mark.parametrize("kind", probe_types())
    def test_an_lm_that_gives_no_numbers_lets_nothing_through(self, kind, scope, prompts):
        head = make_probe(probe_type=kind, token_scope=scope, vocab_size=VOCAB)
        model = LlamaForProbedGeneration.from_causal_lm(make_lm(), {"mood": head})
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
        mask = torch.ones_like(prompts)
        mask[0, :3] = 0
        for kwargs in ({}, {"prefill_chunk_size": 2}):
            halting = {"halt_on": {"mood": {"label": "LABEL_1", "threshold": 1.0}}, **kwargs}
            out = model.generate(prompts, attention_mask=mask, max_new_tokens=2, **halting)
            assert out.probe_logits["mood"].isnan().all() and all(out.probe_halts)
        states = model(prompts, attention_mask=mask, output_hidden_states=True).hidden_states
        assert head(hidden_states=states, attention_mask=mask).logits.isnan().all()

    def test_the_first_rule_counts(self):
        config, output = self.output([[0.0, 1.0], [1.0, 0.0]])
        halter = Halter({"a": {"threshold": 0.9}, "b": None}, {"a": config, "b": config})
        assert [halt and halt.head for halt in halter.decide({"a": output, "b": output}, 2)] == ["b", None]
        assert not halter.all_halted

    @pytest.mark.parametrize(
        "spec, words",
        [
            ("other", "no head 'other' is active; active: mood"),
            ([], "names no head"),
            ({"mood": {"label": "sad"}}, "no label 'sad'; it has fine, awful"),
            ({"mood": {"threshold": 1.5}}, "must be a number from 0 to 1"),
            ({"mood": {"threshold": float("nan")}}, "is nan; it must be a number from 0 to 1"),
            ({"mood": 0.6}, "what is said of 'mood' is 0.6; it must be a dict"),
            ({"mood": "awful"}, "what is said of 'mood' is 'awful'; it must be a dict"),
            (True, "halt_on=True must be the name of a head"),
            ({"mood": {"above": 0.5}}, r"\['above'\]; allowed: label, threshold"),
        ],
    )
    def test_what_cannot_be(self, model, passes, prompts, spec, words):
        with pytest.raises(ProbeError, match=words):
            model.generate(prompts, halt_on=spec)
        assert not passes, "before any work"

    def test_a_threshold_may_be_numpys(self, model, prompts):
        out = model.generate(prompts, max_new_tokens=2, halt_on={"mood": {"threshold": np.float32(0.0)}})
        assert [type(halt.threshold) for halt in out.probe_halts] == [float] * 3

    def test_without_active_heads(self, model, prompts):
        model.set_active_probes([])
        for spec in ("mood", flag(0)):
            with pytest.raises(ProbeError, match="active"):
                model.generate(prompts, halt_on=spec)
