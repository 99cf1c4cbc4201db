"""What the report says of layer weights."""

from llama_probe.reproduction.report import _layers


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
