"""generate() with heads: the same tokens as the plain model, and the logits of a plain pass over the prompt."""

import pytest
import torch
from cases import HEAD_TYPES, MODES
from conftest import expected_logits, make_lm, make_probe, make_prompts, make_tokenizer, padded, probed
from observers import Recorder, passes_of
from peft import LoraConfig, get_peft_model
from transformers import BatchEncoding, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from llama_probe import ProbeError


def heads(**changes):
    return {
        head_type: make_probe(seed=i, probe_type=head_type, num_labels=2 + i, **changes)
        for i, head_type in enumerate(HEAD_TYPES)
    }


@pytest.fixture
def model():
    return probed(heads())


def assert_scores(out, ids, mask=None):
    """The output has the logits of a plain pass over these prompts."""
    expected = {name: expected_logits(head, ids, mask) for name, head in heads().items()}
    torch.testing.assert_close(out.probe_logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_plain_model(mode, model, prompts):
    kwargs = {"max_new_tokens": 6, **MODES[mode]}
    mask = padded(prompts)
    ids = prompts * mask
    plain_model = make_lm()
    plain_passes, passes = passes_of(plain_model), passes_of(model)
    torch.manual_seed(5)
    plain = plain_model.generate(ids, attention_mask=mask, **kwargs)
    torch.manual_seed(5)
    out = model.generate(ids, attention_mask=mask, **kwargs)
    assert torch.equal(out.sequences, plain if isinstance(plain, torch.Tensor) else plain.sequences)
    assert passes == plain_passes, "no forward pass is added"
    assert_scores(out, ids, mask)


@pytest.mark.parametrize(
    "kwargs", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": make_lm(seed=1)}, {"assistant_early_exit": 2}]
)
def test_speculative_decoding(kwargs, model):
    ids = make_prompts(rows=1, length=6).repeat(1, 2)  # a repeated prompt, so that the look-up finds candidates
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    out, expected = model.generate(ids, **kwargs), make_lm().generate(ids, **kwargs)
    assert torch.equal(out.sequences, expected)
    assert_scores(out, ids)
    for halts, sequences in ((False, expected), (True, ids)):
        assert torch.equal(model.generate(ids, halt_on=lambda _, halts=halts: [halts], **kwargs).sequences, sequences)


def test_a_probed_assistant_runs_without_its_heads(model):
    ids, assistant = make_prompts(rows=1), probed({"own": make_probe()}, seed=1)
    wrapped = get_peft_model(assistant, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    call = {"assistant_model": wrapped, "max_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, **call)
    assert_scores(out, ids)
    assert torch.equal(make_lm().generate(ids, **call), out.sequences)


def test_inputs_embeds(model, prompts):
    embeds = model.get_input_embeddings()(prompts)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=4)
    assert torch.equal(out.sequences, make_lm().generate(inputs_embeds=embeds, max_new_tokens=4))
    assert_scores(out, prompts)


@pytest.mark.parametrize("eos", [2, torch.tensor([2, 3])])
def test_padding_is_found_without_a_mask(model, prompts, eos):
    mask = padded(prompts)
    ids = prompts * mask
    for pad, expected in ((0, mask), (torch.tensor(0), mask), (2, None)):
        assert_scores(model.generate(ids, max_new_tokens=2, eos_token_id=eos, pad_token_id=pad), ids, expected)


def test_custom_generate_that_calls_the_model_itself(model, prompts):
    def greedy(model, input_ids, generation_config, **kwargs):
        out = model(input_ids, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        assert type(model(token, cache=out.cache)) is type(make_lm()(token)), "the prompt has been read"
        return GenerateDecoderOnlyOutput(sequences=torch.cat([input_ids, token], 1))

    out = model.generate(prompts, custom_generate=greedy, max_new_tokens=1)
    assert torch.equal(out.sequences, make_lm().generate(prompts, max_new_tokens=1))
    assert_scores(out, prompts)


def test_heads_stay_in_fp32_under_autocast(model, prompts):
    model.add_probe("reply", make_probe(probe_type="mha", token_scope="all"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = make_lm()(prompts, output_hidden_states=True).hidden_states
        out = model.generate(prompts, max_new_tokens=4, eos_token_id=None)
        found = {name: result.logits for name, result in model.classify(prompts).items()}
    for name, head in heads().items():
        expected = head(hidden_states=states).logits
        for logits in (out.probe_logits[name], found[name]):
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert out.probe_token_logits["reply"].dtype == torch.float32


def test_a_config_stays_as_it_is_and_nothing_is_said_of_it(model, prompts, caplog):
    config, streamer = GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=2), Recorder()
    model.add_probe("reply", make_probe(token_scope="all"))
    before = config.to_dict()
    by_place = (prompts[:1], config, None, [], None, None, None, streamer)
    with caplog.at_level("WARNING"):
        out = model.generate(*by_place, halt_on=lambda outputs: [False])
    assert "deprecated" not in caplog.text and config.to_dict() == before
    assert out.probe_halts == [None] and streamer.reply == out.sequences[0, 9:].tolist()
    assert out.probe_logits and out.probe_token_logits["reply"].shape[1] == 2
    config.return_dict_in_generate = False
    assert torch.equal(model.generate(prompts, config), make_lm().generate(prompts, max_new_tokens=3))


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_texts_with_a_tokenizer(kwargs):
    model, tokenizer = probed(heads(), vocab_size=260), make_tokenizer()
    inputs = tokenizer(["Hi", "And another one"], return_tensors="pt", padding=True, padding_side="left")
    call = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 4, "tokenizer": tokenizer, **kwargs}
    out = model.generate(inputs["input_ids"], **call)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert out.texts == tokenizer.batch_decode(new, skip_special_tokens=True)
    assert model.generate(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), **call).texts == out.texts
    assert model.generate(**inputs, max_new_tokens=2).texts is None


class TestRefusals:
    def test_a_cached_prefix_that_no_head_reads_is_fine(self, prompts):
        prompts[:, :3] = torch.tensor([7, 8, 9])
        heads = {
            "last": make_probe(probe_type="last"),
            "content": make_probe(token_scope="content", prefix_ids=[7, 8, 9]),
            "reply": make_probe(token_scope="response"),
        }
        model = probed(heads)
        whole = model.generate(prompts, max_new_tokens=3)
        cache = make_lm()(prompts[:, :3], use_cache=True).cache
        reused = model.generate(prompts, cache=cache, max_new_tokens=3)
        assert torch.equal(whole.sequences, reused.sequences)
        torch.testing.assert_close(reused.probe_logits, whole.probe_logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reused.probe_token_logits, whole.probe_token_logits, equal_nan=True)

    def test_prompts_that_are_no_tensor_empty_or_not_whole(self, model, prompts):
        new, known = prompts[:, 5:], {"cache": make_lm()(prompts[:, :5], use_cache=True).cache}
        for words, call in (
            ("mask has the shape", lambda: model.generate(new, attention_mask=torch.ones_like(prompts), **known)),
            ("no prompt", model),
            ("no prompt", lambda: model.generate(max_new_tokens=2)),
            ("no prompt", lambda: model.generate(prompts[:0], max_new_tokens=2)),
            ("no prompt", lambda: model.classify(prompts[:, :0])),
            (r"must be a tensor .* with \*\*", lambda: model.generate(BatchEncoding({"input_ids": prompts}))),
            ("input_ids must be a tensor", lambda: model.generate(prompts.tolist())),
        ):
            with pytest.raises(ProbeError, match=words):
                call()

    def test_a_pass_over_a_part_of_the_prompt(self, model, prompts):
        def half(model, input_ids, generation_config, **kwargs):
            kwargs |= {"attention_mask": None, "position_ids": None}
            return model._sample(input_ids=input_ids[:, :4], generation_config=generation_config, **kwargs)

        with pytest.raises(ProbeError, match="as it was given"):
            model.generate(prompts, custom_generate=half, max_new_tokens=1)

    def test_a_layer_that_does_not_run_over_the_whole_prompt(self, model, prompts):
        """It is found out before anything is written."""
        streamer = Recorder()
        model.model.layers[-1].register_forward_hook(lambda module, args, output: output[:, -1:])
        with pytest.raises(ProbeError, match="a state has 1 tokens of 9"):
            model.generate(prompts[:1], streamer=streamer, max_new_tokens=4)
        assert streamer.tokens == [prompts[0].tolist()]

    def test_content_scope_needs_ids_or_a_mask(self, prompts):
        head = make_probe(token_scope="content", prefix_ids=prompts[0, :3].tolist())
        model = probed({"a": head})
        embeds = model.get_input_embeddings()(prompts[:1])
        with pytest.raises(ProbeError, match="probe_mask"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2)
        mask = torch.ones(1, prompts.shape[1])
        mask[:, :3] = 0
        out = model.generate(inputs_embeds=embeds, probe_mask=mask, max_new_tokens=2)
        ids = model.generate(prompts[:1], max_new_tokens=2)
        torch.testing.assert_close(out.probe_logits, ids.probe_logits, atol=1e-5, rtol=1e-5)
