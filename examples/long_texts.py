"""Measure how many requests a guard finds in long texts: share found and flagged by words, kind of text and place of the request.

    python examples/long_texts.py --probe safety --requests aegis:test --harmful harmful --texts 12 --output long-texts

A request stands first, in the middle or last in harmless text of a kind that `safety` has not learned: manual pages and sources of
Python, and the descriptions of installed packages. `--kind NAME=ROWS` adds rows, such as `reviews=imdb:test`. A request counts if
the guard flags it alone. `--paragraphs` also judges each paragraph by itself, a pass each. `--recipe` also measures TF-IDF, fitted
on the training rows of a recipe. Writes `long-texts.json` and `long-texts.png` (extras `train`, `plots`, `demo`).
"""

import argparse
import json
import pydoc_data.topics
import re
import sysconfig
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from llama_probe import AutoModelForProbedGeneration
from llama_probe.backbone.loading import demo_backbone
from llama_probe.data.row_sources import Source
from llama_probe.evaluation.bootstrap import share_of
from llama_probe.evaluation.plots import new_figure, png
from llama_probe.training.measurements import tfidf_classifier
from llama_probe.training.recipe import Recipe
from llama_probe.training.recipe_rows import read_rows


PLACES = {"first": 0.0, "in the middle": 0.5, "last": 1.0}
PARAGRAPH = 100  # words of the parts that --paragraphs judges


@dataclass
class Text:
    """A text to judge. `request` is its number among the requests, None for harmless text alone."""

    kind: str
    words: int
    place: str | None
    request: int | None
    text: str


def python_manuals() -> list[str]:
    return list(pydoc_data.topics.topics.values())


def python_sources() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]


def package_pages() -> list[str]:
    pages = {each.metadata["Name"]: each.metadata.get_payload() for each in distributions()}
    return [page for _, page in sorted(pages.items()) if isinstance(page, str) and len(page) > 500]


def filler(texts: list[str], words: int, rng: np.random.Generator) -> list[str]:
    """Return that many words of random texts, each with the white space behind it."""
    pieces: list[str] = []
    while len(pieces) < words:
        parts = re.findall(r"\S+\s*", texts[int(rng.integers(len(texts)))])
        first = int(rng.integers(max(1, len(parts) - words)))  # not always the beginning of a text
        pieces += [*parts[first : first + words], "\n\n"]
    return pieces[:words]


