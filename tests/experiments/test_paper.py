"""The paper's own figures, as they stand beside ours."""

from llama_probe.experiments import paper


def test_the_papers_figures():
    assert paper.figure("mha", "toxicchat", "f1") == paper.Figure(0.8451, 0.0043)
    assert paper.figure("gate", "emotion", "accuracy").value == 0.8458
    assert (
        paper.figure("muli", "sst2", "accuracy").value == 0.9319 and paper.figure("tfidf", "sst2", "accuracy") is None
    )
    assert [figure.value for figure in paper.DOWNCAST.values()] == [0.841, 0.829, 0.830, 0.845, 0.828]
    for figures in paper.MAIN.values():
        assert all(0 < figure.value < 1 for figure in figures.values()), "shares, not percent"
    ratios = {name: round(paper.serving_ratio(name), 2) for name in paper.SERVING}
    assert ratios == {
        "base": 1.0, "pooling": 1.12, "gate": 1.17, "mha": 1.52, "T5-large": 3.34, "WildGuard-7B": 3.80,
        "Llama Guard 3 8B": 4.66,
    }  # fmt: skip
    assert paper.serving_ratio("attentive") is None
