"""`llama-probe reproduce`: the report, on standard output and in its folder."""

import json

from command_line import succeed


def test_reproduce(backbone_folder, tmp_path):
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        lines = [json.dumps({"text": f"{'good' if i % 2 else 'bad'} no {i}", "label": i % 2}) for i in range(count)]
        (tmp_path / "imdb").mkdir(exist_ok=True)
        (tmp_path / "imdb" / f"{split}.jsonl").write_text("\n".join(lines))
    args = (
        "reproduce", "--backbone", backbone_folder, "--data", "imdb", "--data-dir", tmp_path, "--methods", "tfidf, gate",
        "--only", "main,layers", "--seeds", 2, "--epochs", 1, "--output", tmp_path / "out",
    )  # fmt: skip
    report = succeed(*args, "--json")
    assert list(report["main"]["imdb"]) == ["tfidf", "gate"] and len(report["main"]["imdb"]["gate"]["runs"]) == 2
    assert report["command"].startswith("llama-probe reproduce --backbone") and str(tmp_path) not in report["command"]
    assert report["command"] in (tmp_path / "out" / "report.md").read_text()
    shown = succeed(*args)
    assert "imdb, test rows" in shown and "tfidf" in shown and "report written to" in shown
