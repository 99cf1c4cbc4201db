"""The command line, in this process, and rows for it."""

import contextlib
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import write

from llama_probe.cli import main


def call(*args, stdin="", encoding="utf-8"):
    """Run a command in this process, at a terminal with this encoding."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True), io.StringIO()
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
    printed = out.buffer.getvalue().decode(encoding)
    return subprocess.CompletedProcess(sys.argv, ended.value.code, printed, err.getvalue())


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


def settings(**sections):
    """Return the words of `--set` for fields of a recipe by section, `training={"patience": 2}`."""
    return [word for name, value in sections.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def train(backbone, rows, output, *words, head=None, training=None, **sections):
    """Train a head for an epoch or as `training` says, without folds, and return what `succeed` does."""
    sections = {"validation": {"folds": 0}, "head": {"probe_type": "gate", **(head or {})}, **sections}
    sections["training"] = {"num_train_epochs": 1, **(training or {})}
    return succeed("train", rows, "--backbone", backbone, "--output", output, *settings(**sections), *words)


def write_rows(folder: Path) -> Path:
    """Write `train.jsonl` and `test.jsonl`, of two labels that can be told apart."""
    texts = [f"{'good' if i % 3 else 'bad'} number {i}" for i in range(60)]
    rows = [{"text": text, "label": int(i % 3 == 0), "half": i % 2} for i, text in enumerate(texts)]
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", rows[3:23])
    return folder
