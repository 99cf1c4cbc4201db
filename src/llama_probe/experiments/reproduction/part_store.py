"""Finished parts of a long run, a JSON file each, so that the run can be resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...errors import ProbeError
from ...files import remove_leftovers, write_atomically


class PartStore:
    """A folder of finished parts. A part has a path as its name, such as `main/toxicchat/mha`.

    A part is a dict of its `result` and of the `seconds` that the parts in `together` took, this one among them.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, name: str) -> dict[str, Any] | None:
        """Return a finished part, or `None` if there is none.

        Raises:
            ProbeError: its file is damaged.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ProbeError(f"{path} is damaged: {error}; remove it to do this part again") from None

    def missing(self, group: str, names: Iterable[str]) -> dict[str, str]:
        """Return the names whose parts `GROUP/NAME` are not finished, with their parts."""
        parts = {name: f"{group}/{name}" for name in names}
        return {name: part for name, part in parts.items() if not self._path(part).is_file()}

    def write(self, name: str, result: Any, seconds: float, together: Iterable[str]) -> None:
        """Write a finished part atomically."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, [path.name])
        part = {"result": result, "seconds": round(seconds, 1), "together": list(together)}
        write_atomically({path: json.dumps(part, indent=2) + "\n"})

    def once(self, name: str, work: Callable[[], Any]) -> dict[str, Any]:
        """Return a finished part. If there is none, write the result of `work` as the part."""
        if not self._path(name).is_file():
            start = time.perf_counter()
            result = work()
            self.write(name, result, time.perf_counter() - start, [name])
        return self.find(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
