"""`ProgressBar`: a bar on a terminal, and a line every 30 seconds in a log, a notebook or CI."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers.utils import logging


_SECONDS_OF_LINE = 30
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{left}{postfix}]"
_COUNT = "{desc}: {n_fmt} {unit} [{elapsed}{postfix}]"


class ProgressBar(tqdm):
    """The progress of long work on standard error: a bar on a terminal, elsewhere a line every 30 seconds.

    Nothing is shown if `transformers.utils.logging.disable_progress_bar` was called, as it is on all ranks but the main one.

    Args:
        total: how much there is to do; None if it is not known.
        unit: what is counted, such as `"tokens"`.
        delay: seconds before the bar appears.
        initial: how much was done before.

    Attributes:
        seconds_left: the time until the end. Without it, each unit takes as long as those since the beginning of the bar.
    """

    def __init__(
        self, total: int | None, title: str, unit: str, delay: float = 0, is_hidden: bool = False, initial: int = 0
    ):
        self.seconds_left: float | None = None
        self._on_terminal = sys.stderr.isatty()
        pace: dict[str, Any] = {} if self._on_terminal else {"mininterval": _SECONDS_OF_LINE, "miniters": 0}
        super().__init__(
            desc=title,
            total=total,
            unit=unit,
            delay=delay,
            initial=initial,
            leave=False,
            dynamic_ncols=self._on_terminal,
            smoothing=0,
            disable=is_hidden or not logging.is_progress_bar_enabled(),
            bar_format=_COUNT if total is None else _BAR,
            gui=not self._on_terminal,  # the parent then leaves the display to `display`
            **pace,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values of `bar_format`."""
        values = super().format_dict
        left = self.seconds_left
        done = self.n - values["initial"] if self.total else 0
        if left is None and done:
            left = values["elapsed"] * (self.total - self.n) / done
        values["left"] = "?" if left is None else tqdm.format_interval(left)
        values["percentage"] = 100  # of more than was expected; the parent replaces it otherwise
        values["n_fmt"] = f"{self.n:,}"
        values["total_fmt"] = "?" if self.total is None else f"{self.total:,}"
        return values

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the bar, or print the line."""
        if self._on_terminal:
            return super().display(msg, pos)
        values = self.format_dict
        count = values["n_fmt"] if self.total is None else f"{values['n_fmt']} of {values['total_fmt']}"
        left = "" if self.total is None else f", {values['left']} left"
        details = f", {self.postfix}" if self.postfix else ""
        elapsed = tqdm.format_interval(values["elapsed"])
        self.fp.write(f"{self.desc}: {count} {self.unit}, {elapsed} so far{left}{details}\n")
        self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar from the terminal. A line stays."""
        if self._on_terminal:
            super().clear(nolock)
