"""Writing to disk: nothing half-written, a full disk is named, and places that cannot hold a folder are refused."""

import os
from functools import partial

import pytest
import torch
from conftest import make_probe, save_head
from kills import full_disk
from safetensors.torch import save_file

from llama_probe import ProbeError, files
from llama_probe.files import new_folder, remove_leftovers, write_atomically
from llama_probe.hub.folder import check_output


def test_a_full_disk_changes_nothing_and_is_named(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for write in (lambda path: path.write_bytes(bytes(2**16)), partial(save_file, {"w": torch.zeros(2**14)})):
        with full_disk(2**12), pytest.raises(ProbeError, match="kept cannot be written: there is no room"):
            write_atomically(kept, write)
    assert kept.read_text() == "as it was" and list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_folder_is_whole_or_missing(tmp_path, exists):
    folder = tmp_path / "deep" / "new"
    if exists:
        folder.mkdir(parents=True)
    with pytest.raises(KeyError), new_folder(folder) as written:
        (written / "half").touch()
        raise KeyError
    assert not list(tmp_path.rglob("half")) and folder.exists() == exists
    with new_folder(folder) as written:
        (written / "a").touch()
    assert [path.name for path in folder.iterdir()] == ["a"]
    with pytest.raises(ProbeError, match="not an empty folder"), new_folder(folder):
        pass


def test_places_that_cannot_be_a_folder(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("x")
    for name in ("a" * 300, "taken", "taken/inside"):
        with pytest.raises(ProbeError, match=r"cannot be a folder|taken is a file"):
            check_output(tmp_path / name)
        with pytest.raises(ProbeError, match=r"cannot be made: (File name too long|File exists|Not a directory)"):
            save_head(make_probe(), tmp_path / name)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ProbeError, match="is not writable"):
        check_output(tmp_path / "new")


def test_leftovers_of_killed_processes_are_told_from_files_in_use(tmp_path):
    (tmp_path / ".new-files.x.tmp").mkdir()
    (tmp_path / ".new-files.x.tmp" / "a.json").touch()

    def write(path):
        remove_leftovers(tmp_path)
        path.write_text("a")

    write_atomically(tmp_path / "a.json", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_save_that_begins_while_the_state_of_a_folder_is_taken_changes_it(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "a").write_text("new")
    waiting = [tmp_path / "staged"]

    def then_save(function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        finally:
            if waiting:
                waiting.pop().rename(tmp_path / files.PENDING)

    with monkeypatch.context() as patch:
        for name in ("stat", "listdir"):
            patch.setattr(files.os, name, partial(then_save, getattr(os, name)))
        before = files.folder_state(tmp_path, "a")
    files.finish_interrupted_save(tmp_path)
    assert files.folder_state(tmp_path, "a") != before, "what was read in between may be of both"
