"""The command line in a process of its own, and rows for it."""

import json
import os
import subprocess
import sys
from pathlib import Path


def run(*args, stdin=None, **env):
    code = "from llama_probe.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **env},
    )


def write_rows(folder: Path) -> Path:
    """`train.jsonl` and `test.jsonl`, of two labels that can be told apart."""
    for name, count, shift in (("train", 60, 0), ("test", 20, 3)):
        lines = [
            json.dumps(
                {"text": f"{'good' if i % 3 else 'bad'} number {i + shift}", "label": int(i % 3 == 0), "half": i % 2}
            )
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder
