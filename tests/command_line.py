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


def run(*args, **env):
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "llama_probe.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", **env})


def call(*args, stdin=""):
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)  # that of transformers keeps the stream that it found
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["llama-probe", *map(str, args)])
        patch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        patch.setenv("COLUMNS", "200")
        logging.getLogger().addHandler(handler)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            logging.getLogger().removeHandler(handler)
    return subprocess.CompletedProcess(sys.argv, ended.value.code, out.getvalue(), err.getvalue())


def succeed(*args, stdin=""):
    """Return the standard output of a command that succeeds; parsed, if `--json` is among its words."""
    done = call(*args, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in args else done.stdout


def refuse(*args, stdin=""):
    """Return the one line of a command that is refused."""
    done = call(*args, stdin=stdin)
    assert done.returncode == 2 and not done.stdout, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llama-probe: ") and "Traceback" not in done.stderr and "Usage" not in done.stderr
    return last


def write_rows(folder: Path) -> Path:
    """Write `train.jsonl` and `test.jsonl`, of two labels that can be told apart."""
    for name, count, shift in (("train", 60, 0), ("test", 20, 3)):
        lines = [
            {"text": f"{'good' if i % 3 else 'bad'} number {i + shift}", "label": int(i % 3 == 0), "half": i % 2}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder
