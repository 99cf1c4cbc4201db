"""Jobs over files: streamed, several heads in a pass, exact where they go on."""

import csv
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_probe, save_head
from hypothesis import given, settings
from hypothesis import strategies as st
from launcher import environment, finish, torchrun
from transformers import AutoTokenizer

from llama_probe import ProbeError
from llama_probe.data.files import InputFile
from llama_probe.data.prompts import PromptFormat
from llama_probe.evaluation.scoring_job import MANIFEST_NAME, ScoringJob, TextScorer
from llama_probe.serving.modeling import ProbedGenerationMixin


def texts(count: int) -> list[str]:
    return [f"{'good' if i % 3 else 'bad'} number {i}{'!' * (i % 11)}" for i in range(count)]


def write(path, count: int, group: int = 7):
    """`text`, `id` and `weight` in the format that the name asks for."""
    columns = {"id": list(range(count)), "text": texts(count), "weight": [i / 2 for i in range(count)]}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=group)
    elif ".jsonl" in path.name:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write("\n\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    common = {"prompt_format": "chat", "token_scope": "prompt", "max_length": 64}
    mood = make_probe(1, probe_type="gate", id2label={0: "fine", 1: "awful"}, **common)
    topics = make_probe(
        2, probe_type="mha", id2label={0: "a", 1: "b", 2: "c"}, problem_type="multi_label_classification", **common
    )
    size = make_probe(3, probe_type="pooling", id2label={0: "size"}, problem_type="regression", **common)
    for name, head in (("mood", mood), ("topics", topics), ("size", size)):
        save_head(head, folder / name)
    return [str(folder / name) for name in ("mood", "topics", "size")]


def job(backbone_folder, heads, inputs, output, **changes) -> ScoringJob:
    values = {"backbone": str(backbone_folder), "chunk_rows": 5, **changes}
    return ScoringJob([str(path) for path in inputs], output, heads, **values)


def read(folder) -> list[dict]:
    """The whole folder, as readers of parquet folders find it."""
    rows = pq.read_table(folder).to_pylist()
    return sorted(rows, key=lambda row: (row["file"], row["row"]))


class TestInputFiles:
    @pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv"])
    @settings(max_examples=25, deadline=None)
    @given(count=st.integers(1, 40), size=st.integers(1, 45), group=st.integers(1, 45), world=st.integers(1, 4))
    def test_chunks_are_the_rows_each_once(self, tmp_path_factory, name, count, size, group, world):
        path = write(tmp_path_factory.mktemp("rows") / name, count, group)
        (file,) = InputFile.find([str(path)])
        parts = []
        for rank in range(world):
            parts += file.chunks(["text", "id"], size, lambda number, rank=rank: number % world == rank)
        parts.sort(key=lambda part: part.number)
        assert [part.number for part in parts] == list(range(-(-count // size)))
        assert all(part.first_row == part.number * size and len(part) <= size for part in parts)
        assert [text for part in parts for text in part.columns["text"]] == texts(count)
        assert [int(value) for part in parts for value in part.columns["id"]] == list(range(count))

    def test_groups_without_a_row(self, tmp_path):
        table = pa.table({"text": texts(5)})
        with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
            for start, stop in ((0, 0), (0, 3), (3, 3), (3, 5), (5, 5)):
                writer.write_table(table.slice(start, stop - start))
        (file,) = InputFile.find([str(tmp_path / "a.parquet")])
        assert [chunk.columns["text"] for chunk in file.chunks(["text"], 2, lambda _: True)] == [
            texts(5)[:2],
            texts(5)[2:4],
            texts(5)[4:],
        ]

    @pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
    def test_columns_that_are_there_twice(self, tmp_path, name):
        path = tmp_path / name
        if name == "a.csv":
            path.write_text("text,id,text\na,1,b\n")
        else:
            pq.write_table(pa.Table.from_arrays([["a"], [1], ["b"]], ["text", "id", "text"]), path)
        (file,) = InputFile.find([str(path)])
        assert list(file.fields(["id"])) == ["text", "id"]
        with pytest.raises(ProbeError, match=f"{name} has 2 columns 'text': leave one, or rename the others"):
            file.fields(["id", "text"])

    @pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
    def test_a_large_file_is_never_held(self, tmp_path, name):
        path, text, rows = tmp_path / name, "x" * 2000, 20_000
        if name == "a.parquet":
            schema = pa.schema([("text", pa.string())])
            with pq.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:
                for _ in range(20):
                    writer.write_table(pa.table({"text": [text] * (rows // 20)}, schema))
        else:
            line = json.dumps({"text": text}) if name == "a.jsonl" else text
            with path.open("w") as file:
                file.write("text\n" if name == "a.csv" else "")
                file.writelines(f"{line}\n" for _ in range(rows))
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

    def test_what_cannot_be_read(self, tmp_path):
        with pytest.raises(ProbeError, match="no file nothing-here"):
            InputFile.find(["nothing-here*.parquet"])
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(ProbeError, match="no known format"):
            InputFile.find([str(tmp_path / "a.txt")])
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ')
        with pytest.raises(ProbeError, match="row 1 is no JSON"):
            list(InputFile.find([str(tmp_path / "a.jsonl")])[0].chunks(["text"], 5, lambda _: True))
        for name in ("b.parquet", "b.jsonl.gz"):
            (tmp_path / name).write_bytes(b"PAR1 and nothing else")
            with pytest.raises(ProbeError, match=f"{name} cannot be read"):
                InputFile.find([str(tmp_path / name)])[0].fields()

    def test_patterns_and_files_named_twice(self, tmp_path):
        for name in ("b.jsonl", "a.jsonl"):
            write(tmp_path / name, 2)
        found = InputFile.find([f"{tmp_path}/*.jsonl", str(tmp_path / "a.jsonl")])
        assert [file.path.name for file in found] == ["a.jsonl", "b.jsonl"]


class TestScores:
    def test_chunked_is_whole_for_several_heads(self, tmp_path, backbone_folder, heads):
        inputs = [write(tmp_path / "a.parquet", 23), write(tmp_path / "b.jsonl.gz", 11)]
        done = job(backbone_folder, heads, inputs, tmp_path / "out", keep_columns=["id", "weight"]).execute()
        assert done["complete"] and done["rows"] == 34 and len(done["parts"]) == 5 + 3
        rows = read(tmp_path / "out")
        assert [(os.path.basename(row["file"]), row["row"]) for row in rows] == [
            *(("a.parquet", i) for i in range(23)),
            *(("b.jsonl.gz", i) for i in range(11)),
        ]
        whole = TextScorer(heads, str(backbone_folder))([*texts(23), *texts(11)])
        for i, row in enumerate(rows):
            assert row["id"] == row["row"] and row["weight"] == row["row"] / 2
            assert row["mood_label"] == whole["mood_label"][i] and row["topics_label"] == whole["topics_label"][i]
            assert row["mood_probabilities"] == pytest.approx(whole["mood_probabilities"][i], abs=1e-5)
            assert row["size_values"] == pytest.approx(whole["size_values"][i], abs=1e-4)
            assert sum(row["mood_probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert len({round(row["mood_probabilities"]["awful"], 5) for row in rows}) > 10, "or any order would pass"
        assert json.loads((tmp_path / "out" / MANIFEST_NAME).read_text()) == done

    def test_rows_without_a_text(self, tmp_path, backbone_folder, heads):
        (tmp_path / "a.jsonl").write_text(
            "\n".join(map(json.dumps, [{"text": "a b"}, {"text": None}, {"text": "  "}, {}]))
        )
        job(backbone_folder, heads[:1], [tmp_path / "a.jsonl"], tmp_path / "out").execute()
        rows = read(tmp_path / "out")
        assert [row["mood_label"] is None for row in rows] == [False, True, True, True]
        assert rows[1]["mood_probabilities"] is None

    def test_rows_whose_scores_are_no_numbers(self, tmp_path, backbone_folder, heads, monkeypatch, caplog):
        """One among millions is no reason to score none; in the file it is empty, and a warning says which row it is."""

        def overflowing(model, input_ids, **kwargs):
            outputs = classify(model, input_ids=input_ids, **kwargs)
            outputs["mood"].logits[(input_ids == token).any(dim=1), 0] = float("nan")
            return outputs

        classify = ProbedGenerationMixin.classify
        token = AutoTokenizer.from_pretrained(backbone_folder)("#", add_special_tokens=False).input_ids[-1]
        rows = [{"text": text} for text in (*texts(5), "#", None, *texts(3), "and #")]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        monkeypatch.setattr(ProbedGenerationMixin, "classify", overflowing)
        with caplog.at_level("WARNING"):
            job(backbone_folder, heads[:2], [tmp_path / "a.jsonl"], tmp_path / "out", chunk_rows=6).execute()
        rows = read(tmp_path / "out")
        assert [row["row"] for row in rows if row["mood_label"] is None] == [5, 6, 10]
        assert [row["row"] for row in rows if row["mood_probabilities"] is None] == [5, 6, 10]
        assert [row["row"] for row in rows if row["topics_label"] is None] == [6], (
            "the other head's scores are numbers"
        )
        assert all(math.isfinite(score) for row in rows for score in (row["mood_probabilities"] or {}).values())
        told = [record.message for record in caplog.records if "left empty" in record.message]
        assert (
            len(told) == 2
            and "mood_label, mood_probabilities left empty for 1 rows (5)" in told[0]
            and "(10)" in told[1]
        )

    def test_a_text_with_half_of_a_character(self, tmp_path, backbone_folder, heads):
        (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n{"text": "half \\ud83d"}')
        with pytest.raises(ProbeError, match=r"a\.jsonl: row 1: text must be a text or chat messages, not 'half"):
            job(backbone_folder, heads[:1], [tmp_path / "a.jsonl"], tmp_path / "out").execute()

    def test_a_template_that_no_head_reads_is_run_once(self, tmp_path, backbone_folder):
        """Heads that leave it out, each in its own way; and some that read it, beside which all is run."""
        tokenizer = AutoTokenizer.from_pretrained(backbone_folder)
        fields = PromptFormat.create(tokenizer).config_fields()
        for name, changes in (
            ("mood", {"probe_type": "gate", "token_scope": "content"}),
            ("last", {"probe_type": "last", "token_scope": "prompt"}),
            ("whole", {"probe_type": "mha", "token_scope": "prompt"}),
        ):
            save_head(make_probe(5, id2label={0: "no", 1: "yes"}, **fields | changes), tmp_path / name)
        found, ran = {}, {}
        several = [*texts(12), "\nwith a break before it", "x" * 90]
        for names in (("mood", "last"), ("mood", "last", "whole")):
            scorer, widths = TextScorer([str(tmp_path / name) for name in names], str(backbone_folder)), []
            scorer.model.model.layers[0].register_forward_hook(
                lambda m, a, out, w=widths: w.append(out[..., 0].numel())
            )
            found[names], ran[names] = scorer(several), sum(widths)
        for column in ("mood_probabilities", "last_probabilities"):
            for shared, alone in zip(*(each[column] for each in found.values()), strict=True):
                assert shared == pytest.approx(alone, abs=1e-5)
        rows, prefix = len(several), len(fields["prefix_ids"])
        assert ran["mood", "last"] == ran["mood", "last", "whole"] - (rows - 1) * prefix

    @pytest.mark.parametrize("scope", ["response", "all"])
    def test_replies(self, tmp_path, backbone_folder, scope):
        head = make_probe(4, probe_type="gate", token_scope=scope, prompt_format="chat", id2label={0: "no", 1: "yes"})
        save_head(head, tmp_path / "guard")
        rows = [{"ask": f"is it {i}?", "text": f"it is {i}" if i != 2 else ""} for i in range(4)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings = {"prompt_column": "ask", "chunk_rows": 3}
        job(backbone_folder, [str(tmp_path / "guard")], [tmp_path / "a.jsonl"], tmp_path / "out", **settings).execute()
        found = read(tmp_path / "out")
        chats = [
            [{"role": "user", "content": row["ask"]}, {"role": "assistant", "content": row["text"]}] for row in rows
        ]
        scorer = TextScorer([str(tmp_path / "guard")], str(backbone_folder))
        for i in (0, 1, 3):
            alone = scorer([chats[i]])["guard_probabilities"][0]
            assert found[i]["guard_probabilities"] == pytest.approx(alone, abs=1e-5)
        assert found[2]["guard_label"] is None, "there is no reply"

    @pytest.mark.parametrize(
        "row, words",
        [
            ({"ask": 1, "text": "a"}, "row 1: ask must be a text or chat messages, not '1'"),
            ({"ask": ["hi"], "text": "a"}, "row 1: ask must be a text or chat messages, not"),
            (
                {"ask": [{"role": "user", "content": None}], "text": "a"},
                "row 1: ask must be a text or chat messages, not",
            ),
            ({"ask": "hi", "text": 1}, "row 1: text must be a text, as the reply to a prompt, not '1'"),
        ],
    )
    def test_prompts_and_replies_that_are_none(self, tmp_path, row, words):
        rows = [{"ask": "", "text": "a"}, row]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        scoring = ScoringJob([str(tmp_path / "a.jsonl")], tmp_path / "out", [], prompt_column="ask")
        (file,) = InputFile.find(scoring.inputs)
        (chunk,) = file.chunks(["ask", "text"], 2, lambda _: True)
        with pytest.raises(ProbeError, match=words):
            scoring._texts(file, chunk)

    def test_heads_that_read_other_prompts(self, tmp_path, backbone_folder, heads):
        other = make_probe(probe_type="gate", prompt_format="raw", token_scope="prompt", max_length=64)
        save_head(other, tmp_path / "raw")
        with pytest.raises(
            ProbeError, match="'mood' and 'raw' cannot share a pass: prompt_format is 'chat' and 'raw'"
        ):
            TextScorer([heads[0], str(tmp_path / "raw")], str(backbone_folder))

    def test_columns_that_are_not_there_or_change(self, tmp_path, backbone_folder, heads):
        path = write(tmp_path / "a.parquet", 3)
        with pytest.raises(ProbeError, match=r"no column 'body'; it has: id, text, weight"):
            job(backbone_folder, heads, [path], tmp_path / "out", text_column="body").execute()
        lines = [{"text": "a", "id": 1}] * 1200 + [{"text": "b", "id": "two"}]
        (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(ProbeError, match=r"b.jsonl: rows 1200 to 1200: the column 'id' holds what is no int64"):
            job(
                backbone_folder,
                heads[:1],
                [tmp_path / "b.jsonl"],
                tmp_path / "o",
                keep_columns=["id"],
                chunk_rows=1200,
            ).execute()
        with pytest.raises(ProbeError, match=r"must be a text or chat messages, not '[0-9]"):
            job(backbone_folder, heads[:1], [path], tmp_path / "p", text_column="id").execute()

    def test_whole_numbers_of_more_than_64_bits_are_kept_as_texts(self, tmp_path, backbone_folder, heads):
        ids = [3, None, 10**20, -(2**80)]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": "a", "id": number}) for number in ids))
        job(backbone_folder, heads[:1], [path], tmp_path / "out", keep_columns=["id"]).execute()
        assert [row["id"] for row in read(tmp_path / "out")] == ["3", None, str(10**20), str(-(2**80))]
        path.write_text("\n".join(json.dumps({"text": "a", "id": number}) for number in [1] * 1000 + ids))
        with pytest.raises(ProbeError, match=r"rows 1000 to 1003: the column 'id' holds what is no int64"):
            job(backbone_folder, heads[:1], [path], tmp_path / "o", keep_columns=["id"], chunk_rows=1000).execute()


class TestGoingOn:
    def test_what_is_done_stays_and_the_rest_is_done(self, tmp_path, backbone_folder, heads):
        inputs = [write(tmp_path / "a.parquet", 23), write(tmp_path / "b.csv", 11)]
        output = tmp_path / "out"
        whole = job(backbone_folder, heads, inputs, output).execute()
        before = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
        expected = read(output)
        lost = ["part-00000-0000003.parquet", "part-00001-0000000.parquet"]
        for name in lost:
            (output / name).unlink()
        (output / ".part-00000-0000003.parquet.x.tmp").write_bytes(b"half")
        manifest = json.loads((output / MANIFEST_NAME).read_text())
        for name in ("rows", "parts"):
            del manifest[name]
        (output / MANIFEST_NAME).write_text(json.dumps({**manifest, "complete": False}))
        with pytest.raises(ProbeError, match="holds a scoring job already: go on with --resume"):
            job(backbone_folder, heads, inputs, output).execute()
        assert job(backbone_folder, heads, inputs, output, resume=True).execute() == whole
        assert read(output) == expected and not list(output.glob(".*"))
        after = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
        assert {name for name in after if after[name] != before[name]} == set(lost)
        assert job(backbone_folder, heads, inputs, output, resume=True).execute() == whole, "nothing is left to do"

    def test_another_job_is_refused(self, tmp_path, backbone_folder, heads):
        path, output = write(tmp_path / "a.jsonl", 7), tmp_path / "out"
        job(backbone_folder, heads[:2], [path], output).execute()
        more = write(tmp_path / "b.jsonl", 3)
        for changes, words in (
            ({"chunk_rows": 4}, "chunk_rows=5, now 4"),
            ({"heads": heads[:1]}, r"other heads \(topics\)"),
            ({"inputs": [path, more]}, "b.jsonl was not there"),
        ):
            values = {"heads": heads[:2], "inputs": [path], "output": output, "resume": True, **changes}
            with pytest.raises(ProbeError, match=words):
                job(backbone_folder, **values).execute()
        write(path, 8)
        with pytest.raises(ProbeError, match=r"a.jsonl has changed"):
            job(backbone_folder, heads[:2], [path], output, resume=True).execute()
        (tmp_path / "other").mkdir()
        pq.write_table(pa.table({"x": [1]}), tmp_path / "other" / "part-1.parquet")
        with pytest.raises(ProbeError, match=r"holds part-1\.parquet of something else"):
            job(backbone_folder, heads[:2], [path], tmp_path / "other").execute()

    def test_two_processes_one_killed_then_one_alone(self, tmp_path, backbone_folder, heads):
        """`llama-probe classify` under torchrun; it goes on with another number of processes."""
        inputs = [write(tmp_path / f"{name}.parquet", 150) for name in "ab"]
        output = tmp_path / "out"
        arguments = [
            "-m", "llama_probe.cli", "classify", "--probe", heads[0], "--backbone", backbone_folder, "--input", *inputs,
            "--output", output, "--chunk-rows", 2, "--keep-column", "id", "--resume", "--json",
        ]  # fmt: skip
        process = torchrun(*arguments)
        deadline = time.monotonic() + 200
        while len(list(output.glob("part-*"))) < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        (victim,) = [c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1"]
        victim.send_signal(signal.SIGKILL)
        stopped = finish(process, 60)
        assert stopped.returncode != 0 and "give the same command with --resume to go on" in stopped.stderr
        finished = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
        assert 10 <= len(finished) < 150
        assert not json.loads((output / MANIFEST_NAME).read_text())["complete"]
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        manifest = json.loads(done.stdout)
        assert manifest["rows"] == 300 and len(manifest["parts"]) == 150
        assert all((output / name).stat().st_mtime_ns == changed for name, changed in finished.items())
        assert [row["id"] for row in read(output)] == [*range(150)] * 2, "no row twice, none left out"

    def test_two_processes_do_half_each(self, tmp_path, backbone_folder, heads):
        path = write(tmp_path / "a.jsonl", 20)
        done = finish(
            torchrun(
                "-m", "llama_probe.cli", "classify", path, "--probe", heads[0], "--probe", heads[1], "--backbone",
                backbone_folder, "--input", write(tmp_path / "b.jsonl", 3), "--output", tmp_path / "two",
                "--chunk-rows", 5,
            )
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("23 rows in 5 files") == 1
        job(backbone_folder, heads[:2], [tmp_path / "b.jsonl", path], tmp_path / "one").execute()
        assert read(tmp_path / "two") == read(tmp_path / "one")
