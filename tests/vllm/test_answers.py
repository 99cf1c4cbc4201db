"""What is said of a prompt, without an engine."""

import math

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


def test_what_is_left_to_a_judge(tmp_path):
    heads = {name: str(tmp_path / name) for name in ("guard", "other")}
    for folder in heads.values():
        make_probe(probe_type="pooling", id2label={0: "fine", 1: "bad"}).save_pretrained(folder)
    rules = {name: {"label": "bad", "threshold": 0.75} for name in heads}
    settings = {
        hide: ProbeSettings(heads, rules, hide_scores=hide, unsure={"guard": [0.2, 0.9]}) for hide in (True, False)
    }

    def said(guard: float, other: float = 0.0, hide: bool = False) -> dict:
        logits = {
            name: [0.0, math.log(p / (1 - p)) if p else -9.0] for name, p in (("guard", guard), ("other", other))
        }
        return answer(settings[hide], logits)

    for score in (0.2001, 0.5, 0.8):  # whatever the threshold says
        assert said(score)["halted"] is None
        (halt,) = said(score)["unsure"]
        assert halt["score"] == pytest.approx(score) and (halt["head"], halt["label"]) == ("guard", "bad")
        assert said(score, hide=True)["unsure"] == [{"head": "guard", "label": "bad"}]
        assert said(score, 0.8)["halted"]["head"] == "other" and "unsure" not in said(score, 0.8)
    assert said(0.9001)["halted"]["head"] == "guard" and said(0.1)["halted"] is None
    assert "unsure" not in said(0.9001) and "unsure" not in said(0.1)
