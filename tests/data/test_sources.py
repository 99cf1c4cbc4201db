"""One source of rows: where it is found, which of its rows are taken, and what their labels are."""

import json

import pytest

from llama_probe import ProbeError
from llama_probe.data.sources import Source, allows_commercial_use
from llama_probe.data.texts import Labels


def write(path, rows, labels=2):
    """Write rows, or so many, as JSON lines."""
    if isinstance(rows, int):
        rows = [{"text": f"{('bad', 'good', 'so so')[i % labels]} no {i}", "label": i % labels} for i in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


HARM = Labels(names=["harmless", "harmful"], flagged=["harmful"])
ROWS = [
    {
        "q": f"text {i}",
        "kind": ("yes", "no", "unsure")[i % 3],
        "of": "ab"[i % 2],
        "terms": ("MIT", "CC BY-NC 4.0")[i % 2],
    }
    for i in range(30)
]
MAPPED = {
    "text_column": "q",
    "label_column": "kind",
    "label_map": {"yes": "harmful", "no": "harmless", "unsure": None},
}


class TestPlace:
    def test_a_hub_data_set_or_its_local_copy(self, tmp_path):
        write(tmp_path / "prompts" / "train.jsonl", ROWS)
        write(tmp_path / "prompts" / "more.jsonl", ROWS[:10])
        source = Source(rows="someone/prompts@abc:main:train", **MAPPED)
        assert source.name == "prompts" and source.find() is source, "nothing is asked of the Hub yet"
        assert len(source.read(HARM, tmp_path)) == 20
        assert len(Source(rows="someone/prompts::more", name="m", **MAPPED).read(HARM, tmp_path)) == 7
        with pytest.raises(ProbeError, match=r"other/SPLIT\.jsonl\.gz"):
            Source(rows="someone/other").find(tmp_path)

    def test_a_name_alone_needs_a_folder_of_copies(self, tmp_path):
        source = Source(rows="prompts", **MAPPED)
        with pytest.raises(ProbeError, match=r"--data-dir.*prompts/SPLIT\.jsonl\.gz"):
            source.find()
        write(tmp_path / "prompts" / "train.jsonl", ROWS)
        assert len(source.read(HARM, tmp_path)) == 20

    def test_fields_that_differ_in_copies(self, tmp_path):
        write(tmp_path / "all" / "train.jsonl", ROWS)
        local = {"rows": "all", "text_column": "q", "where": {"of": ["b"]}}
        source = Source(rows="someone/prompts", name="mine", text_column="prompt", label="harmful", local=local)
        rows = source.read(HARM, tmp_path)
        assert len(rows) == 15 and set(rows.columns["source"]) == {"mine"} and set(rows.columns["of"]) == {"b"}

    def test_known_names_keep_their_columns(self, tmp_path):
        write(tmp_path / "toxicchat" / "train.jsonl", 20)
        source = Source(rows="toxicchat")
        assert source.licence == "cc-by-nc-4.0" and "ToxicChat" in source.note
        rows = source.read(data_dir=tmp_path)
        assert rows.label_names == ["non-toxic", "toxic"] and rows.flagged == ["toxic"]
        with pytest.raises(ProbeError, match="text_column, label_column"):
            Source(rows="toxicchat", label_column="jailbreaking")

    def test_a_file_that_is_not_there(self):
        with pytest.raises(ProbeError, match=r"rows\.csv"):
            Source(rows="rows.csv")


class TestRows:
    @pytest.fixture
    def place(self, tmp_path):
        return write(tmp_path / "a.jsonl", ROWS)

    def test_labels_are_mapped_and_rows_left_out(self, place):
        rows = Source(rows=place, **MAPPED).read(HARM)
        assert len(rows) == 20 and rows.labels.tolist() == [1, 0] * 10
        assert set(rows.columns["kind" if "kind" in rows.columns else "of"]) == {"a", "b"}
        with pytest.raises(ProbeError, match="'no' is not in label_map"):
            Source(rows=place, text_column="q", label_column="kind", label_map={"yes": "harmful"}).read(HARM)
        with pytest.raises(ProbeError, match="bad"):
            Source(rows=place, text_column="q", label="bad").read(HARM)

    def test_all_rows_of_one_label(self, place):
        assert set(Source(rows=place, text_column="q", label="harmful").read(HARM).labels.tolist()) == {1}
        several = Labels(names=["x", "y"], problem_type="multi_label_classification")
        assert Source(rows=place, text_column="q", label=["y"]).read(several).labels.tolist() == [[0, 1]] * 30
        assert Source(rows=place, text_column="q", label=[]).read(several).labels.sum() == 0

    def test_where(self, place):
        rows = Source(rows=place, **MAPPED, where={"of": ["a"], "kind": ["yes", "no"]}).read(HARM)
        assert len(rows) == 10 and set(rows.columns["of"]) == {"a"}
        for where, named in (({"of": ["c"]}, "no rows where"), ({"from": ["a"]}, "'from'")):
            with pytest.raises(ProbeError, match=named):
                Source(rows=place, **MAPPED, where=where).read(HARM)

    def test_parts_share_no_text(self, place):
        parts = [Source(rows=place, **MAPPED, part=part).read(HARM) for part in ([0, 0.6], [0.6, 1])]
        texts = [set(rows.texts) for rows in parts]
        assert len(texts[0]) + len(texts[1]) == 20 and not texts[0] & texts[1] and len(texts[0]) > len(texts[1])

    def test_limits(self, place):
        first, again = (Source(rows=place, **MAPPED, max_rows=7).read(HARM, seed=3).texts for _ in range(2))
        assert first == again != Source(rows=place, **MAPPED, max_rows=7).read(HARM, seed=4).texts and len(first) == 7


class TestLicences:
    @pytest.mark.parametrize(
        "licence, allowed",
        [("MIT", True), ("cc-by-4.0", True), ("odc-by", True), ("Apache-2.0", True), ("cc-by-nc-4.0", False),
         ("CC BY-NC 4.0: non-commercial", False), ("for research purposes", False), ("unknown", False), (None, False)],
    )  # fmt: skip
    def test_what_they_allow(self, licence, allowed):
        assert allows_commercial_use(licence) == allowed

    def test_rows_are_left_out(self, tmp_path):
        place = write(tmp_path / "a.jsonl", ROWS)
        by_row = Source(rows=place, **MAPPED, licence_column="terms")
        assert len(by_row.read(HARM)) == 20 and len(by_row.read(HARM, commercial=True)) == 10
        free, bound, untold = (
            Source(rows=place, **MAPPED, licence=licence) for licence in ("MIT", "cc-by-nc-4.0", None)
        )
        assert [len(source.read(HARM, commercial=True)) for source in (free, bound, untold)] == [20, 0, 0]
