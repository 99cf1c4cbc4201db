"""Draw the pictures of the pages: `python docs/pictures.py` writes them all, `python docs/pictures.py NAME` one of them.

Each is one SVG file with a background of its own, so that it can be read on a light page and on a dark one. Where the page's reader asks
for dark colours, the file has dark ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape


FOLDER = Path(__file__).parent
# Name of a colour: light, dark.
COLOURS = {
    "page": ("#ffffff", "#161b22"),
    "edge": ("#d0d7de", "#3d444d"),
    "text": ("#1f2328", "#e6edf3"),
    "quiet": ("#59636e", "#9da7b3"),
    "model": ("#ddf4ff", "#12304f"),
    "model-edge": ("#0969da", "#58a6ff"),
    "head": ("#fff3d6", "#3d2e0a"),
    "head-edge": ("#9a6700", "#e3b341"),
    "good": ("#dafbe1", "#12351f"),
    "good-edge": ("#1a7f37", "#3fb950"),
    "bad": ("#ffebe9", "#4a1a1c"),
    "bad-edge": ("#cf222e", "#ff7b72"),
}


def svg(width: int, height: int, alt: str, shapes: list[str]) -> str:
    """Return an SVG file of these shapes, with a text for readers who cannot see it."""
    fills = [f".{name} {{ fill: var(--{name}) }} .{name}-line {{ stroke: var(--{name}) }}" for name in COLOURS]
    light = "; ".join(f"--{name}: {colours[0]}" for name, colours in COLOURS.items())
    dark = "; ".join(f"--{name}: {colours[1]}" for name, colours in COLOURS.items())
    style = [
        f":root {{ {light} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}",
        *fills,
        "text { font-family: system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif }",
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{escape(alt)}</title>",
            "<style>",
            *style,
            "</style>",
            f'<rect width="{width}" height="{height}" rx="10" class="page"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """Return a box with rounded corners, in a colour that has an edge."""
    edge = "edge" if colour == "page" else f"{colour}-edge"
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" stroke-width="1.5" class="{colour} {edge}-line"/>'


def label(
    x: float, y: float, text: str, size: float = 14, colour: str = "text", anchor: str = "middle", bold: bool = False
) -> str:
    """Return a line of text at this place."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" class="{colour}"{weight}>{escape(text)}</text>'


def arrow(points: list[tuple[float, float]], colour: str = "quiet") -> str:
    """Return a line through these points that ends in an arrowhead."""
    (before_x, before_y), (x, y) = points[-2:]
    along_x = (x > before_x) - (x < before_x)
    along_y = (y > before_y) - (y < before_y)
    line = " ".join(f"{each_x},{each_y}" for each_x, each_y in [*points[:-1], (x - 6 * along_x, y - 6 * along_y)])
    left = f"{x - 9 * along_x - 5 * along_y},{y - 9 * along_y - 5 * along_x}"
    right = f"{x - 9 * along_x + 5 * along_y},{y - 9 * along_y + 5 * along_x}"
    return (
        f'<polyline points="{line}" fill="none" stroke-width="1.8" class="{colour}-line"/>'
        f'<polygon points="{x},{y} {left} {right}" class="{colour}"/>'
    )


def how_a_head_reads() -> str:
    """Draw the way from a prompt to a label, and to a reply or a block."""
    alt = (
        "A prompt passes the layers of a frozen language model. A probe head reads the hidden states of the layers in the same pass: "
        "first over the tokens of each layer, then over the layers. Its label decides, before the first token, between reply and block."
    )
    shapes = [
        box(20, 66, 168, 84, "page"),
        label(104, 97, "Prompt", bold=True),
        label(104, 124, "“How do I bake bread?”", 13, "quiet"),
        arrow([(188, 108), (224, 108)]),
        box(224, 24, 376, 150, "model"),
        label(412, 48, "Frozen language model: one pass", bold=True),
    ]
    for place, name in enumerate(["layer 1", "layer 2", "layer 3", "…", "layer L"]):
        x = 240 + 70 * place
        shapes += [
            box(x, 64, 64, 92, "page"),
            label(x + 32, 86, name, 13),
            *(f'<circle cx="{x + 12 + 10 * token}" cy="120" r="3.5" class="model-edge"/>' for token in range(5)),
            arrow([(x + 32, 130), (x + 32, 232)], "head-edge"),
        ]
    shapes += [
        label(212, 200, "hidden states", 13, "quiet", anchor="end"),
        label(212, 217, "of each token", 13, "quiet", anchor="end"),
        box(224, 232, 376, 112, "head"),
        label(412, 256, "Probe head: what is trained", bold=True),
        box(240, 270, 104, 58, "page"),
        label(292, 294, "over tokens:", 13),
        label(292, 313, "a vector a layer", 12, "quiet"),
        arrow([(344, 299), (362, 299)], "head-edge"),
        box(362, 270, 104, 58, "page"),
        label(414, 294, "over layers:", 13),
        label(414, 313, "one vector", 12, "quiet"),
        arrow([(466, 299), (484, 299)], "head-edge"),
        box(484, 270, 100, 58, "page"),
        label(534, 294, "label:", 13),
        label(534, 313, "a probability", 12, "quiet"),
        arrow([(600, 288), (676, 288), (676, 150)], "good-edge"),
        label(686, 244, "harmless", 13, "good-edge", anchor="start"),
        arrow([(600, 316), (760, 316)], "bad-edge"),
        label(680, 306, "harmful", 13, "bad-edge", anchor="start"),
        arrow([(600, 108), (760, 108)]),
        box(632, 66, 88, 84, "page"),
        label(676, 102, "first", 13),
        label(676, 121, "token", 13),
        box(760, 66, 120, 84, "good"),
        label(820, 97, "Reply", bold=True),
        label(820, 121, "same text", 13, "quiet"),
        label(820, 138, "as without head", 13, "quiet"),
        box(760, 274, 120, 70, "bad"),
        label(820, 304, "Block", bold=True),
        label(820, 327, "no reply", 13, "quiet"),
    ]
    return svg(900, 368, alt, shapes)


PICTURES: dict[str, Callable[[], str]] = {"how-a-head-reads": how_a_head_reads}


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        if name not in PICTURES:
            sys.exit(f"pictures.py draws {', '.join(PICTURES)}, not {name}")
        (FOLDER / f"{name}.svg").write_text(PICTURES[name](), encoding="utf-8")
        print(f"docs/{name}.svg")
