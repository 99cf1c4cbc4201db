"""`llama-probe reproduce`: the report, on standard output and in its folder."""

from command_line import succeed


def test_reproduce(copies, backbone_folder, tmp_path):
    args = (
        "reproduce", "--backbone", backbone_folder, "--data", "emotion", "--data-dir", copies, "--methods", "tfidf, gate",
        "--only", "main,layers", "--seeds", 2, "--epochs", 1, "--output", tmp_path / "out",
    )  # fmt: skip
    report = succeed(*args, "--json")
    main = report["main"]["emotion"]
    assert list(main) == ["tfidf", "gate"] and len(main["gate"]["runs"]) == 2
    assert report["command"].startswith("llama-probe reproduce --backbone") and str(tmp_path) not in report["command"]
    assert report["command"] in (tmp_path / "out" / "report.md").read_text()
    shown = succeed(*args)
    assert "emotion, test rows" in shown and "tfidf" in shown and "report written to" in shown
