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
from llama_probe.data.row_files import InputFile, check_length


def write(path, count: int, group: int = 7, text: str = "number {}"):
    """Write `id` and `text` in the format of the name."""
    rows = [{"id": i, "text": text.format(i)} for i in range(count)]
    if path.suffix == ".parquet":
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, path, row_group_size=group, use_dictionary=False, compression="none")
        return path
    lines = "\n\n".join(map(json.dumps, rows))
    if path.suffix == ".csv":
        lines = "\n".join(["id,text", *(f"{row['id']},{row['text']}" for row in rows)])
    elif path.suffix == ".json":
        lines = "\n" + json.dumps(rows, indent=1)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl", "a.jsonl.gz", "a.csv"])
@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 45), group=st.integers(1, 45))
def test_chunks_are_the_rows_each_once(tmp_path_factory, name, count, size, group):
    path = write(tmp_path_factory.mktemp("rows") / name, count, group)
    (file,) = InputFile.find([str(path)])
    assert list(file.fields()) == ["id", "text"]
    parts = list(file.chunks(["text", "id"], size))
    assert [rows for rows, _ in parts] == [range(i, min(i + size, count)) for i in range(0, count, size)]
    assert [text for _, part in parts for text in part["text"]] == [f"number {i}" for i in range(count)]
    assert [int(value) for _, part in parts for value in part["id"]] == list(range(count))


def rows_of(file, size=2):
    return [columns["text"] for _, columns in file.chunks(["text"], size)]


def test_csv_cells_are_texts(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufefftext,n\r\n007,\r\n\r\n"a,\n""b""",1\r\nshort\r\n'.encode())
    rows = [{"text": "007", "n": ""}, {"text": 'a,\n"b"', "n": "1"}, {"text": "short", "n": None}]
    assert list(InputFile(tmp_path / "a.csv")) == rows


def peaks_of(call) -> tuple[int, int]:
    """Return the most bytes that Python holds during a call, and those of pyarrow at its end."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, pa.total_allocated_bytes()


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_a_large_file_is_never_held(tmp_path, name):
    path, sizes, arrow = write(tmp_path / name, 8000, 500, "x" * 2000), [], []

    def read():
        for rows, _ in InputFile(path).chunks(["text"], 500):
            sizes.append(len(rows))
            arrow.append(pa.total_allocated_bytes())

    assert peaks_of(read)[0] < 8e6 < 16e6 < path.stat().st_size
    assert sum(sizes) == 8000 and max(arrow) < 8e6


GOOD = '{"text": "a"}\n' * 3


@pytest.mark.parametrize(
    "name, content, row, words",
    [
        ("a.jsonl", GOOD + '["text"]', 3, "must be a JSON object"),
        ("a.jsonl", GOOD + "{", 3, "Expecting"),
        ("a.jsonl", GOOD + '{"text": ' + "[" * 99_999, 3, "recursion"),
        ("a.jsonl", (GOOD + '{"text": "é"}').encode("cp1252"), 3, "0xe9.*UTF-8"),
        ("a.json", '[{"text": "a"}, 1]', 1, "must be a JSON object"),
        ("a.csv", "text,label\na,0\nI say, no,1\n", 1, "more cells than the header"),
        ("a.csv", "text,label,text\na,0,b\n", 0, "2 columns 'text'"),
        ("a.csv", 'label,text\n0,a\n1,"he said stop\n0,b\n0,c\n', 1, "unexpected end"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], 3, "end-of-stream"),
        ("a.parquet", b"PAR1 and nothing else", 0, ""),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_the_row(tmp_path, name, content, row, words):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ProbeError, match=rf"{name}: row {row} cannot be read: .*{words}") as refused:
        rows_of(InputFile(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_a_column_of_a_parquet_file_that_is_there_twice(tmp_path):
    pq.write_table(pa.Table.from_arrays([["a"], ["b"]], ["text", "text"]), tmp_path / "a.parquet")
    for read in (rows_of, list, InputFile.fields):
        with pytest.raises(ProbeError, match="'text'"):
            read(InputFile(tmp_path / "a.parquet"))


def test_patterns_and_files_named_twice(tmp_path):
    names = [str(write(tmp_path / name, 2)) for name in ("b.jsonl", "a.jsonl")]
    found = InputFile.find([f"{tmp_path}/*.jsonl", names[1]])
    assert [str(file.path) for file in found] == names[::-1]
    for pattern, words in (("nothing-here*.parquet", "nothing-here"), (__file__, r"no known format; allowed: \.json")):
        with pytest.raises(ProbeError, match=words):
            InputFile.find([pattern])


# Small files of which a chunk, or a text, takes 16 MB.
BOMBS = {
    "rows.jsonl.gz": [b'{"text": "' + b"x" * 20_000 + b'"}\n'] * 800,
    "text.jsonl.gz": [b'{"text": "', *[b"x" * 20_000] * 800, b'"}'],
    "quotes.csv.gz": [b'text\n"', *[(b"x" * 199 + b"\n") * 100] * 800, b'"\n'],
    "array.json.gz": [b"[", *[b'{"text": "' + b"x" * 2000 + b'"},\n'] * 8000],
    "plain.parquet": [],
    "dictionary.parquet": [],
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_unpack_to_much(tmp_path, name):
    if name.endswith(".parquet"):
        text = pa.DictionaryArray.from_arrays(pa.array([0] * 800, pa.int32()), ["x" * 20_000])
        pq.write_table(pa.table({"text": text if "dictionary" in name else text.dictionary_decode()}), tmp_path / name)
    else:
        with gzip.open(tmp_path / name, "wb", 1) as file:
            file.writelines(BOMBS[name])
    assert (tmp_path / name).stat().st_size < 3e5
    file = InputFile(tmp_path / name, 5000 if name == "array.json.gz" else 20_000)

    def refuse():
        with pytest.raises(ProbeError, match=r"max_text|field larger"):
            file.fields()
            rows_of(file, 2048)

    peak, arrow = peaks_of(refuse)
    assert peak < 9e6 and arrow < 8e6


def test_limits_that_are_raised(tmp_path):
    file = InputFile(tmp_path / "a.jsonl", 1000)
    file.path.write_text("".join(json.dumps({"text": "x" * 600}) + "\n" for _ in range(200)))
    for size, limit, words in ((200, 1000, "a chunk of rows"), (10, 599, "row 0: text")):
        with pytest.raises(ProbeError, match=f"{words} .*max_text"):
            rows_of(InputFile(file.path, limit), size)
    assert len(rows_of(file, 10)) == 20
    chat = [{"role": "user", "content": "x" * 6}, {"role": "assistant", "content": "y" * 4}]
    check_length("row 0", chat, 23)  # with the roles
    with pytest.raises(ProbeError, match="row 0"):
        check_length("row 0", chat, 22)
