"""Finished parts of a long run, a JSON file each, so that the run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...files import remove_leftovers, write_atomically


class PartStore:
    """A folder of finished parts, JSON values. A part has a path as its name, such as `main/toxicchat/mha`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, name: str) -> Any:
        """Return a finished part, or `None` if there is none."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def missing(self, group: str, names: Iterable[str]) -> dict[str, str]:
        """Return the names whose parts `GROUP/NAME` are not finished, with their parts."""
        parts = {name: f"{group}/{name}" for name in names}
        return {name: part for name, part in parts.items() if not self._path(part).is_file()}

    def write(self, name: str, part: Any) -> None:
        """Write a finished part atomically."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        write_atomically({path: json.dumps(part, indent=2) + "\n"})

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Return a finished part. If there is none, write the result of `work` as the part."""
        if not self._path(name).is_file():
            self.write(name, work())
        return self.find(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