def make_texts(kinds: dict[str, list[str]], requests: list[str], lengths: list[int], most: int) -> list[Text]:
    """Return harmless texts of each kind and length, alone and with a request at each place. Long ones are fewer."""
    made = []
    for kind, texts in kinds.items():
        for words in lengths:
            rng = np.random.default_rng([words, *kind.encode()])
            for _ in range(max(3, min(most, most * 1000 // words))):
                around = filler(texts, words, rng)
                made.append(Text(kind, words, None, None, "".join(around).strip()))
                number = int(rng.integers(len(requests)))
                for place, share in PLACES.items():
                    cut = round(share * len(around))
                    parts = ["".join(around[:cut]).strip(), requests[number], "".join(around[cut:]).strip()]
                    made.append(Text(kind, words, place, number, "\n\n".join(filter(None, parts))))
    return made


def paragraphs(text: str) -> list[str]:
    words = text.split(" ")
    return [" ".join(words[first : first + PARAGRAPH]) for first in range(0, len(words), PARAGRAPH)]


def tfidf_guard(recipe: str, data_dir: str | None, rate: float):
    """Return a function that flags texts by TF-IDF, with a threshold for a share of the recipe's calibration rows."""
    rows = read_rows(Recipe.load(recipe), data_dir)
    flagged = [rows.train.label_names.index(name) for name in rows.train.flagged]
    plain = [row for row, text in enumerate(rows.train.texts) if isinstance(text, str)]
    model = tfidf_classifier()
    model.fit([rows.train.texts[row] for row in plain], np.isin(np.asarray(rows.train.labels)[plain], flagged))
    harmless = [text for text in rows.calibration.texts if isinstance(text, str)]
    threshold = np.quantile(model.predict_proba(harmless)[:, 1], 1 - rate)
    return lambda texts: model.predict_proba(texts)[:, 1] > threshold


def summary(texts: list[Text], flags: np.ndarray, alone: np.ndarray) -> list[dict]:
    """Return share and interval of flagged texts by kind, words and place; with a request, of those that are flagged alone."""
    cells: dict[tuple, list[bool]] = {}
    for text, is_flagged in zip(texts, flags, strict=True):
        if text.request is None or alone[text.request]:
            for kind in (text.kind, "all"):
                cells.setdefault((kind, text.words, text.place), []).append(bool(is_flagged))
    columns = ("kind", "words", "place")
    return [
        dict(zip(columns, cell, strict=True)) | {"texts": len(flags)} | share_of(np.array(flags))
        for cell, flags in cells.items()
    ]


def plot(cells: dict[str, list[dict]]) -> bytes:
    """Draw for each guard the share found by words, a line a place, and below it the share flagged without a request."""
    figure = new_figure((4.2 * len(cells), 5.0))
    axes = figure.subplots(2, len(cells), sharex=True, squeeze=False, height_ratios=(2, 1))
    for column, (guard, rows) in enumerate(cells.items()):
        for place in (*PLACES, None):
            line = [row for row in rows if row["kind"] == "all" and row["place"] == place]
            line.sort(key=lambda row: row["words"])
            words = [row["words"] for row in line]
            low, high = zip(*(row["interval"] for row in line), strict=True) if line else ((), ())
            part = axes[int(place is None)][column]
            color = None if place else "tab:red"
            part.plot(words, [row["share"] for row in line], marker="o", color=color, label=place)
            part.fill_between(words, low, high, alpha=0.12, color=color)
        axes[0][column].set(title=guard, xscale="log", ylim=(-0.03, 1.03), ylabel="requests found")
        axes[0][column].legend(fontsize=8)
        axes[1][column].set(
            xscale="log", ylim=(-0.01, 0.31), xlabel="words of harmless text", ylabel="flagged without"
        )
    return png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--probe", nargs="+", default=["safety"], help="guards, each a head with one flagged label")
    parser.add_argument("--requests", default="aegis:test", help="rows with requests")
    parser.add_argument("--harmful", default="harmful", help="label of the requests")
    parser.add_argument("--data-dir", help="folder of local copies")
    parser.add_argument("--kind", nargs="*", default=[], metavar="NAME=ROWS", help="further kinds of harmless text")
    parser.add_argument("--words", nargs="+", type=int, default=[100, 300, 1000, 3000, 6000])
    parser.add_argument(
        "--texts", type=int, default=12, help="texts of a kind up to 1,000 words; fewer of longer ones"
    )
    parser.add_argument("--paragraphs", action="store_true")
    parser.add_argument("--recipe", help="measure TF-IDF on the training rows of this recipe too")
    parser.add_argument("--output", type=Path, default=Path("long-texts"))
    args = parser.parse_args()

    rows = Source(rows=args.requests).read(data_dir=args.data_dir, split="test")
    label = rows.label_names.index(args.harmful)
    requests = [text for text, row in zip(rows.texts, rows.labels, strict=True) if row == label and len(text) < 400]
    kinds = {"manuals": python_manuals(), "code": python_sources(), "packages": package_pages()}
    for kind in args.kind:
        name, _, place = kind.partition("=")
        kinds[name] = Source(rows=place).read(data_dir=args.data_dir, split="test").texts
    texts = make_texts(kinds, requests, args.words, args.texts)

    backbone = str(demo_backbone()) if args.backbone == "demo" else args.backbone
    model = AutoModelForProbedGeneration.from_pretrained(backbone, probe=args.probe, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(backbone)

    def flags(texts: list[str]) -> dict[str, np.ndarray]:
        outputs = model.classify(texts, tokenizer=tokenizer)
        return {
            name: np.array([label in output.config_of().flagged for label in output.labels])
            for name, output in outputs.items()
        }

    counted = sum(len(ids) for ids in tokenizer([text.text for text in texts], verbose=False)["input_ids"])
    print(f"{len(texts)} texts, {counted:,} tokens, {len(requests)} requests", flush=True)
    alone = flags(requests)
    start = time.perf_counter()
    judged = flags([text.text for text in texts])
    seconds = {"whole": time.perf_counter() - start}
    if args.paragraphs:
        start = time.perf_counter()
        parts = [paragraphs(text.text) for text in texts]
        each = flags([part for text in parts for part in text])
        borders = np.cumsum([0, *map(len, parts)])[:-1]
        for name in list(judged):
            judged[f"{name}, each paragraph alone"] = np.logical_or.reduceat(each[name], borders)
            alone[f"{name}, each paragraph alone"] = alone[name]
        seconds["paragraphs"] = time.perf_counter() - start
    if args.recipe:
        guard = tfidf_guard(args.recipe, args.data_dir, 0.02)
        judged["TF-IDF"], alone["TF-IDF"] = guard([text.text for text in texts]), guard(requests)

    cells = {name: summary(texts, flags, alone[name]) for name, flags in judged.items()}
    found_alone = {name: share_of(flags) for name, flags in alone.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"tokens": counted, "seconds": seconds, "alone": found_alone, "cells": cells}
    (args.output / "long-texts.json").write_text(json.dumps(report, indent=1))
    (args.output / "long-texts.png").write_bytes(plot(cells))
    for name, rows in cells.items():
        print(f"\n{name}: {found_alone[name]['share']:.2f} of the requests found alone")
        print("| kind | words | first | in the middle | last | flagged without |\n|---|---:|---:|---:|---:|---:|")
        shares = {(row["kind"], row["words"], row["place"]): row for row in rows}
        for kind in ("all", *kinds):
            for words in args.words:
                values = [shares.get((kind, words, place)) for place in (*PLACES, None)]
                print(
                    f"| {kind} | {words:,} | "
                    + " | ".join(f"{row['share']:.2f}" if row else "-" for row in values)
                    + " |"
                )
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
