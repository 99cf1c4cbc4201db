"""What is chosen where the user leaves it open."""

import dataclasses

import pytest

from llama_probe import ProbeConfig, ProbeError
from llama_probe.heads import get_probe_type
from llama_probe.training.recipe import KINDS, SCHEDULES, Recipe, complete


@pytest.mark.parametrize("rows", [1, 32, 33, 100, 512, 513, 10**7])
def test_nothing_stays_open(rows):
    recipe, head = complete(Recipe(), {}, rows)
    assert None not in (recipe.learning_rate, recipe.num_train_epochs, recipe.per_device_train_batch_size)
    config = ProbeConfig(hidden_size=576, num_hidden_layers=30, **head)
    assert config.dropout == KINDS[config.probe_type].dropout


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_given_stays(kind):
    recipe, head = complete(Recipe(), {"probe_type": kind}, 50)
    assert head["probe_type"] == kind and recipe.learning_rate == KINDS[kind].learning_rate
    get_probe_type(kind)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("learning_rate", 0.0, "must be above 0"),
        ("learning_rate", float("nan"), "must be above 0"),
        ("num_train_epochs", -1, "must be above 0"),
        ("per_device_train_batch_size", 0, r"must be at least 1 and below 2\*\*31"),
        ("gradient_accumulation_steps", 0, r"must be at least 1 and below 2\*\*31"),
        ("patience", 0, r"must be at least 1 and below 2\*\*31"),
        ("per_device_train_batch_size", 2**31, r"must be at least 1 and below 2\*\*31"),
        ("weight_decay", -0.1, "must be at least 0"),
        ("focal_gamma", float("inf"), "must be at least 0"),
    ],
)
def test_numbers_that_cannot_be(name, value, words):
    with pytest.raises(ProbeError, match=f"^{name}={value} {words}$"):
        Recipe(**{name: value})


def test_whatever_is_given_stays():
    given = Recipe(learning_rate=5.0, num_train_epochs=1, per_device_train_batch_size=2, label_smoothing=0.0)
    wanted = {"probe_type": "mha", "dropout": 0.0, "layer_dropout": 0.0, "downcast": 4}
    recipe, head = complete(given, wanted, 20)
    assert recipe == given and head == wanted
    assert recipe is not given and head is not wanted, "copies"


def test_fewer_rows_are_read_more_often():
    found = [complete(Recipe(), {}, rows)[0] for rows in (20, 100, 400, 10_000)]
    epochs = [recipe.num_train_epochs for recipe in found]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1]
    assert [entry.up_to for entry in SCHEDULES] == sorted(entry.up_to for entry in SCHEDULES)


def test_kinds_that_others_registered_train_too():
    recipe, head = complete(Recipe(), {"probe_type": "of-somebody"}, 1000)
    assert 1e-4 < recipe.learning_rate < 1e-1 and head["dropout"] is not None
    assert dataclasses.asdict(recipe)["learning_rate"] == recipe.learning_rate
