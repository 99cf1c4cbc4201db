"""`llama-probe reproduce`: the report, on standard output and in its folder."""

import json

from command_line import run


def test_reproduce(backbone_folder, tmp_path):
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        lines = [json.dumps({"text": f"{'good' if i % 2 else 'bad'} no {i}", "label": i % 2}) for i in range(count)]
        (tmp_path / "imdb").mkdir(exist_ok=True)
        (tmp_path / "imdb" / f"{split}.jsonl").write_text("\n".join(lines))
    done = run(
        "reproduce", "--backbone", backbone_folder, "--data", "imdb", "--data-dir", tmp_path, "--methods", "tfidf, gate",
        "--only", "main,layers", "--seeds", 2, "--epochs", 1, "--output", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["main"]["imdb"]) == ["tfidf", "gate"] and len(report["main"]["imdb"]["gate"]["runs"]) == 2
    assert report["command"].startswith("llama-probe reproduce --backbone") and str(tmp_path) not in report["command"]
    assert report["command"] in (tmp_path / "out" / "report.md").read_text()
    for png in tmp_path.rglob("*.png"):
        assert png.parent == tmp_path / "out"
