"""Finished parts of a long piece of work, a JSON file each, so that it can go on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ProbeError
from ...files import write_atomically


@dataclass(frozen=True)
class Part:
    """What a part's file holds.

    Attributes:
        settings: what the result depends on. result: of the part.
        seconds: that it took. together: the parts that were worked out in these seconds, this one among them.
        weights: digest of the backbone that it was made on; `None` in parts of versions that did not note it.
    """

    settings: dict[str, Any]
    result: Any
    seconds: float
    together: list[str]
    weights: str | None = None


class PartStore:
    """A folder of finished parts. A part is named by a path such as `main/toxicchat/mha`.

    Args:
        folder: created when the first part is written.
        weights: digest of the backbone, which parts have to be of; `None` before it is loaded.
    """

    def __init__(self, folder: Path, weights: str | None = None):
        self.folder, self.weights = Path(folder), weights

    def find(self, name: str, settings: dict[str, Any]) -> Part | None:
        """A finished part; `None` where it is still to be done.

        Raises:
            ProbeError: it was made with other settings, or on another backbone, or its file is damaged.
        """
        path = self._path(name)
        if not self.holds(name):
            return None
        try:
            part = Part(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ProbeError(f"{path} is damaged: {error}; remove it to do this part again") from None
        if told := differences(part.settings, settings):
            raise ProbeError(
                f"{path} was made with other settings: {told}. Give those again, or another --output; or remove the file to "
                "do this part anew"
            )
        if None not in (part.weights, self.weights) and part.weights != self.weights:
            raise ProbeError(
                f"{path} was made on another backbone of this name: its weights or its config were others. Give another "
                f"--output, or remove {self.folder} to do all anew"
            )
        return part

    def holds(self, name: str) -> bool:
        """Whether there is a part of this name, with whatever settings."""
        return self._path(name).is_file()

    def write(self, name: str, settings: dict[str, Any], result: Any, seconds: float, together: list[str]) -> None:
        """Puts a finished part into its file; whoever reads sees all of it or nothing."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Part(settings, result, round(seconds, 1), together, self.weights)
        text = json.dumps(vars(part), indent=2) + "\n"
        write_atomically({path: lambda target: target.write_text(text, encoding="utf-8")})

    def once(self, name: str, settings: dict[str, Any], work: Callable[[], Any]) -> Part:
        """A finished part; where it is still to be done, what `work` gives becomes it."""
        if not self.holds(name):
            start = time.perf_counter()
            result = work()
            self.write(name, settings, result, time.perf_counter() - start, [name])
        return self.find(name, settings)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What settings that were written have other than those at hand, for a message; empty where they are the same."""
    wanted = json.loads(json.dumps(wanted))
    other = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name}={found.get(name)!r} (now {wanted.get(name)!r})" for name in other)
