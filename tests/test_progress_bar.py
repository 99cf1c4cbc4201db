"""Progress: a bar on a terminal, elsewhere a line every 30 seconds; and the time that is left of long and short rows."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from tqdm import std
from transformers.utils import logging

from llama_probe.backbone.passes import Pass, fair_order, length_batches
from llama_probe.data import batches
from llama_probe.data.batches import follow_progress
from llama_probe.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def bars_are_on(monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is put forward."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(std, "time", clock)
    monkeypatch.setattr(batches.time, "monotonic", clock)
    return clock


def shown(stream, clock, monkeypatch, total=1000, seconds=3):
    """Return what a bar writes that moves by 10 every `seconds`."""
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar(total, "hidden states", "tokens") as bar:
        for _ in range(100):
            clock.now += seconds
            bar.update(10)
            bar.set_postfix({"loss": 0.25}, refresh=False)
    return stream.getvalue()


def test_a_line_every_30_seconds_where_there_is_no_terminal(clock, monkeypatch):
    lines = shown(io.StringIO(), clock, monkeypatch).splitlines()
    assert len(lines) == 10 and not any("\r" in line for line in lines)
    assert lines[0] == "hidden states: 100 of 1,000 tokens, 00:30 so far, 04:30 left, loss=0.25"
    assert shown(io.StringIO(), clock, monkeypatch, seconds=0.1) == "", "ten seconds in all"
    lines = shown(io.StringIO(), clock, monkeypatch, total=None).splitlines()
    assert lines[0] == "hidden states: 100 tokens, 00:30 so far, loss=0.25"
    assert len(shown(io.StringIO(), clock, monkeypatch, total=500).splitlines()) == 10, "more than was expected"


def test_what_was_done_before_takes_no_time(clock, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar(1000, "training", "steps", initial=900) as bar:
        clock.now += 40
        bar.update(50)
    assert stream.getvalue() == "training: 950 of 1,000 steps, 00:40 so far, 00:40 left\n"


def test_a_bar_on_a_terminal(clock, monkeypatch):
    written = shown(Terminal(), clock, monkeypatch)
    assert written.count("\r") > 100 and "\n" not in written.rstrip("\n")
    assert "10%" in written and "100/1,000 tokens [00:30<04:30" in written
    assert "1000 tokens" in shown(Terminal(), clock, monkeypatch, total=None).replace(",", "")


def test_one_switch_hides_it(clock, monkeypatch):
    logging.disable_progress_bar()
    assert not shown(io.StringIO(), clock, monkeypatch) and not shown(Terminal(), clock, monkeypatch)


def lengths_of(kind):
    generator = np.random.default_rng(0)
    if kind == "long tail":
        return np.clip(generator.lognormal(4.5, 1.2, 3000), 5, 8000).astype(int).tolist()
    if kind == "two lengths":
        return [8000] * 40 + [40] * 4000
    return generator.integers(100, 200, 3000).tolist()


@pytest.mark.parametrize("kind", ["long tail", "two lengths", "alike"])
@pytest.mark.parametrize("scale", [300, 3000, 1e9])
def test_after_a_tenth_of_the_time_the_rest_is_known(clock, monkeypatch, kind, scale):
    """Within a quarter, where a row of L tokens takes L + L^2 / scale, and each pass a tenth more or less."""
    bars = []

    class Bar(ProgressBar):
        def __init__(self, *args):
            super().__init__(*args)
            bars.append(self)

    monkeypatch.setattr(batches, "ProgressBar", Bar)
    lengths = lengths_of(kind)
    passes = [Pass(rows) for rows in length_batches(lengths)]
    assert len(passes) > 40
    noise = np.random.default_rng(1)
    begin = clock.now
    marks = []
    for run in follow_progress(passes, lengths, "hidden states"):
        marks.append((clock.now, bars[0].seconds_left))
        width = lengths[run.rows[0]]
        clock.now += len(run.rows) * (width + width**2 / scale) * 1e-3 * noise.uniform(0.9, 1.1)
    whole = clock.now - begin
    after, told = next((now, left) for now, left in marks if now - begin >= 0.1 * whole)
    assert told == pytest.approx(begin + whole - after, rel=0.25)
    assert bars[0].n == bars[0].total == sum(lengths)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_each_beginning_is_a_sample(count):
    items = list(range(count))
    ordered = fair_order(items)
    assert sorted(ordered) == items and ordered[:1] == items[:1]
    for part in range(8, count, 8):
        assert abs(np.mean(ordered[:part]) - np.mean(items)) < 0.1 * count


LOAD = """
import sys
from llama_probe.cli import main
sys.argv = ["llama-probe", "--version"]
try: main()
except SystemExit: pass
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
list(tqdm(range(9), desc="GGUF"))
AutoModelForCausalLM.from_pretrained({folder!r}).save_pretrained({copy!r})
"""


def test_a_command_hides_the_bars_of_libraries_in_a_log(backbone_folder, tmp_path):
    script = LOAD.format(folder=str(backbone_folder), copy=str(tmp_path / "copy"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for switch in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        environment.pop(switch, None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "%|" not in done.stderr and "\r" not in done.stderr, done.stderr
    assert (tmp_path / "copy" / "model.safetensors").is_file()
