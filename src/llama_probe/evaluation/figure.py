"""The style of all figures, and how they become files. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ProbeError


if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (6.4, 3.6)  # inches
_DPI = 110


def new_figure(size: tuple[float, float] = SIZE) -> Figure:
    """An empty figure of a width and height in inches.

    Raises:
        ProbeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ProbeError("plots need matplotlib: pip install 'llama_probe[plots]'") from None

    # A figure of its own rather than pyplot's: no display, no global state.
    return Figure(figsize=size, layout="constrained")


def explain(figure: Figure, sentence: str) -> Figure:
    """Puts a sentence under a figure, for a reader who sees it for the first time, and gives the figure back."""
    lines = textwrap.fill(sentence, int(14 * figure.get_figwidth()))
    figure.supxlabel(lines, fontsize=8, color="0.3", parse_math=False)
    return figure


def percent(value: float, _position: int | None = None) -> str:
    """A share as a tick label: `0.125` is `12.5%`."""
    return f"{100 * value:.3g}%" if value else "0"


def png_writer(draw: Callable[[], Figure]) -> Callable[[Path], None]:
    """A writer for `write_atomically`: it draws when its turn comes. The same figure gives the same bytes."""

    def write(path: Path) -> None:
        with warnings.catch_warnings():
            # Characters that the font lacks are drawn as boxes.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            # Without the software's version in it, a file changes only where the picture does.
            draw().savefig(path, dpi=_DPI, format="png", metadata={"Software": None})

    return write
