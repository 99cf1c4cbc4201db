"""Finished parts of a long run, a JSON file each, so that the run can be resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ProbeError
from ...evaluation.resume import check_settings
from ...files import remove_leftovers, write_atomically


@dataclass(frozen=True)
class Part:
    """The content of a part's file.

    Attributes:
        settings: all that the result depends on, beside the backbone's weights.
        seconds: time that the parts in `together` took, this one among them.
        weights: digest of the backbone. `None` in files of versions that did not write it.
    """

    settings: dict[str, Any]
    result: Any
    seconds: float
    together: list[str]
    weights: str | None = None


class PartStore:
    """A folder of finished parts. A part has a path as its name, such as `main/toxicchat/mha`.

    Args:
        folder: created with the first part.
        weights: digest of the backbone that parts must come from. `None` before the backbone is loaded.
    """

    def __init__(self, folder: Path, weights: str | None = None):
        self.folder, self.weights = Path(folder), weights

    def find(self, name: str, settings: dict[str, Any]) -> Part | None:
        """Return a finished part, or `None` if there is none.

        Raises:
            ProbeError: it has other settings or another backbone, or its file is damaged.
        """
        if not self.holds(name):
            return None
        path = self._path(name)
        try:
            part = Part(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ProbeError(f"{path} is damaged: {error}; remove it to do this part again") from None
        found, wanted = part.settings, settings
        if None not in (part.weights, self.weights):
            found, wanted = found | {"backbone_weights": part.weights}, wanted | {"backbone_weights": self.weights}
        check_settings(path, found, wanted)
        return part

    def holds(self, name: str) -> bool:
        """Return True if there is a part of this name, with any settings."""
        return self._path(name).is_file()

    def write(self, name: str, settings: dict[str, Any], result: Any, seconds: float, together: list[str]) -> None:
        """Write a finished part atomically."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, [path.name])
        text = json.dumps(vars(Part(settings, result, round(seconds, 1), together, self.weights)), indent=2) + "\n"
        write_atomically({path: lambda target: target.write_text(text, encoding="utf-8")})

    def once(self, name: str, settings: dict[str, Any], work: Callable[[], Any]) -> Part:
        """Return a finished part. If there is none, write the result of `work` as the part."""
        if not self.holds(name):
            start = time.perf_counter()
            result = work()
            self.write(name, settings, result, time.perf_counter() - start, [name])
        return self.find(name, settings)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
