"""pipeline("probed-text-generation"): text-generation's results, with what each head says of the prompt."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import make_lm, make_probe, make_tokenizer, probed, save_head
from transformers import AutoModel, AutoModelForCausalLM, TextGenerationPipeline, pipeline

from llama_probe import AutoModelForProbedGeneration, LlamaForProbedGeneration, ProbeError
from llama_probe.data.prompts import PromptFormat
from llama_probe.serving.pipeline import TASK, ProbedTextGenerationPipeline


TEXTS = ["Hi", "A much longer text than that one", "Something between", "x"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
FORMAT = PromptFormat(make_tokenizer()).config_fields()


def heads():
    return {
        "toxic": make_probe(id2label={0: "fine", 1: "toxic"}, threshold=0.3, temperature=2.0, **FORMAT),
        "topics": make_probe(1, num_labels=3, problem_type="multi_label_classification", **FORMAT),
        "length": make_probe(2, num_labels=1, problem_type="regression", **FORMAT),
        "sizes": make_probe(3, probe_type="gate", num_labels=2, problem_type="regression"),
    }


def make_pipe(tokenizer=None, **kwargs):
    lm, kwargs = make_lm(vocab_size=260), {"probe": heads(), "device": "cpu", **kwargs}
    return ProbedTextGenerationPipeline(lm, tokenizer or make_tokenizer(), **kwargs)


def close(found, expected, tolerance=1e-4):
    """Return True if two predictions are the same but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (expected if isinstance(expected, str) else pytest.approx(expected, abs=tolerance))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_halted_prompts(batch_size):
    pipe, refusal = make_pipe(), make_tokenizer().decode([40, 41])
    halting = {"halt_on": {"toxic": {"threshold": 0.0}}, "halt_reply": refusal, "return_full_text": False}
    for (result,) in pipe(TEXTS, batch_size=batch_size, **halting, **GREEDY):
        assert result["generated_text"] == refusal and result["halted"]["head"] == "toxic"
        assert result["halted"]["score"] == pytest.approx(result["probes"]["toxic"]["scores"]["toxic"], abs=1e-6)
    assert pipe(TEXTS[0], batch_size=batch_size, output_scores=True, **halting, **GREEDY)[0]["halted"]
    asking = {"toxic": {"unsure": (0.0, 1.0), "ask": lambda texts: [text == TEXTS[0] for text in texts]}}
    assert [bool(record[0]["halted"]) for record in pipe(TEXTS[:2], halt_on=asking, **GREEDY)] == [True, False]
    (free,) = pipe(TEXTS[0], halt_on={"toxic": {"threshold": 1.0}}, **GREEDY)
    assert free["halted"] is None and "halted" not in pipe(TEXTS[0], **GREEDY)[0]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_heads_that_read_replies_say_what_they_think_of_each_sequence(batch_size):
    """Their last word on it: the reply as far as the model has read it, and whether it was halted there."""
    guard = make_probe(probe_type="gate", num_labels=2, token_scope="response")
    prompt_head = make_probe(1, probe_type="gate", num_labels=2)
    pipe = make_pipe(probe={"guard": guard, "prompt": prompt_head})
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": True, "num_return_sequences": 3}
    second_of_three = {"on_probe_token": lambda scores: [row % 3 == 1 for row in range(len(scores.counted))]}
    for records in pipe(TEXTS[:2], batch_size=batch_size, halt_reply="No.", **second_of_three, **options):
        assert [record["halted"] is not None for record in records] == [False, True, False]
        assert records[1]["generated_text"].endswith("No.")
        assert all(record["probes"].keys() == {"guard", "prompt"} for record in records)
        assert len({record["probes"]["guard"]["score"] for record in records}) == 3
        assert len({record["probes"]["prompt"]["score"] for record in records}) == 1
        records[0]["probes"].clear()
        assert records[1]["probes"], "each has its own"
    (record,) = pipe(TEXTS[0], **GREEDY)
    ids = make_tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    out = pipe.model.generate(ids, **GREEDY)
    (expected,) = out.probe_token_probabilities["guard"][:, -1].tolist()
    assert list(record["probes"]["guard"]["scores"].values()) == pytest.approx(expected, abs=1e-5)
    # A reply of one token, which the model never reads, and a prompt that gets none.
    for unread in ({"max_new_tokens": 1}, {"halt_on": {"prompt": {"threshold": 0.0}}}):
        (record,) = pipe(TEXTS[0], **GREEDY | unread)
        assert record["probes"]["guard"] is None and record["probes"]["prompt"]["label"]


def test_predictions_are_those_of_generate():
    probes, tokenizer = make_pipe()(CHATS[1], **GREEDY)[0]["probes"], make_tokenizer()
    assert list(probes) == list(heads())
    model = probed(heads(), vocab_size=260)
    inputs = tokenizer.apply_chat_template(CHATS[1], add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, **GREEDY)
    (record,) = out.describe(1)
    assert close(probes, record["probes"])
    for name, found in probes.items():
        assert close(list(found["scores"].values()), out.probe_probabilities[name][0].tolist())
        assert "label" not in found or found["label"] == out.probe_labels[name][0]
    toxic, topics = probes["toxic"], probes["topics"]
    assert toxic["score"] == toxic["scores"][toxic["label"]] and list(toxic["scores"]) == ["fine", "toxic"]
    assert topics["score"] == [topics["scores"][label] for label in topics["label"]]
    assert list(probes["length"]["scores"].values()) == [probes["length"]["score"]]
    assert list(probes["sizes"]) == ["scores"] and list(probes["sizes"]["scores"]) == ["LABEL_0", "LABEL_1"]
    json.dumps(probes)


