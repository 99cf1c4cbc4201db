"""A run resumes only with the settings that it was begun with."""

import pytest

from llama_probe import ProbeError
from llama_probe.evaluation.resume import same_settings


SETTINGS = {"data": "a", "recipe": {"epochs": 3, "rates": (0.1, 0.2)}, "rows": None}


def test_settings_are_written_once_and_found_again(tmp_path):
    path = tmp_path / "new" / "settings.json"
    assert not same_settings(path, SETTINGS)
    written = path.read_bytes()
    assert same_settings(path, SETTINGS) and path.read_bytes() == written


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data": "b"}, r"data='a' \(now 'b'\)"),
        ({"recipe": {"epochs": 4, "rates": (0.1, 0.2)}}, r"recipe\.epochs=3 \(now 4\)"),
        ({"weights": None}, r"weights=absent \(now None\)"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, words):
    path = tmp_path / "settings.json"
    same_settings(path, SETTINGS)
    with pytest.raises(ProbeError, match=words):
        same_settings(path, SETTINGS | changes)
    assert same_settings(path, SETTINGS), "a refused run writes nothing"


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_files_are_refused(tmp_path, text):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ProbeError, match=r"settings\.json"):
        same_settings(path, SETTINGS)
