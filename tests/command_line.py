"""The command line, in this process or in one of its own, and rows for it."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_probe.cli import main


def run(*args, stdin=None, **env):
    """In a process of its own: what it imports and which variables it reads are part of the test."""
    code = "from llama_probe.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **env},
    )


def call(*args, stdin=""):
    """As `run`, without the seconds that a process takes to start."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)  # that of transformers keeps the stream that it found
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["llama-probe", *map(str, args)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setenv("COLUMNS", "200")
        logging.getLogger().addHandler(handler)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            logging.getLogger().removeHandler(handler)
    return subprocess.CompletedProcess(sys.argv, ended.value.code, out.getvalue(), err.getvalue())


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