def test_batches_and_threads_give_what_single_prompts_give():
    pipe = make_pipe()
    single = [pipe(prompt, **GREEDY) for prompt in CHATS]
    assert len({json.dumps(result[0]["probes"]) for result in single}) == len(CHATS)
    batched = pipe(CHATS, batch_size=3, **GREEDY)
    streamed = list(pipe((prompt for prompt in CHATS), batch_size=3, **GREEDY))
    with ThreadPoolExecutor(4) as pool:
        by_threads = list(pool.map(lambda prompt: pipe(prompt, **GREEDY), CHATS))
    for results in (batched, streamed, by_threads):
        for (found,), (expected,) in zip(results, single, strict=True):
            assert found["generated_text"] == expected["generated_text"]
            assert close(found["probes"], expected["probes"])


@pytest.mark.parametrize(
    "prompt, options",
    [(TEXTS[1], {}), (CHATS[1], {}), (TEXTS[1], {"return_full_text": False}), (TEXTS[1], {"return_tensors": True})],
)
def test_results_are_those_of_text_generation_beside_predictions(prompt, options):
    """The plain task takes models with heads as well, and gives what it gives without them."""
    args = {"tokenizer": make_tokenizer(), "device": "cpu"}
    plain = pipeline("text-generation", model=make_lm(vocab_size=260), **args)
    with_heads = probed(heads(), vocab_size=260)
    ours, stock = (pipeline(task, model=with_heads, **args) for task in (TASK, "text-generation"))
    assert type(stock) is type(plain) is TextGenerationPipeline and type(ours) is ProbedTextGenerationPipeline
    (result,), (same,), (expected,) = (pipe(prompt, **GREEDY, **options) for pipe in (ours, stock, plain))
    assert same == expected
    assert set(result.pop("probes")) == set(heads()) and result == expected


def test_beams_options_given_early_and_heads_that_do_not_run():
    pipe = make_pipe(num_beams=2, output_scores=True, return_full_text=False, batch_size=2, **GREEDY)
    for (found,), prompt in zip(pipe(TEXTS), TEXTS, strict=True):
        assert close(found["probes"], make_pipe()(prompt, **GREEDY)[0]["probes"])
        assert not found["generated_text"].startswith(prompt)
    assert pipe(TEXTS[0], return_dict_in_generate=False)[0]["probes"] == {}
    for names in ([], ["length"]):
        pipe.model.set_active_probes(names)
        assert [list(result["probes"]) for (result,) in pipe(TEXTS)] == [names] * 4


def test_the_callers_tokenizer_is_left_as_it_is():
    tokenizer = make_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    before = copy.deepcopy(tokenizer.init_kwargs)
    pipe = make_pipe(tokenizer)
    assert (pipe.tokenizer.padding_side, pipe.tokenizer.pad_token) == ("left", "<eos>")
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.init_kwargs) == ("right", None, before)
    ready = make_tokenizer()
    ready.padding_side = "left"
    assert make_pipe(ready).tokenizer is ready


@pytest.fixture
def repository(backbone_folder, tmp_path):
    """A backbone with a head in a folder of its own."""
    shutil.copytree(backbone_folder, tmp_path / "repository")
    save_head(heads()["toxic"], tmp_path / "repository" / "toxic")
    return tmp_path / "repository"


def test_loaded_models(repository):
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(repository), make_tokenizer()
    for probe in (["toxic", "missing"], {"x": make_probe(hidden_size=64)}):
        with pytest.raises(ProbeError, match=r"missing|hidden_size"):
            pipeline(TASK, model=lm, tokenizer=tokenizer, probe=probe)
        assert type(lm).__name__ == "LlamaForCausalLM"
    for probe in ("toxic", {"again": repository / "toxic"}, None):
        pipe = pipeline(TASK, model=lm, tokenizer=tokenizer, probe=probe)
        assert pipe.model is lm and lm.active_probes == ["toxic", "again"][: 1 if probe == "toxic" else 2]
    with pytest.raises(ProbeError, match="is no causal LM"):
        pipeline(TASK, model=AutoModel.from_pretrained(repository), tokenizer=tokenizer, probe="toxic")


def test_a_path_and_saving(repository, tmp_path):
    pipe = pipeline(TASK, model=str(repository), probe={"x": repository / "toxic"})
    assert type(pipe.model) is LlamaForProbedGeneration and pipe.model.active_probes == ["x"]
    assert close(pipe(TEXTS[0], **GREEDY)[0]["probes"]["x"], make_pipe()(TEXTS[0], **GREEDY)[0]["probes"]["toxic"])
    pipeline(TASK, model=pipe.model, tokenizer=pipe.tokenizer).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    again = pipeline("text-generation", model=str(tmp_path / "saved"))
    assert again(TEXTS[0], **GREEDY)[0]["generated_text"] == pipe(TEXTS[0], **GREEDY)[0]["generated_text"]


def test_saved_heads_and_a_private_one(backbone_folder, tmp_path, hub, token, monkeypatch):
    model = AutoModelForProbedGeneration.from_pretrained(backbone_folder, probe={"saved": heads()["toxic"]})
    model.save_pretrained(tmp_path / "guarded")
    make_tokenizer().save_pretrained(tmp_path / "guarded")
    assert pipeline(TASK, model=str(tmp_path / "guarded")).model.active_probes == ["saved"]
    heads()["toxic"].push_to_hub("alice/mood")
    monkeypatch.delenv("HF_TOKEN")
    hub.repositories["alice/mood"].private = True
    private = {"token": token, "model_kwargs": {"probe": "alice/mood"}}
    assert pipeline(TASK, model=str(backbone_folder), **private).model.active_probes == ["mood"]
