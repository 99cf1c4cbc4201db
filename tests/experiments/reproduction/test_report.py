"""Sentences and gaps of the report, from results made by hand or changed."""

import copy

from llama_probe.experiments.reproduction.report import write_report


def written(everything, tmp_path, **changes):
    """The text of a finished reproduction's report with changes."""
    report = copy.deepcopy(everything[0]) | changes
    write_report(tmp_path, report, finished=False)
    return (tmp_path / "report.md").read_text()


def test_errors_are_counted_by_the_nearer_layer_weights(everything, tmp_path):
    groups = [{"label": "a", "right": True, "rows": 9, "weights": [0.2, 0.8]}]
    errors = [
        {"label": "a", "given": "b", "rows": 5, "to_given": 0.1, "to_true": 0.2},
        {"label": "b", "given": "a", "rows": 1, "to_given": 0.2, "to_true": 0.2},
    ]
    layers = {"emotion": {"gate": {"layers": [0, 1], "groups": groups, "errors": errors}}}
    text = written(everything, tmp_path, layers=layers)
    assert "| `gate` | a | right | 9 | 1 (0.800), 0 (0.200) |" in text
    assert "1 of 2 pairs" in text and "5 of 6 wrong rows" in text


def test_a_metric_that_is_not_defined_is_a_gap(everything, tmp_path):
    """Test rows of one label have no AUPRC."""
    report = copy.deepcopy(everything[0])
    report["main"]["toxicchat"]["gate"]["summary"]["test"]["auprc"] = None
    for point in report["few_labels"]["toxicchat"]["gate"]["curve"]:
        point["auprc"] = None
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert "| `gate` | - |" in text.split("## Few labels: toxicchat")[1]
    assert not (tmp_path / "few-labels-toxicchat.png").exists() and (tmp_path / "main-toxicchat.png").is_file()


def test_a_method_that_a_test_set_lacks_is_a_gap(everything, tmp_path):
    report = copy.deepcopy(everything[0]["ood"])
    report["results"]["aegis"] = {"gate": report["results"]["xstest"]["gate"]}
    text = written(everything, tmp_path, ood=report).split("## Out of distribution")[1]
    (line,) = (line for line in text.splitlines() if line.startswith("| `tfidf` |"))
    assert line.count(" / ") == 2 and [cell.strip() for cell in line.split("|")][3] == "-"
