"""Tables of rows: which of them one word names, on disk and on the Hub."""

import json
import subprocess
import sys
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_probe import ProbeError
from llama_probe.data.tables import TablePlace, read_table


def card(**configs: dict[str, str]) -> bytes:
    """The head of a README that says which files are which split of which configuration."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - {{split: {split}, path: {path}}}" for split, path in splits.items()]
    return "\n".join([*lines, "---", ""]).encode()


def parquet(**columns) -> bytes:
    file = BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "source, place",
    [
        ("nyu-mll/glue", TablePlace("nyu-mll/glue")),
        ("nyu-mll/glue:sst2", TablePlace("nyu-mll/glue", None, "sst2")),
        ("nyu-mll/glue:sst2:validation", TablePlace("nyu-mll/glue", None, "sst2", "validation")),
        ("ann/mood::dev", TablePlace("ann/mood", None, None, "dev")),
        ("ann/mood@refs/pr/1:en", TablePlace("ann/mood", "refs/pr/1", "en")),
        ("ann/mood@v1", TablePlace("ann/mood", "v1")),
        ("rows.csv", TablePlace("rows.csv")),
        ("a:b:c:d", TablePlace("a:b:c:d")),
        ("", TablePlace("")),
    ],
)
def test_one_word_names_rows(source, place):
    assert TablePlace.parse(source) == place


def test_an_existing_path_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows:odd@name.csv").write_text("text,label\na,0\n")
    assert read_table("rows:odd@name.csv")["text"][:] == ["a"]


def test_the_folder_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    monkeypatch.chdir(tmp_path)
    assert read_table(".", "train", ["text"])["text"][:] == ["a"]
    for source in ("", " "):
        with pytest.raises(ProbeError, match="names no rows"):
            read_table(source)


def test_a_folder_with_configurations(tmp_path):
    (tmp_path / "fr").mkdir()
    (tmp_path / "README.md").write_bytes(
        card(en={"train": "en.csv"}, fr={"train": "fr/train.csv", "test": "fr/test.csv"})
    )
    (tmp_path / "en.csv").write_text("text,label\n007,0\n")
    (tmp_path / "fr" / "train.csv").write_text("text,label\nbon,1\n")
    (tmp_path / "fr" / "test.csv").write_text("text,label\nbien,1\n")
    assert read_table(f"{tmp_path}:en", text_columns=["text"])["text"][:] == ["007"]
    assert read_table(f"{tmp_path}:fr", "test")["text"][:] == ["bien"]
    assert read_table(f"{tmp_path}:fr:train", "test")["text"][:] == ["bon"]
    for word, words in (
        ("", r"has no default configuration; it has: en, fr\. Name one: .*:CONFIGURATION"),
        (":de", r"has no configuration 'de'; it has: en, fr"),
        (":fr:dev", r"has no split 'dev'; it has: train, test\. \S*:fr:SPLIT names one"),
        ("@v1", "is a folder, and has no revisions: leave @v1 out"),
        ("/en.csv:train", "en.csv is a file, all of which is read: leave :train out"),
    ):
        with pytest.raises(ProbeError, match=words):
            read_table(f"{tmp_path}{word}")


READ = """
import json, sys
from llama_probe import ProbeError
from llama_probe.data.texts import read_labelled
for source, options in json.loads(sys.argv[1]):
    try:
        rows = read_labelled(source, **options)
        print(json.dumps([rows.texts, [rows.label_names[i] for i in rows.labels]]))
    except ProbeError as error:
        print(json.dumps(str(error)))
"""


def test_rows_from_the_hub(hub):
    """The `datasets` library's own client, against the server on loopback."""
    token = hub.add_user("alice")
    configs = card(en={"train": "en.csv"}, fr={"train": "fr/train.csv", "validation": "fr/dev.csv"})
    hub.plant(
        "datasets/alice/mood",
        {
            "README.md": configs,
            "en.csv": b"text,label\nold,calm\n",
            "fr/train.csv": b"text,label\nbon,calme\n",
            "fr/dev.csv": b"text,label\nbien,calme\n",
        },
    )
    first = hub.head("datasets/alice/mood")
    hub.plant("datasets/alice/mood", {"en.csv": b"text,label\nnew,calm\n"})
    hub.plant(
        "datasets/alice/plain",
        {"data/train.parquet": parquet(says=["a"], kind=[1]), "data/dev.parquet": parquet(says=["b"], kind=[0])},
    )
    hub.plant("datasets/alice/secret", {"train.csv": b"text,label\nhush,x\n"}, private=True)
    emotion = {
        f"split/{name}-00000.parquet": parquet(text=[f"i feel {name}"], label=[i])
        for i, name in enumerate(("train", "validation", "test"))
    }
    splits = {name: f"split/{name}-*" for name in ("train", "validation", "test")}
    hub.plant("datasets/dair-ai/emotion", {"README.md": card(split=splits), **emotion})
    columns = {"text_column": "says", "label_column": "kind", "label_names": ["no", "yes"]}
    wanted = [
        (["alice/mood:en", {}], [["new"], ["calm"]]),
        ([f"alice/mood@{first}:en", {}], [["old"], ["calm"]]),
        (["alice/mood:fr:validation", {}], [["bien"], ["calme"]]),
        (["alice/mood:fr", {"split": "validation"}], [["bien"], ["calme"]]),
        (["alice/plain", columns], [["a"], ["yes"]]),
        (["alice/plain::validation", columns], [["b"], ["no"]]),
        (["emotion:validation", {}], [["i feel validation"], ["joy"]]),
        (
            ["alice/mood", {}],
            "alice/mood has no default configuration; it has: en, fr. Name one: alice/mood:CONFIGURATION",
        ),
        (["alice/mood:de", {}], "alice/mood has no configuration 'de'; it has: en, fr"),
        (
            ["alice/mood:fr:test", {}],
            "alice/mood:fr:test has no split 'test'; it has: train, validation. alice/mood:fr:SPLIT",
        ),
        (["alice/mood@v9:en", {}], "alice/mood@v9:en cannot be read"),
        (["alice/nothing", {}], "alice/nothing cannot be read"),
        (["alice/secret", {}], "alice/secret cannot be read"),
    ]

    def read(sources, env):
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(sources)], env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return list(map(json.loads, done.stdout.splitlines()))

    found = read([source for source, _ in wanted], hub.env)
    for (source, expected), got in zip(wanted, found, strict=True):
        assert got.startswith(expected) if isinstance(expected, str) else got == expected, source
    assert read([["alice/secret", {}]], hub.env | {"HF_TOKEN": token}) == [[["hush"], ["x"]]]


def test_a_file_is_what_its_last_suffix_says(tmp_path):
    """A copy that an editor leaves, or a list of files that is called after them, is no table."""
    (tmp_path / "rows.csv.bak").write_text("text,label\na,b\n")
    with pytest.raises(ProbeError, match=r"is of no known format; allowed: \.json"):
        read_table(str(tmp_path / "rows.csv.bak"))
