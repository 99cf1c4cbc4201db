"""Settings of a run, kept beside its results, so that only a run with the same settings resumes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ProbeError
from ..files import make_folder, remove_leftovers, write_atomically


_ABSENT = object()


def same_settings(path: Path, settings: dict[str, Any]) -> bool:
    """Compare the settings of a run with those of the run that it resumes. Write them if there is none.

    Args:
        path: JSON file beside the results. Its folder is created if needed.
        settings: JSON values, nested as you like. Tuples equal lists.

    Returns:
        True if the file holds these settings, so there is a run to resume. False if the file was written now.

    Raises:
        ProbeError: the file holds other settings, or is damaged. The message names the first difference.
    """
    if not path.is_file():
        make_folder(path.parent)
        remove_leftovers(path.parent)
        write_atomically({path: json.dumps(settings, indent=2) + "\n"})
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProbeError(f"{path} is damaged: {error}; remove it to start again") from None
    check_settings(path, found, settings)
    return True


def check_settings(path: Path, found: Any, settings: dict[str, Any]) -> None:
    """Raise `ProbeError` with the first difference if settings differ from those found in a file that may hold more."""
    if told := _first_difference(found, json.loads(json.dumps(settings)), ""):
        raise ProbeError(f"{path} was written with {told}: give the same settings, or another folder")


def _first_difference(found: Any, wanted: Any, name: str) -> str | None:
    """Return the first difference of two JSON values as `name=found (now wanted)`. None if they are equal."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        inner = f"{name}." if name else ""
        keys = dict.fromkeys([*wanted, *found])
        pairs = ((inner + key, found.get(key, _ABSENT), wanted.get(key, _ABSENT)) for key in keys)
        return next((told for key, old, new in pairs if (told := _first_difference(old, new, key))), None)
    return None if found == wanted else f"{name or 'settings'}={_short(found)} (now {_short(wanted)})"


def _short(value: Any) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
