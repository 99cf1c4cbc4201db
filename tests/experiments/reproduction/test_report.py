"""What the report says of layer weights, and of a sweep."""

from llama_probe.experiments.reproduction.report import _layers, _sensitivity
from llama_probe.experiments.reproduction.reproduction import summarize_trials


def test_configurations_that_failed_are_counted_apart():
    trials = [
        {"status": status, "score": score, "params": {"probe_type": "gate", "gate_learning_rate": rate}}
        for status, score, rate in (("finished", 0.9, 1e-3), ("pruned", 0.5, 1e-4), ("failed", None, 3e-2))
    ]
    found = {"metric": "auprc", "trials": trials, "kinds": summarize_trials(trials)}
    text = "\n".join(_sensitivity(found))
    assert (
        "3 configurations of a sweep. Pruned early: 1" in text and "Failed, their training having run away: 1" in text
    )
    assert "| `gate` | 2 | 0.900 | 0.700 | 0.500 | 0.400 | - |" in text


def test_errors_are_counted_by_what_their_layer_weights_are_near_to():
    groups = [{"label": "a", "right": True, "rows": 9, "weights": [0.2, 0.8]}]
    errors = [
        {"label": "a", "given": "b", "rows": 5, "to_given": 0.1, "to_true": 0.2},
        {"label": "b", "given": "a", "rows": 1, "to_given": 0.2, "to_true": 0.2},
    ]
    text = "\n".join(_layers("emotion", {"gate": {"layers": [0, 1], "groups": groups, "errors": errors}}))
    assert "| `gate` | a | right | 9 | 1 (0.800), 0 (0.200) |" in text
    assert (
        "`gate`: nearer to the given label for 1 of 2 pairs of a true and a given label, which is 5 of 6 wrong rows"
        in text
    )
