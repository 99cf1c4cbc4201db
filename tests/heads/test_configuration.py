"""ProbeConfig: defaults, round trips, and a refusal of each wrong value that names the field."""

import json

import pytest
import torch

from llama_probe import ProbeConfig, ProbeError
from llama_probe.heads.decision import predictions


SIZES = {"hidden_size": 32, "num_hidden_layers": 4}
MULTI_LABEL = "multi_label_classification"


def refused(field, *values):
    return [({field: value}, f"{field}=") for value in values]


@pytest.mark.parametrize(
    "values, words",
    [
        *refused("probe_type", None),
        ({"probe_type": "lstm"}, "allowed: gate, .*--import FILE.py"),
        *refused("pool", "median"),
        *refused("normalize", True),
        *refused("token_scope", "everything"),
        ({"token_scope": "response", "causal": False}, "causal=False is not allowed with token_scope='response'"),
        *refused("causal", "yes"),
        *refused("prompt_format", "xml"),
        *refused("problem_type", "ranking"),
        *refused("num_attention_heads", 0),
        *refused("hidden_size", -1, 1.5),
        *refused("num_hidden_layers", 10**9),
        ({"hidden_size": 30, "downcast": 4}, "downcast=4 must divide hidden_size=30"),
        ({"hidden_size": 32, "downcast": 4, "num_attention_heads": 3}, "num_attention_heads=3 must divide"),
        *refused("dropout", 1.0, -(10**400)),
        *refused("layer_dropout", "half"),
        *refused("temperature", 0, 1e-7, float("nan"), 10**400, None),
        *refused("threshold", 10**400, 1.5, "x", [0.1, None], [0.1, 0.2], []),
        *refused("fingerprint", [0.5, 10**400], []),
        *refused("thresholds", [0.5], {"": 0.5}, {"a\nb": 0.5}, {"a": 1.5}, {"a": "x"}, {1: 0.5}),
        ({"thresholds": {"a": 0.5}, "num_labels": 3}, "thresholds=.*needs two labels"),
        ({"threshold": 0.5, "num_labels": 3}, "threshold=.*num_labels=3"),
        ({"threshold": [0.5], "num_labels": 3, "problem_type": MULTI_LABEL}, "threshold=.*num_labels=3"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels=3 but id2label names 2"),
        *refused("num_labels", 0, "2", True),
        *refused("id2label", {0: "a", 2: "b"}, {"zero": "a"}, ["a"], {}),
        # indices that are not plain numbers, or come twice
        *(({"id2label": {0: "a", key: "b"}}, "id2label") for key in ("01", "+1", "\u0661", "", 1.0, None, "9" * 9999)),
        ({"id2label": {0: "a", 1: "b", "1": "c"}}, "id2label"),
        ({"id2label": {0: "a", 1: "a"}}, "id2label has the names"),
        *[
            ({"id2label": {0: name, 1: "b"}}, "id2label has the name .* must be text without line breaks")
            for name in ("a\x1b[31m", "b\nc", "safe\u202e", "\u2067b", "b\u2028c", "half \ud83d", "\U000e0061", 3)
        ],
        *refused("base_model_name_or_path", 7, "half \ud83d", "a\u2066b", "a\x1b[31m"),
        *refused("base_model_revision", "a\nb"),
        *refused("layers", "some", [], [0, 0], [-1], [True]),
        ({"layers": [0, 5], "num_hidden_layers": 4}, "layers=.*num_hidden_layers=4"),
        *refused("prefix_ids", [1, "2"]),
        *refused("options", []),
        ({"probe_type": "gate", "options": {"foo": 1}}, r"\['foo'\]"),
        ({"probe_type": "attentive"}, "probe_type='attentive' is gone.* multimax"),
        ({"probe_type": "multimax", "options": {"num_members": 1.5}}, "num_members"),
        ({"probe_type": "multimax", "options": {"maxima": 2}}, r"\['maxima'\].* \['num_maxima', 'num_members'\]"),
        *refused("flagged", ["worse"], ["LABEL_0", "LABEL_1"], [], "LABEL_1"),
        ({"flagged": ["LABEL_0"], "problem_type": "regression"}, "^flagged="),
    ],
)
def test_wrong_values_name_the_field_and_what_is_allowed(values, words):
    with pytest.raises(ProbeError, match=words):
        ProbeConfig(**values)


LANGUAGES = "غير ضار|می\u200cخواهم|שלום\u200f!|क्\u200dष|👩\u200d💻|❤️|未分類|né|Zug\u00adabteil|\U0001fae9"


def test_labels_of_all_languages():
    names = dict(enumerate(LANGUAGES.split("|")))
    config, _ = ProbeConfig.from_dict(json.loads(ProbeConfig(id2label=names).to_json_string()))
    assert config.id2label == names


def test_defaults():
    scopes = ("prompt", "content", "response", "all")
    assert [ProbeConfig(token_scope=scope).causal for scope in scopes] == [False, False, True, True]
    assert ProbeConfig(causal=True).causal, "a prompt may be read so as well"
    assert ProbeConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert ProbeConfig(id2label={"1": "yes", "0": "no"}).label2id == {"no": 0, "yes": 1}


def test_messages_are_cut():
    with pytest.raises(ProbeError) as raised:
        ProbeConfig(pool="x" * 4_000_000)
    assert len(str(raised.value)) < 400


def test_json_round_trip():
    fields = {"layers": [3, 1], "prefix_ids": [1, 2], "threshold": 0.25, **SIZES}
    config = ProbeConfig(probe_type="gate", id2label={0: "né", 1: "oui"}, **fields)
    back, unknown = ProbeConfig.from_dict({**json.loads(config.to_json_string()), "colour": "red"})
    assert back == config and unknown == ["colour"]
    assert config.layer_indices == [1, 3]
    assert ProbeConfig(probe_type="gate", **SIZES).layer_indices == [0, 1, 2, 3, 4]


def test_a_config_by_the_name_of_its_head(tmp_path):
    config = ProbeConfig.from_pretrained("toxicchat-mha")
    assert (config.probe_type, config.num_hidden_layers) == ("mha", 30)
    config.threshold = 0.25
    config.save_pretrained(tmp_path / "a" / "head")
    assert [path.name for path in (tmp_path / "a" / "head").iterdir()] == ["probe_config.json"]
    assert ProbeConfig.from_pretrained(tmp_path / "a", subfolder="head") == config
    config.threshold = 2.0
    with pytest.raises(ProbeError, match=r"threshold=2\.0"):
        config.save_pretrained(tmp_path / "a" / "head")
    assert ProbeConfig.from_pretrained(tmp_path / "a" / "head").threshold == 0.25
    with pytest.raises(ProbeError, match="'toxicat'"):
        ProbeConfig.from_pretrained("toxicat")


class TestFlagged:
    def test_a_name_and_no_place(self):
        for names in (("bad", "good"), ("good", "bad")):
            config = ProbeConfig(id2label=dict(enumerate(names)), flagged=["bad"], threshold=0.3)
            assert config.flagged_index == names.index("bad") and config.flagged == ["bad"]
            probs = torch.tensor([[0.35, 0.65], [0.65, 0.35]])
            assert predictions(probs, config).tolist() == ([0, 0] if names[0] == "bad" else [1, 1])

    def test_nobody_has_named_one(self):
        config = ProbeConfig(id2label={0: "bad", 1: "good"})
        assert config.flagged is None
        with pytest.raises(ProbeError, match="--flagged bad; labels: bad, good"):
            config.need_flagged_index("this")
        assert ProbeConfig().flagged == ["LABEL_1"], "labels 0 and 1 say themselves which is which"
        for other in ({"num_labels": 3}, {"num_labels": 1, "problem_type": "regression"}):
            assert ProbeConfig(**other).flagged is None

    def test_heads_of_earlier_versions_flag_the_second(self):
        values = ProbeConfig(id2label={0: "bad", 1: "good"}).to_dict()
        assert ProbeConfig.from_dict(values)[0].flagged is None
        del values["flagged"]
        assert ProbeConfig.from_dict(values)[0].flagged == ["good"]
        assert ProbeConfig.from_dict(values | {"id2label": None, "label2id": None, "num_labels": 3})[0].flagged is None
        by_threshold = ProbeConfig(id2label={0: "bad", 1: "good"}, threshold=0.3)
        assert by_threshold.flagged == by_threshold.replace(threshold=0.6).flagged == ["good"]

    @pytest.mark.parametrize("changes", [{"threshold": 0.0}, {"thresholds": {"low": 0.3}}])
    def test_a_threshold_that_comes_later_flags_nothing_by_its_place(self, changes):
        config = ProbeConfig(id2label={0: "harmful", 1: "harmless"})
        with pytest.raises(ProbeError, match=r"threshold needs the label to flag.*harmful, harmless"):
            config.replace(**changes)
        assert config.replace(**changes, flagged=["harmful"]).flagged_index == 0
        assert ProbeConfig().replace(**changes).flagged == ["LABEL_1"]

    def test_other_names_of_the_labels(self):
        config = ProbeConfig(id2label={0: "bad", 1: "good"}, flagged=["bad"])
        assert config.replace(id2label={0: "rude", 1: "fine"}).flagged == ["rude"]
        assert config.replace(id2label={0: "fine", 1: "rude"}, flagged=["rude"]).flagged_index == 1

    def test_several(self):
        three = ProbeConfig(num_labels=3, flagged=["LABEL_0", "LABEL_2"])
        assert three.flagged == ["LABEL_0", "LABEL_2"] and three.flagged_index is None
