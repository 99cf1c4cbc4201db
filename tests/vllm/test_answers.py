"""What is said of a prompt, without an engine."""

import pytest
from conftest import make_probe

from llama_probe import ProbeError
from llama_probe.vllm.answers import answer
from llama_probe.vllm.settings import ProbeSettings


def test_hidden_scores(tmp_path):
    kinds = {
        "guard": {"num_labels": 2},
        "topics": {"num_labels": 3, "problem_type": "multi_label_classification"},
        "size": {"num_labels": 1, "problem_type": "regression"},
    }
    heads = {name: str(tmp_path / name) for name in kinds}
    for name, config in kinds.items():
        make_probe(probe_type="pooling", **config).save_pretrained(heads[name])
    found = {"guard": [-9.0, 9.0], "topics": [9.0, -9.0, 9.0], "size": [1.5]}
    halt_on = {"guard": {"threshold": 0.75}}
    said = answer(ProbeSettings(heads, halt_on), found)
    assert said["probes"]["size"]["score"] == 1.5 and said["halted"]["threshold"] == 0.75
    assert [probe.get("flagged") for probe in said["probes"].values()] == [["LABEL_1"], ["LABEL_0", "LABEL_2"], None]
    assert answer(ProbeSettings(heads, halt_on, hide_scores=True), found) == {
        "probes": {
            "guard": {"label": "LABEL_1", "flagged": ["LABEL_1"]},
            "topics": {"label": ["LABEL_0", "LABEL_2"], "flagged": ["LABEL_0", "LABEL_2"]},
            "size": {},
        },
        "halted": {"head": "guard", "label": "LABEL_1"},
    }
    fine = answer(ProbeSettings(heads, halt_on, hide_scores=True), found | {"guard": [9.0, -9.0]})
    assert fine["halted"] is None and fine["probes"]["guard"]["flagged"] == []


def test_the_label_that_a_head_flags_is_named(tmp_path):
    names = {"id2label": {0: "bad", 1: "good"}}
    heads = {
        "guard": {"flagged": ["bad"]},
        "tone": {},
        "topic": {"id2label": {0: "a", 1: "b", 2: "c"}, "flagged": ["c"]},
    }
    folders = {name: str(tmp_path / name) for name in heads}
    for name, config in heads.items():
        make_probe(probe_type="pooling", **{**names, **config}).save_pretrained(folders[name])
    found = {"guard": [9.0, -9.0], "tone": [9.0, -9.0], "topic": [0.0, 1.0, 9.0]}
    said = answer(ProbeSettings(folders, {"guard": {}, "tone": {"label": "good"}}), found)
    assert [probe.get("flagged") for probe in said["probes"].values()] == [["bad"], [], ["c"]]
    assert (said["halted"]["head"], said["halted"]["label"]) == ("guard", "bad")
    said = answer(ProbeSettings(folders), {**found, "guard": [-9.0, 9.0]})
    assert [probe.get("flagged") for probe in said["probes"].values()] == [[], None, ["c"]], "tone flags nothing"
    with pytest.raises(ProbeError, match="--halt-on tone:bad"):
        answer(ProbeSettings(folders, {"tone": {}}), found)
