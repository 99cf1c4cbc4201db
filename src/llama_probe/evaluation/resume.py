"""Keep the settings of a run beside its results, so that only a run with the same settings resumes it."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import ProbeError
from ..files import JSON, make_folder, remove_leftovers, write_atomically


def same_settings(path: Path, settings: JSON, state: JSON | None = None) -> JSON:
    """Check that a run has the settings of the run that it resumes. Write the settings of a new run.

    Args:
        path: JSON file beside the results. Its folder is created if it is missing.
        settings: nested JSON values. Tuples equal lists.
        state: further values of a new file, which are not compared.

    Returns:
        The contents of the file.
    """
    if not path.is_file():
        make_folder(path.parent)
        remove_leftovers(path.parent)
        written = settings | (state or {})
        write_atomically(path, json.dumps(written, indent=2) + "\n")
        return written
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        before = _flat({name: written.get(name) for name in settings})
    except (ValueError, AttributeError) as error:
        raise ProbeError(f"{path} is damaged: {error}; remove it to start again") from None
    now = _flat(json.loads(json.dumps(settings)))
    for name in dict.fromkeys([*now, *before]):
        then, value = (part.get(name, "absent") for part in (before, now))
        if then != value:
            difference = f"{name}={then:.60} (now {value:.60})"
            raise ProbeError(f"{path} was written with {difference}: give the same settings, or another folder")
    return written


def _flat(value: object, name: str = "") -> dict[str, str]:
    """Return the `repr` of each value in nested dicts by its dotted name."""
    if not isinstance(value, dict):
        return {name: repr(value)}
    inner = f"{name}." if name else ""
    return {key: text for part, nested in value.items() for key, text in _flat(nested, inner + part).items()}
