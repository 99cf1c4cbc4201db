"""Recipes of heads that judge windows: what they learn from documents, and thresholds for texts of any length."""

import random
import string

import pytest
from training_runs import write

from llama_probe import ProbeError, ProbeTrainer
from llama_probe.training.recipe import Recipe


KEYWORD = "BADBADBADBADBADBADBAD"  # capitals, of which other words have a few


def random_text(rng, words):
    letters = 5 * string.ascii_lowercase + string.ascii_uppercase
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(words)) + "."


def lines_of(count, words, seed, share=0.5):
    """Random texts, of which a share has the keyword somewhere."""
    rng = random.Random(seed)
    lines = []
    for number in range(count):
        pieces = random_text(rng, words).split(" ")
        label = int(number < share * count)
        if label and number % 10:  # else the head would be too sure for a threshold
            pieces.insert(rng.randrange(len(pieces)), KEYWORD)
        lines.append({"text": " ".join(pieces), "label": label})
    return lines


@pytest.fixture
def recipe(tmp_path):
    documents = [{"text": random_text(random.Random(n), 60)} for n in range(30)]
    return {
        "labels": {"names": ["fine", "awful"], "flagged": ["awful"]},
        "train": [write(tmp_path / "short.jsonl", lines_of(120, 5, 0))],
        "validation": {"share": 0.2},
        "augmentations": {
            "names": ["document"],
            "share": 1.0,
            "documents": [write(tmp_path / "documents.jsonl", documents)],
            "document_words": [20, 80],
        },
        "head": {
            "probe_type": "pooling",
            "token_scope": "last_user",
            "window": 16,
            "max_length": 1500,
            "layers": [0, 1],
        },
        "training": {
            "num_train_epochs": 6,
            "learning_rate": 0.05,
            "novelty": False,
            "cache_dir": str(tmp_path / "states"),
            "label_smoothing_factor": 0.1,
        },
        "calibration": {
            "sources": [write(tmp_path / "mild.jsonl", lines_of(60, 5, 2, share=0))],
            "documents": 0.5,
            "rates": [0.1, 0.05],
        },
        "measure": {
            "sources": [write(tmp_path / "long.jsonl", lines_of(40, 200, 3))],
            "tfidf": False,
        },
    }


def trained(recipe, backbone, folder):
    """The results of a head, and the share that it flags of long texts without and with the keyword."""
    trainer = ProbeTrainer.from_recipe(recipe, backbone=str(backbone), output_dir=folder)
    trainer.train()
    (part,) = trainer.results["measured"]["parts"]
    return trainer, [part["labels"][label]["fpr-10%"]["share"] for label in ("fine", "awful")]


def test_a_keyword_in_long_texts(recipe, backbone_folder, tmp_path, no_plots):
    """A mean over all tokens loses the keyword among 900 tokens, a mean over 16 tokens does not. Nine rows in ten have it."""
    trainer, shares = trained(recipe, backbone_folder, tmp_path / "windows")
    assert shares[0] == 0 and 0.8 <= shares[1] <= 0.9
    learned = trainer.train_dataset
    places = trainer.plan.rows.train.places
    with_request = [row for row, place in enumerate(places) if place is not None]
    assert with_request == [row for row in range(len(learned)) if any(learned[row]["request_mask"])]
    assert len(with_request) == (len(learned) - trainer.plan.rows.num_plain) / 2
    kept = trainer.results["thresholds_from"]
    assert kept["rows"] == 60 + 30 == sum(group["rows"] for group in kept["groups"].values())
    for group in kept["groups"].values():
        assert all(share <= kept["rates"][name] for name, share in group["flagged"].items())
    del recipe["head"]["window"], recipe["calibration"]["documents"]
    trainer, shares = trained(recipe, backbone_folder, tmp_path / "whole")
    assert shares == [0.0, 0.0] and "groups" not in trainer.results["thresholds_from"]
    assert "request_mask" not in trainer.train_dataset[0]


@pytest.mark.parametrize(
    "section, values, named",
    [("head", {"window": 0}, "calibration.documents=0.5"), ("calibration", {"documents": -1}, "documents=-1")],
)
def test_wrong_settings(recipe, section, values, named):
    recipe[section] |= values
    with pytest.raises(ProbeError, match=named):
        Recipe.load(recipe)
