"""What is said of a prompt, without an engine."""

from conftest import make_probe

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
