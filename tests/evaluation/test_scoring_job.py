"""Jobs over files: streamed, several heads in a pass, exact when they resume."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_probe, with_novelty
from launcher import finish, kill_rank, torchrun
from transformers import AutoTokenizer

from llama_probe import ProbeError
from llama_probe.backbone.loading import load_backbone
from llama_probe.data.prompts import PromptFormat, exchange
from llama_probe.evaluation.prediction import follow_replies, predict_logits
from llama_probe.evaluation.scoring_job import MANIFEST_NAME, ScoringJob, TextScorer
from llama_probe.heads.decision import probabilities
from llama_probe.serving.modeling import ProbedGenerationMixin


def texts(count: int) -> list[str]:
    return [f"{'good' if i % 3 else 'bad'} number {i}{'!' * (i % 11)}" for i in range(count)]


def write(path, rows: int | list[dict]):
    """Write rows, or that many with `text`, `id` and `weight`, as json lines or parquet."""
    if isinstance(rows, int):
        rows = [{"text": text, "id": i, "weight": i / 2} for i, text in enumerate(texts(rows))]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    fields = {
        "mood": {"probe_type": "gate", "id2label": {0: "fine", 1: "awful"}},
        "topics": {"probe_type": "mha", "num_labels": 3, "problem_type": "multi_label_classification"},
        "size": {"probe_type": "pooling", "id2label": {0: "size"}, "problem_type": "regression"},
    }
    for seed, (name, own) in enumerate(fields.items()):
        common = {"prompt_format": "chat", "token_scope": "prompt", "max_length": 64}
        head = make_probe(seed, **common, **own)
        (with_novelty(head) if name == "topics" else head).save_pretrained(folder / name)
    return [str(folder / name) for name in fields]


@pytest.fixture
def run(backbone_folder, heads, tmp_path):
    def run(*inputs, output="out", probes=heads, **changes):
        values = {"backbone": str(backbone_folder), "chunk_rows": 5, **changes}
        return ScoringJob([str(path) for path in inputs], tmp_path / output, probes, **values).execute()

    return run


def read(folder) -> list[dict]:
    """Read the whole folder as readers of parquet folders do."""
    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: (row["file"], row["row"]))


def test_chunked_is_whole_for_several_heads(tmp_path, backbone_folder, heads, run):
    inputs = [write(tmp_path / "a.parquet", 23), write(tmp_path / "b.jsonl", 11)]
    done = run(*inputs, keep_columns=["id", "weight"])
    assert done["complete"] and done["rows"] == 34 and len(done["parts"]) == 5 + 3
    assert json.loads((tmp_path / "out" / MANIFEST_NAME).read_text()) == done
    rows = read(tmp_path / "out")
    assert [row["row"] for row in rows] == [*range(23), *range(11)]
    assert [row["file"] for row in rows] == [str(inputs[0])] * 23 + [str(inputs[1])] * 11
    whole = TextScorer(heads, str(backbone_folder))([*texts(23), *texts(11)])
    for i, row in enumerate(rows):
        assert row["id"] == row["row"] and row["weight"] == row["row"] / 2
        assert row["mood_label"] == whole["mood_label"][i] and row["topics_label"] == whole["topics_label"][i]
        assert row["mood_probabilities"] == pytest.approx(whole["mood_probabilities"][i], abs=1e-5)
        assert row["size_values"] == pytest.approx(whole["size_values"][i], abs=1e-4)
        assert row["topics_novelty"] == pytest.approx(whole["topics_novelty"][i], abs=1e-4)
        assert 0 <= row["topics_novelty"] <= 1 and "mood_novelty" not in row
    assert len({round(row["mood_probabilities"]["awful"], 5) for row in rows}) > 10, "or any order would pass"


def test_rows_without_a_number_are_left_empty(tmp_path, backbone_folder, heads, run, monkeypatch, caplog):
    """A blank text is not scored. A text whose logits overflow does not stop the job, and a warning names its row."""

    def overflowing(model, input_ids, **kwargs):
        outputs = classify(model, input_ids=input_ids, **kwargs)
        outputs["mood"].logits[(input_ids == token).any(dim=1), 0] = float("nan")
        return outputs

    classify = ProbedGenerationMixin.classify
    token = AutoTokenizer.from_pretrained(backbone_folder)("#", add_special_tokens=False).input_ids[-1]
    monkeypatch.setattr(ProbedGenerationMixin, "classify", overflowing)
    lines = [{"text": text, "id": 10**20} for text in (*texts(5), "#", None, "  ", "a", "and #")]
    with caplog.at_level("WARNING"):
        run(write(tmp_path / "a.jsonl", [*lines, {}]), probes=heads[:2], chunk_rows=6, keep_columns=["id"])
    rows = read(tmp_path / "out")
    assert [row["id"] for row in rows] == [str(10**20)] * 10 + [None], "more than 64 bits are kept as texts"
    for column, empty in (("mood_label", [5, 6, 7, 9, 10]), ("topics_probabilities", [6, 7, 10])):
        assert [row["row"] for row in rows if row[column] is None] == empty
    assert all(math.isfinite(score) for row in rows for score in (row["mood_probabilities"] or {}).values())
    first, second = [record.message for record in caplog.records if "left empty" in record.message]
    assert "mood_label, mood_probabilities" in first and "(5)" in first and "(9)" in second


@pytest.mark.parametrize("scope", ["response", "all"])
def test_replies(tmp_path, backbone_folder, heads, run, scope):
    """They count by their largest scores, as where thresholds are fitted and measured."""
    fields = {"probe_type": "gate", "prompt_format": "chat", "id2label": {0: "no", 1: "yes"}, "flagged": ["yes"]}
    head = make_probe(4, token_scope=scope, **fields)
    head.save_pretrained(tmp_path / "guard")
    guard = [str(tmp_path / "guard")]
    rows = [{"ask": f"is it {i}?", "text": f"it is {i}" if i != 2 else ""} for i in range(4)]
    run(write(tmp_path / "a.jsonl", rows), probes=guard, prompt_column="ask", chunk_rows=3)
    found, (lm, tokenizer) = read(tmp_path / "out"), load_backbone(str(backbone_folder))
    head.set_backbone(lm)
    replies = [0, 1, 3]
    chats = [exchange(rows[i]["ask"], rows[i]["text"]) for i in replies]
    dataset = PromptFormat.from_config(head.config, tokenizer).encode_for(head.config, chats)
    expected = probabilities(predict_logits(head, dataset), head.config)[:, 1].tolist()
    assert [found[i]["guard_probabilities"]["yes"] for i in replies] == pytest.approx(expected, abs=1e-5)
    (followed,) = follow_replies([head], dataset)
    last = probabilities(torch.stack([scores[-1] for scores in followed]), head.config)[:, 1].tolist()
    assert expected != pytest.approx(last, abs=1e-3), "or any score would pass"
    assert found[2]["guard_label"] is None, "there is no reply"
    unfinished = [chats[0][:1], [*chats[0][:1], {"role": "assistant", "content": " "}]]
    columns = TextScorer(guard, str(backbone_folder))([*unfinished, chats[0]])["guard_label"]
    assert columns == [None, None, found[0]["guard_label"]]
    with pytest.raises(ProbeError, match=r"guard.*mood"):
        TextScorer([heads[0], *guard], str(backbone_folder))


def changing(first, last):
    """Return rows with a column `of` that has another value in the second chunk, behind those that its type is of."""
    return [{"text": "a", "of": first}] * 200 + [{"text": "a", "of": last}]


OF, ASK = {"keep_columns": ["of"]}, {"prompt_column": "ask"}


@pytest.mark.parametrize(
    "rows, changes, words",
    [
        ([{"body": "a"}], {}, "no column 'text'"),
        ([{"text": "whole"}, {"text": "half \ud83d"}], {}, "row 1: text"),
        (changing(1, "two"), OF, "column 'of'"),
        (changing(1, 2.9), OF, "column 'of'.*fraction"),
        (changing([{"id": 1}], [{"id": 1, "name": "b"}]), OF, "'of'"),
        ([{"text": "a", "row": 1}], {"keep_columns": ["row"]}, "keep_columns.* row"),
        ([{"text": "a", "ask": "b"}, {"text": 1, "ask": "b"}], ASK, "row 1: text"),
        ([{"text": "a", "ask": ""}, {"text": "a", "ask": ["hi"]}], ASK, "row 1: ask"),
    ],
)
def test_rows_and_columns_that_are_refused(tmp_path, heads, run, rows, changes, words):
    with pytest.raises(ProbeError, match=words):
        run(write(tmp_path / "a.jsonl", rows), probes=heads[:1], chunk_rows=200, **changes)


def test_a_column_that_begins_with_nothing_is_text(tmp_path, heads, run):
    rows = [{"text": "a", "of": None}] * 300 + [{"text": [], "of": 2.5}, {"text": "a", "of": 3}]
    rows = [row | {"more": {}} for row in rows] + [{"text": "a", "more": {"n": [1]}}]
    run(write(tmp_path / "a.jsonl", rows), probes=heads[:1], keep_columns=["of", "more"], chunk_rows=1000)
    kept = [(row["of"], row["more"]) for row in read(tmp_path / "out")[299:]]
    assert kept == [(None, "{}"), ("2.5", "{}"), ("3", "{}"), (None, '{"n": [1]}')]
    empty, full = (write(tmp_path / f"{of}.parquet", [{"text": "a", "of": of}]) for of in (None, 4))
    run(empty, full, probes=heads[:1], keep_columns=["of"], output="typed")
    assert [row["of"] for row in read(tmp_path / "typed")] == [4, None], "parquet has a type without values"


def test_what_is_done_stays_and_the_rest_is_done(tmp_path, run):
    inputs, output = [write(tmp_path / "a.parquet", 23), write(tmp_path / "b.jsonl", 11)], tmp_path / "out"
    whole, expected = run(*inputs), read(output)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    lost = {"part-00000-0000003.parquet", "part-00001-0000000.parquet"}
    for name in lost:
        (output / name).unlink()
    (output / ".new-files.x.tmp").mkdir()
    (output / ".new-files.x.tmp" / "part-00000-0000003.parquet").write_bytes(b"half")
    begun = {name: whole[name] for name in ("format", "inputs", "settings")}
    (output / MANIFEST_NAME).write_text(json.dumps({**begun, "complete": False}))
    with pytest.raises(ProbeError, match="--resume"):
        run(*inputs)
    assert run(*inputs, resume=True) == whole
    assert read(output) == expected and not list(output.glob(".*"))
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert {name for name in after if after[name] != before[name]} == lost
    assert run(*inputs, resume=True) == whole, "nothing is left to do"


def test_another_job_is_refused(tmp_path, heads, run):
    one, more = write(tmp_path / "a.jsonl", 7), write(tmp_path / "b.jsonl", 3)
    run(one, more, probes=heads[:2])

    def refuse(words, *inputs, **changes):
        with pytest.raises(ProbeError, match=words):
            run(*inputs, **{"probes": heads[:2], "resume": True, **changes})

    refuse(r"chunk_rows=5 \(now 4\)", one, more, chunk_rows=4)
    refuse("heads=", one, more, probes=heads[:1])
    refuse("heads=", one, more, probes=heads[1::-1])
    refuse("inputs=", more, one)
    write(one, 8)
    refuse("inputs=", one, more)
    (tmp_path / "out" / MANIFEST_NAME).write_text("[]")
    refuse("damaged", one, more)
    (tmp_path / "other").mkdir()
    refuse(r"part-1\.parquet", one, output=write(tmp_path / "other" / "part-1.parquet", 1).parent)


@pytest.mark.slow
def test_two_processes_one_killed_then_one_alone(tmp_path, backbone_folder, heads, run):
    inputs = [write(tmp_path / f"{name}.parquet", 100) for name in "ab"]
    output = tmp_path / "out"
    process = torchrun(
        "-m", "llama_probe.cli", "classify", "--probe", heads[0], "--backbone", backbone_folder, "--output", output,
        "--input", inputs[0], "--input", inputs[1], "--chunk-rows", 2, "--keep-column", "id", "--resume",
    )  # fmt: skip
    kill_rank(process, lambda: len(list(output.glob("part-*"))) >= 10)
    stopped = finish(process, 60)
    assert stopped.returncode != 0
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 10 <= len(finished) < 100
    assert not json.loads((output / MANIFEST_NAME).read_text())["complete"]
    manifest = run(*inputs, probes=heads[:1], chunk_rows=2, keep_columns=["id"], resume=True)
    assert manifest["rows"] == 200 and len(manifest["parts"]) == 100
    assert all((output / name).stat().st_mtime_ns == changed for name, changed in finished.items())
    assert [row["id"] for row in read(output)] == [*range(100)] * 2, "no row twice, none left out"
