"""Defaults for what the user leaves open."""

import pytest

from llama_probe import ProbeConfig, ProbeError
from llama_probe.heads import Aggregator, get_probe_type, probe_types
from llama_probe.training.recipe import Recipe, check_head, complete


@pytest.mark.parametrize(
    "rows, kind",
    [(1, "pooling"), (128, "pooling"), (129, "gate"), (512, "gate"), (513, "multimax"), (10**7, "multimax")],
)
def test_nothing_stays_open(rows, kind):
    recipe, head = complete(Recipe(), {}, rows)
    assert None not in (recipe.learning_rate, recipe.num_train_epochs, recipe.per_device_train_batch_size)
    config = ProbeConfig(hidden_size=576, num_hidden_layers=30, **head)
    assert config.probe_type == kind and config.dropout == get_probe_type(kind).recipe["dropout"]


@pytest.mark.parametrize("kind", probe_types())
def test_a_given_kind_stays(kind):
    recipe, head = complete(Recipe(), {"probe_type": kind}, 50)
    assert head["probe_type"] == kind and recipe.learning_rate == get_probe_type(kind).recipe["learning_rate"]
    assert get_probe_type(kind).recipe.keys() == Aggregator.recipe.keys()


def test_given_values_stay():
    given = Recipe(learning_rate=5.0, num_train_epochs=1, per_device_train_batch_size=2, label_smoothing=0.0)
    wanted = {"probe_type": "mha", "dropout": 0.0, "layer_dropout": 0.0, "downcast": 4}
    recipe, head = complete(given, wanted, 20)
    assert recipe == given and head == wanted
    assert recipe is not given and head is not wanted, "copies"


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", float("nan")),
        ("num_train_epochs", -1),
        ("per_device_train_batch_size", 2**31),
        ("patience", 0),
        ("focal_gamma", float("inf")),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ProbeError, match=f"^{name}={value}"):
        Recipe(**{name: value})


def test_fields_that_a_kind_does_not_take_are_refused():
    fields = {"options": {"num_members": 2}, "dropout": None}
    check_head(fields)  # the kind may be chosen to have it
    check_head({"probe_type": "multimax", **fields})
    with pytest.raises(ProbeError, match="num_members"):
        check_head({"probe_type": "gate", **fields})
