"""Files of rows, read in chunks."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe import ProbeError
from llama_probe.data.files import InputFile, check_length


def write(path, count: int, group: int = 7):
    """Write `id` and `text` in the format of the name."""
    rows = [{"id": i, "text": f"number {i}"} for i in range(count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    else:
        cells = ["id,text", *(f"{row['id']},{row['text']}" for row in rows)]
        text = "\n".join(cells) if path.suffix == ".csv" else "\n\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv"])
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 45), group=st.integers(1, 45), world=st.integers(1, 4))
def test_chunks_are_the_rows_each_once(tmp_path_factory, name, count, size, group, world):
    path = write(tmp_path_factory.mktemp("rows") / name, count, group)
    (file,) = InputFile.find([str(path)])
    parts = []
    for rank in range(world):
        parts += file.chunks(["text", "id"], size, lambda number, rank=rank: number % world == rank)
    parts.sort(key=lambda part: part.number)
    assert [part.number for part in parts] == list(range(-(-count // size)))
    assert all(part.first_row == part.number * size and len(part) <= size for part in parts)
    assert [text for part in parts for text in part.columns["text"]] == [f"number {i}" for i in range(count)]
    assert [int(value) for part in parts for value in part.columns["id"]] == list(range(count))


def test_groups_without_a_row(tmp_path):
    table = pa.table({"text": list("abcde")})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for start, stop in ((0, 0), (0, 3), (3, 3), (3, 5), (5, 5)):
            writer.write_table(table.slice(start, stop - start))
    assert rows_of(InputFile(tmp_path / "a.parquet")) == [["a", "b"], ["c", "d"], ["e"]]


def rows_of(file, size=2, limit=1000):
    return [chunk.columns["text"] for chunk in file.chunks(["text"], size, lambda _: True, limit)]


@pytest.mark.parametrize("text", ['[{"text": "a"}, {"text": "b"}]', '\n[\n{"text":\n"a"},\n{"text": "b"}]\n'])
def test_an_array_of_rows(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    file = InputFile(tmp_path / "a.json")
    assert rows_of(file) == [["a", "b"]] and list(file.fields()) == ["text"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_a_large_file_is_never_held(tmp_path, name):
    path, text, rows = tmp_path / name, "x" * 2000, 20_000
    if name == "a.parquet":
        table = pa.table({"text": [text] * rows})
        pq.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="none")
        del table
    else:
        line = json.dumps({"text": text}) if name == "a.jsonl" else text
        path.write_text("\n".join([*(["text"] if name == "a.csv" else []), *[line] * rows]))
    assert path.stat().st_size > 40e6
    (file,) = InputFile.find([str(path)])
    tracemalloc.start()
    seen, arrow = 0, 0
    for chunk in file.chunks(["text"], 500, lambda number: number % 2 == 0):
        seen += len(chunk)
        arrow = max(arrow, pa.total_allocated_bytes())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == rows // 2 and peak < 8e6 and arrow < 10e6


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"text": "a"}\n["text"]', "row 1"),
        ("a.csv", b"text,label\na,0\nI say, no,1\n", "row 1"),
        ("a.csv", b"text,label,text\na,0,b\n", "2 columns 'text'"),
        ("b.parquet", b"PAR1 and nothing else", r"b\.parquet"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProbeError, match=words):
        rows_of(*InputFile.find([str(tmp_path / name)]))
    with pytest.raises(ProbeError, match="nothing-here"):
        InputFile.find(["nothing-here*.parquet"])


def test_a_column_of_a_parquet_file_that_is_there_twice(tmp_path):
    pq.write_table(pa.Table.from_arrays([["a"], ["b"]], ["text", "text"]), tmp_path / "a.parquet")
    for read in (rows_of, InputFile.read, InputFile.fields):
        with pytest.raises(ProbeError, match="'text'"):
            read(InputFile(tmp_path / "a.parquet"))


def test_patterns_and_files_named_twice(tmp_path):
    names = [str(write(tmp_path / name, 2)) for name in ("b.jsonl", "a.jsonl")]
    found = InputFile.find([f"{tmp_path}/*.jsonl", names[1]])
    assert [str(file.path) for file in found] == names[::-1]


def bomb(path):
    """Write a small file of which a chunk, or a text, takes 160 MB."""
    pieces = {
        "rows.jsonl.gz": [b'{"text": "' + b"x" * 200_000 + b'"}\n'] * 800,
        "text.jsonl.gz": [b'{"text": "', *[b"x" * 200_000] * 800, b'"}'],
        "columns.csv.gz": [b"text", *[b",x" * 100_000] * 800],
        "quotes.csv.gz": [b'text\n"', *[(b"x" * 199 + b"\n") * 1000] * 800, b'"\n'],
    }
    if path.suffix == ".parquet":
        text = pa.DictionaryArray.from_arrays(pa.array([0] * 800, pa.int32()), ["x" * 200_000])
        text = text if "dictionary" in path.name else text.dictionary_decode()
        pq.write_table(pa.table({"text": text}), path)
    else:
        with gzip.open(path, "wb", 1) as file:
            file.writelines(pieces[path.name])
    assert path.stat().st_size < 2e6
    return path


@pytest.mark.parametrize(
    "name", ["a.parquet", "dictionary.parquet", "rows.jsonl.gz", "text.jsonl.gz", "columns.csv.gz", "quotes.csv.gz"]
)
def test_small_files_that_unpack_to_much(tmp_path, name):
    file = InputFile(bomb(tmp_path / name))
    tracemalloc.start()
    with pytest.raises(ProbeError, match="max_text"):
        file.fields(max_text=200_000)
        rows_of(file, 2048, 200_000)
    with pytest.raises(ProbeError, match="max_text"):
        file.read(25_000)
    peak, arrow = tracemalloc.get_traced_memory()[1], pa.total_allocated_bytes()
    tracemalloc.stop()
    assert peak < 80e6 and arrow < 80e6


def test_a_limit_that_is_raised(tmp_path):
    file = InputFile(tmp_path / "a.jsonl")
    file.path.write_text("".join(json.dumps({"text": "x" * 600}) + "\n" for _ in range(200)))
    for size, limit in ((200, 1000), (10, 599)):
        with pytest.raises(ProbeError, match="max_text"):
            rows_of(file, size, limit)
    assert len(rows_of(file, 10)) == 20
    with pytest.raises(ProbeError, match="max_text"):
        file.read(100)
    assert len(file.read(1000)) == 200


def test_lengths_of_chats():
    check_length("row 0", [{"role": "user", "content": "x" * 6}], 10)
    for value in ("x" * 11, [{"role": "user", "content": "x" * 6}, {"role": "assistant", "content": "y"}]):
        with pytest.raises(ProbeError, match="row 0"):
            check_length("row 0", value, 10)
