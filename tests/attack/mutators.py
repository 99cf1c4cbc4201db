"""Seeded damage to bytes, JSON values and head folders."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from llama_probe.files import PENDING
from llama_probe.hub.folder import CARD_NAME, CONFIG_NAME, HEAD_FILES, RESULTS_NAME, WEIGHTS_NAME


VALUES = [
    *(None, True, False, 0, -1, 1, 2, 1.5, 1e-40, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30),
    *("", " ", "0", "mha", "../../etc/passwd", "/dev/zero", "\u202e", "\ud800", "\x1b[2J", "<script>", "`" * 50),
    *("x" * 100_000, [], {}, [[]], {"a": None}, [0, 1], {"0": "a"}, [None] * 1000, "{{ 7 * 7 }}", "---\n- a"),
]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with a bit flipped, or a part cut, doubled, moved, zeroed or made up."""
    data, place, other = bytearray(data), rng.randrange(len(data) or 1), rng.randrange(len(data) or 1)
    span = slice(place, place + rng.choice([1, 1, 2, 8, 100, 10_000]))
    match rng.randrange(8):
        case 0 | 1 | 2 if data:
            data[place] ^= 1 << rng.randrange(8)
        case 3:
            del data[span]
        case 4:
            data[place:place] = data[span]
        case 5:
            data[other:other] = rng.randbytes(rng.choice([1, 4, 1000]))
        case 6:
            data[span] = bytes(len(data[span]))
        case _:
            del data[place:]
    return bytes(data)


def changed(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with one value in it replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, rest = rng.choice(list(value)), dict(value)
        match rng.randrange(6):
            case 0:
                del rest[key]
            case 1:
                rest[rng.choice(["", "a" * 5000, "\x1b[2J", key + " ", key.upper()])] = rest.pop(key)
            case _:
                rest[key] = changed(rng, rest[key])
        return rest
    if isinstance(value, list) and value and rng.random() < 0.6:
        rest, place = list(value), rng.randrange(len(value))
        rest[place : place + rng.randrange(2)] = [changed(rng, rest[place])] * rng.choice([0, 1, 1, 3, 1000])
        return rest
    return rng.choice(VALUES)


def damage_head(rng: random.Random, folder: Path, other: Path) -> bool:
    """Damage a head folder. Return True if it was changed as its owner could, to the files of `other` for example."""
    name = rng.choice([CONFIG_NAME, CONFIG_NAME, WEIGHTS_NAME, WEIGHTS_NAME, RESULTS_NAME, CARD_NAME])
    path, is_owner = folder / name, False
    match rng.randrange(7):
        case 0 | 1 | 2:
            path.write_bytes(damaged(rng, path.read_bytes()))
        case 3 if path.suffix == ".json":
            path.write_text(json.dumps(changed(rng, json.loads(path.read_text()))), errors="surrogatepass")
        case 4 if path.suffix == ".json":
            values = changed(rng, json.loads(path.read_text()))
            is_owner = isinstance(values, dict) and values.pop("config_sha256", None) is not None
            path.write_text(json.dumps(values), errors="surrogatepass")
        case 5:
            _replace(rng, path, other)
        case _:
            pending = folder / PENDING
            pending.mkdir()
            for each in rng.sample(HEAD_FILES, 2):
                if (other / each).is_file() and rng.random() < 0.5:
                    shutil.copyfile(other / each, pending / each)
                else:
                    (pending / f"{each}.gone").touch()
            # The files of a whole other head are a head.
            is_owner = (pending / CONFIG_NAME).exists() and (pending / WEIGHTS_NAME).exists()
    return is_owner


def _replace(rng: random.Random, path: Path, other: Path) -> None:
    path.unlink()
    match rng.randrange(7):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(rng.choice(["/dev/zero", "/proc/self/mem", "/proc/kmsg", path.name, "nowhere"]))
        case 3:
            path.touch()
            os.truncate(path, 20 * 2**30)
        case 4:
            aliases = b"---\na: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n---\n" * 100
            path.write_bytes(rng.choice([b"[" * 200_000, aliases]))
        case 5:
            shutil.copyfile(other / path.name, path)
