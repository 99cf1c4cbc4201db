"""Tables of rows on disk and on the Hub."""

import json

import datasets
import pytest

from llama_probe import ProbeError
from llama_probe.data.row_sources import Source
from llama_probe.data.tables import read_table


def card(**configs: str | list[dict[str, str]]) -> bytes:
    """Return the head of a README that names the files of each split and configuration, in YAML."""
    lines = [f"- {{config_name: {name}, data_files: {json.dumps(files)}}}" for name, files in configs.items()]
    return "\n".join(["---", "configs:", *lines, "---", ""]).encode()


def test_existing_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows:odd@name.csv").write_text("text,label\na,0\n")
    assert read_table("rows:odd@name.csv") == ({"text": ["a"], "label": [0]}, {})
    assert read_table(".")[0]["text"] == ["a"]


@pytest.mark.parametrize(
    "cells, values",
    [
        ("1,-2, 3", [1, -2, 3]),
        ("1,,2.5", [1.0, None, 2.5]),
        ("true,False,", [True, False, None]),
        ("1,,1_0", ["1", None, "1_0"]),
        ("1234567890123456789012,1.5", ["1234567890123456789012", "1.5"]),  # as a number it would lose digits
    ],
)
def test_types_of_csv_cells(tmp_path, cells, values):
    lines = ["text,label", *(f"a,{cell}" for cell in cells.split(","))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    assert read_table(str(tmp_path / "rows.csv"))[0]["label"] == values


FR = [{"split": "train", "path": "fr/train.csv"}, {"split": "validation", "path": "fr/dev.csv"}]
FILES = {
    "README.md": card(en="en.csv", fr=FR),
    "en.csv": b"text,label\n007,calm\n",
    "fr/train.csv": b"text,label\nbon,calme\n",
    "fr/dev.csv": b"text,label\nbien,calme\n",
}


def test_a_folder_with_configurations(tmp_path):
    (tmp_path / "fr").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    assert read_table(f"{tmp_path}:en", text_columns=["text"])[0]["text"] == ["007"]
    assert read_table(f"{tmp_path}:fr", "validation")[0]["text"] == ["bien"]
    assert read_table(f"{tmp_path}:fr:train", "validation")[0]["text"] == ["bon"]
    for word, named in ((":de", "'en', 'fr'"), (":fr:dev", "'dev'; it has: train, validation"), ("@v1", "@v1")):
        with pytest.raises(ProbeError, match=named):
            read_table(f"{tmp_path}{word}")


PLACES = ("../secret.csv", "SECRET", "http://127.0.0.1:9/a.csv", "zip://a.csv::b.zip")
OUTSIDE = [*(("data_files", name) for name in PLACES), ("data_dir", "../"), ("link", "../secret.csv")]


@pytest.mark.parametrize("key, name", OUTSIDE)
def test_a_folder_that_names_rows_outside(tmp_path, key, name):
    """Its card may be that of a stranger."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (tmp_path / "secret.csv").write_text("text,label\nsecret,0\n")
    (folder / "a.csv").write_text("text,label\na,0\n")
    if key == "link":
        (folder / "b.csv").symlink_to(name)
    else:
        name = name.replace("SECRET", str(tmp_path / "secret.csv"))
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {key}: '{name}'\n---\n")
    with pytest.raises(ProbeError, match=r"out of the folder|cannot be read|no known format"):
        read_table(str(folder))


def test_a_folder_of_the_cache_links_to_its_blobs(tmp_path):
    folder, blobs = tmp_path / "datasets--a--b" / "snapshots" / "1", tmp_path / "datasets--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "2").write_text("text,label\na,0\n")
    (folder / "train.csv").symlink_to("../../blobs/2")
    assert read_table(str(folder))[0]["text"] == ["a"]


@pytest.mark.parametrize(
    "name, file, content, named",
    [
        ("a.jsonl", "a.jsonl", b"", "holds no rows"),
        ("missing.csv", None, None, "there is no file"),
        ("folder", None, None, "cannot be read"),
        ("folder", "folder/a.txt", b"x", "no known format"),  # loaders of other files can do more than read rows
        (" ", None, None, "names no rows"),
        ("someone/toxichat", None, None, "someone/toxichat cannot be read"),
    ],
)
def test_sources_without_rows(tmp_path, monkeypatch, name, file, content, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if file is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ProbeError, match=named) as refused:
        read_table(name)
    assert "\n" not in str(refused.value) and name in str(refused.value)


def test_a_table_that_does_not_fit_into_memory(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + f"{'x' * 600},0\n" * 600)
    assert len(read_table(str(path), max_text=800)[0]["text"]) == 600
    for limit, words in ((599, "a.csv has more than"), (3, "row 0")):
        with pytest.raises(ProbeError, match=f"{words}.*max_text"):
            read_table(str(path), max_text=limit)


def test_rows_from_the_hub(hub, monkeypatch):
    """Read with the client of the `datasets` library from a server on loopback."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    token = hub.add_user("alice")
    hub.plant("datasets/alice/mood", FILES)
    first = hub.head("datasets/alice/mood")
    hub.plant("datasets/alice/mood", {"en.csv": b"text,label\nnew,calm\n"})
    hub.plant("datasets/alice/mood", {"en.csv": b"text,label\nasked,calm\n"}, branch="refs/pr/1")
    hub.plant("datasets/alice/secret", {"train.csv": b"text,label\nhush,x\n"}, private=True)
    emotion = card(split=[{"split": "validation", "path": "dev.csv"}])
    hub.plant("datasets/dair-ai/emotion", {"README.md": emotion, "dev.csv": b"text,label\ni feel,1\n"})
    hub.plant("datasets/stanfordnlp/imdb", {"train.csv": b"review,label\na,1\n"})

    def read(source, split="train"):
        rows = Source(rows=source).read(split=split)
        return rows.texts, [rows.label_names[label] for label in rows.labels]

    assert read("alice/mood:en") == (["new"], ["calm"])
    assert read(f"alice/mood@{first}:en") == (["7"], ["calm"])
    assert read("alice/mood@refs/pr/1:en") == (["asked"], ["calm"])
    assert read("alice/mood:fr", "validation") == (["bien"], ["calme"])
    assert read("alice/mood:fr:validation") == (["bien"], ["calme"])
    assert read("emotion:validation") == (["i feel"], ["joy"])
    for source, words in (
        ("alice/mood", "'en', 'fr'"),
        ("alice/mood:fr:test", "'train', 'validation'"),
        ("alice/nothing", "alice/nothing cannot be read"),
        ("alice/secret", "alice/secret cannot be read"),
        ("a/b:c:d:e", "'a/b:c:d:e' is no file and no Hub id"),
        ("imdb", "imdb.*'text'.*review, label"),
    ):
        with pytest.raises(ProbeError, match=words):
            read(source)
    monkeypatch.setenv("HF_TOKEN", token)
    assert read("alice/secret") == (["hush"], ["x"])
