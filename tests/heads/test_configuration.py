"""ProbeConfig: defaults, round trips, and a message for each wrong value."""

import json

import pytest

from llama_probe import ProbeConfig, ProbeError


SIZES = {"hidden_size": 32, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"probe_type": "lstm"},
            "probe_type='lstm' is not known; allowed: attentive, gate, last, mha, muli, multimax, pooling, and kinds of one's own, "
            "once the file that registers them is imported",
        ),
        ({"probe_type": None}, "probe_type=None"),
        ({"pool": "median"}, "pool='median' is not allowed; allowed: mean, max"),
        ({"normalize": True}, "normalize=True is not allowed; allowed: none, layernorm, rms"),
        ({"token_scope": "everything"}, "token_scope='everything' is not allowed"),
        ({"token_scope": "response", "causal": False}, "causal=False is not allowed with token_scope='response'"),
        ({"causal": "yes"}, "causal='yes' is not allowed"),
        ({"prompt_format": "xml"}, "prompt_format='xml' is not allowed; allowed: chat, raw"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is not allowed"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number from 1"),
        ({"num_attention_heads": 2.0}, "num_attention_heads=2.0"),
        ({"downcast": True}, "downcast=True"),
        ({"hidden_size": -1}, "hidden_size=-1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"hidden_size": 30, "downcast": 4}, "downcast=4 must divide hidden_size=30"),
        ({"hidden_size": 32, "downcast": 4, "num_attention_heads": 3}, "num_attention_heads=3 must divide"),
        ({"dropout": 1.0}, "dropout=1.0 must be a number at least 0 and below 1"),
        ({"layer_dropout": "half"}, "layer_dropout='half'"),
        ({"temperature": 0}, "temperature=0 must be a number above 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 10**400}, "temperature=1000+ must be a number above 0"),
        ({"temperature": 10**300}, "temperature=1000+ must be a number above 0"),
        ({"dropout": -(10**400)}, "dropout=-1000+ must be a number at least 0"),
        ({"threshold": 10**400}, "threshold=1000+ must be a number from 0 to 1"),
        ({"fingerprint": [0.5, 10**400]}, "fingerprint=1000+ must be a number in each place"),
        ({"threshold": 1.5}, "threshold=1.5 must be a number from 0 to 1"),
        ({"threshold": [0.1, 0.2]}, "needs a head with two labels"),
        ({"threshold": 0.5, "num_labels": 3}, "needs a head with two labels"),
        ({"threshold": [0.5], "num_labels": 3, "problem_type": "multi_label_classification"}, "1 values for 3 labels"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels=3 but id2label names 2"),
        ({"id2label": {0: "a", 2: "b"}}, "they must be 0 to 1"),
        ({"id2label": {0: "a", 1: "a"}}, "each once"),
        (
            {"id2label": {0: "a\x1b[31m", 1: "b"}},
            r"the name 'a\\x1b\[31m'; a name must have no line breaks and control",
        ),
        ({"id2label": {0: "a", 1: "b\nc"}}, "must have no line breaks"),
        (
            {"id2label": {0: "safe\u202e", 1: "b"}},
            r"the name 'safe\\u202e'; a name must have no .* \(U\+202E\) included",
        ),
        ({"id2label": {0: "a", 1: "\u2067b"}}, r"the name '\\u2067b'"),
        ({"id2label": {0: "a", 1: "b\u2028c"}}, r"the name 'b\\u2028c'"),
        ({"base_model_name_or_path": "a\u2066b"}, r"path='a\\u2066b' must have no"),
        ({"id2label": {"zero": "a"}}, "indices"),
        ({"id2label": ["a", "b"]}, "must be a dict"),
        ({"layers": "some"}, "layers='some' must be 'all' or a list"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": [0, 0]}, "different"),
        ({"layers": [0, 5], "num_hidden_layers": 4}, "the states are 0 to 4"),
        ({"prefix_ids": [1, "2"]}, "prefix_ids"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path=7 must be text"),
        ({"base_model_name_or_path": "half \ud83d"}, r"base_model_name_or_path='half \\ud83d' must be text"),
        (
            {"base_model_name_or_path": "a\x1b[31m"},
            r"path='a\\x1b\[31m' must have no line breaks and control characters",
        ),
        ({"base_model_revision": "a\nb"}, r"base_model_revision='a\\nb' must have no line breaks"),
        ({"id2label": {0: "half \ud83d", 1: "b"}}, "must be texts"),
        ({"options": []}, "options"),
    ],
)
def test_wrong_values_name_the_field_and_what_is_allowed(values, words):
    with pytest.raises(ProbeError, match=words):
        ProbeConfig(**values)


@pytest.mark.parametrize(
    "name", ["غير ضار", "می\u200cخواهم", "שלום\u200f!", "क्\u200dष", "👩\u200d💻", "❤️", "未分類", "né"]
)
def test_labels_of_all_languages(name):
    config, _ = ProbeConfig.from_dict(json.loads(ProbeConfig(id2label={0: name, 1: "b"}).to_json_string()))
    assert config.id2label == {0: name, 1: "b"}


def test_a_system_prompt_has_as_many_lines_as_it_likes():
    assert ProbeConfig(system_prompt="Be kind.\n\tAlways.").system_prompt == "Be kind.\n\tAlways."


def test_heads_that_read_replies_are_causal():
    assert [ProbeConfig(token_scope=scope).causal for scope in ("prompt", "content", "response", "all")] == [
        0,
        0,
        1,
        1,
    ]
    assert ProbeConfig(causal=True).causal, "a prompt may be read so as well"
    with pytest.raises(ProbeError, match="was trained to look ahead"):
        ProbeConfig().replace(token_scope="all")


def test_labels_by_default():
    config = ProbeConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert ProbeConfig().num_labels == 2
    assert ProbeConfig(id2label={"1": "yes", "0": "no"}).label2id == {"no": 0, "yes": 1}


def test_json_round_trip():
    config = ProbeConfig(
        probe_type="gate", id2label={0: "né", 1: "oui"}, layers=[3, 1], prefix_ids=[1, 2], threshold=0.25, **SIZES
    )
    back, unknown = ProbeConfig.from_dict(json.loads(config.to_json_string()))
    assert back == config and unknown == []
    assert config.layer_indices == [1, 3]
    assert ProbeConfig(probe_type="gate", **SIZES).layer_indices == [0, 1, 2, 3, 4]


def test_of_a_head_by_name(tmp_path):
    config = ProbeConfig.from_pretrained("toxicchat-mha")
    assert (config.probe_type, config.num_hidden_layers) == ("mha", 30)
    config.threshold = 0.25
    config.save_pretrained(tmp_path / "a" / "head")
    assert [path.name for path in (tmp_path / "a" / "head").iterdir()] == ["probe_config.json"]
    assert ProbeConfig.from_pretrained(tmp_path / "a", subfolder="head") == config
    config.threshold = 2.0
    with pytest.raises(ProbeError, match=r"threshold=2\.0 must be"):
        config.save_pretrained(tmp_path / "a" / "head")
    assert ProbeConfig.from_pretrained(tmp_path / "a" / "head").threshold == 0.25
    with pytest.raises(ProbeError, match="'toxicat' is neither a folder nor a bundled head"):
        ProbeConfig.from_pretrained("toxicat")


def test_unknown_keys_are_left_out_and_named():
    config, unknown = ProbeConfig.from_dict({"num_labels": 4, "colour": "red"})
    assert config.num_labels == 4 and unknown == ["colour"]


def test_contradicting_labels():
    with pytest.raises(ProbeError, match="contradict"):
        ProbeConfig.from_dict({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}})


def test_replace_checks_again():
    config = ProbeConfig()
    assert config.replace(pool="max").pool == "max" and config.pool == "mean"
    with pytest.raises(ProbeError):
        config.replace(pool="median")
