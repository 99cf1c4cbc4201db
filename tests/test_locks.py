"""Folders that one run at a time may have."""

import pytest

from llama_probe import ProbeError
from llama_probe.locks import claimed


def test_a_folder_has_one_run_at_a_time(tmp_path):
    folder = tmp_path / "head"
    with claimed(folder):
        with pytest.raises(ProbeError, match=r"another run is at work in .*head: wait for its end"), claimed(folder):
            pass
        with claimed(tmp_path / "other"):
            (folder / "weights").touch()
    with claimed(folder):
        assert [path.name for path in folder.iterdir()] == ["weights"], "and no lock is left to be seen"


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(ValueError), claimed(tmp_path / name):
            raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ProbeError, match="file cannot be made: File exists"), claimed(tmp_path / "file"):
        pass
