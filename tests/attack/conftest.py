"""The table of the attacks, the time limit of each try, and what a run is scaled by."""

import gc
import os
import random
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
import pytest

from llama_probe import ProbeError


SEED, SCALE = int(os.environ.get("ATTACK_SEED", "0")), float(os.environ.get("ATTACK_SCALE", "0.01"))
SECONDS, MEGABYTES = 5, 300
COLUMNS = ("tried", "refused", "harmless", "wrongly accepted", "crashed", "hung", "lost")


class Hung(BaseException):
    """A try took longer than `SECONDS`."""


def _hang_up(*_) -> None:
    raise Hung


def memory() -> tuple[int, int]:
    """Return the bytes that the process holds, and the most that it has held."""
    gc.collect()
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


@dataclass
class Tally:
    """The outcomes of one attack."""

    name: str
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))
    counts: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    start: tuple[int, int] = field(default_factory=memory)
    grown: float = 0

    def times(self, count: int) -> range:
        """Return so many tries, scaled."""
        return range(max(1, round(count * SCALE)))

    def add(self, outcome: str, note: object = "") -> None:
        self.counts["tried"] += 1
        self.counts[outcome] += 1
        if outcome not in ("refused", "harmless"):
            self.notes.append(f"{outcome}: {note}")

    def attempt(self, action: Callable[[], object], judge: Callable[[object], bool], note: object = "") -> str:
        """Call an action, and judge what it returns: False means wrongly accepted."""
        before = signal.signal(signal.SIGALRM, _hang_up)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome = "harmless" if judge(action()) else "wrongly accepted"
        except ProbeError:
            outcome = "refused"
        except Hung:
            outcome = "hung"
        except Exception:
            outcome, note = "crashed", f"{note}\n{traceback.format_exc()}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.add(outcome, note)
        return outcome

    def check(self) -> None:
        """Fail if anything but a refusal came of an attack, or if memory grew."""
        self.grown = max(now - before for now, before in zip(memory(), self.start, strict=True)) / 2**20
        assert not self.notes, "\n".join(self.notes[:5])
        assert self.grown < MEGABYTES


TALLIES: list[Tally] = []


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """The outcomes of a test, which is named by what it attacks."""
    tally = Tally(request.node.name.removeprefix("test_").replace("_", " "))
    TALLIES.append(tally)
    yield tally
    tally.check()


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the table."""
    if TALLIES:
        write = terminalreporter.write_line
        write(f"\nattacks with seed {SEED} and scale {SCALE:g}\n")
        write(f"| attack | {' | '.join(COLUMNS)} | MB |")
        write(f"|---|{'---:|' * (len(COLUMNS) + 1)}")
        for each in TALLIES:
            cells = [f"{each.counts[name]:,}" for name in COLUMNS]
            write(f"| {each.name} | {' | '.join(cells)} | {max(0, each.grown):.0f} |")
