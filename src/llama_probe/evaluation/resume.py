"""Settings of a run, kept beside its results, so that only a run with the same settings resumes it."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import ProbeError
from ..files import JSON, make_folder, remove_leftovers, write_atomically


def same_settings(path: Path, settings: JSON) -> None:
    """Compare the settings of a run with those of the run that it resumes. Write them if there is none.

    Args:
        path: JSON file beside the results. Its folder is created if needed.
        settings: JSON values, nested as you like. Tuples equal lists.
    """
    if not path.is_file():
        make_folder(path.parent)
        remove_leftovers(path.parent)
        write_atomically({path: json.dumps(settings, indent=2) + "\n"})
    else:
        check_settings(path, read_settings(path), settings)


def read_settings(path: Path) -> JSON:
    """Return the settings in a file. Raise `ProbeError` if it is damaged."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it must hold a JSON object")
        return settings
    except ValueError as error:
        raise ProbeError(f"{path} is damaged: {error}; remove it to start again") from None


def check_settings(path: Path, written: JSON, settings: JSON) -> None:
    """Raise `ProbeError` with the first difference between settings and those written in a file."""
    before, now = _flat(written), _flat(json.loads(json.dumps(settings)))
    for name in dict.fromkeys([*now, *before]):
        then, value = (part.get(name, "absent") for part in (before, now))
        if then != value:
            difference = f"{name}={then:.60} (now {value:.60})"
            raise ProbeError(f"{path} was written with {difference}: give the same settings, or another folder")


def _flat(value: object, name: str = "") -> dict[str, str]:
    """Return the values in nested dicts by their dotted names, as Python writes them."""
    if not isinstance(value, dict):
        return {name: repr(value)}
    inner = f"{name}." if name else ""
    return {key: text for part, nested in value.items() for key, text in _flat(nested, inner + part).items()}
