"""`python -m llama_probe.vllm MODEL --probe HEAD`: vLLM's server with OpenAI's API, and heads."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from .. import vllm as heads
from ..errors import ProbeError
from ..serving.halting_words import HALTING_FORMS, read_halting
from .compatibility import KEY, RESTRICTED, check_arguments, transfer_config


# Options of vLLM's that have a short form, by it.
_SHORT = {
    "-dcp": "decode_context_parallel_size",
    "-pcp": "prefill_context_parallel_size",
    "-sc": "speculative_config",
}
_JSON = {
    "hf_overrides": "of the backbone's config",
    "additional_config": "beside what heads put there",
    "kv_transfer_config": "of a connector beside that of heads",
}
MIDDLEWARE = "llama_probe.vllm.middleware.ProbeStreams"


def server_arguments(argv: Sequence[str] | None = None) -> list[str]:
    """Return the command line of vLLM's server for one of ours. Options that are not ours go through.

    Raises:
        ProbeError: see `engine_kwargs`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llama_probe.vllm",
        description="Serve a model with heads over OpenAI's API. Options of vLLM's own server may follow.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or Hub id of the backbone; demo for the demo backbone")
    parser.add_argument(
        "--probe",
        action="append",
        required=True,
        metavar="[NAME=]HEAD",
        help="folder, Hub id or alias; may be repeated",
    )
    parser.add_argument(
        "--halt-on",
        action="append",
        metavar="HEAD[:LABEL[:THRESHOLD]]",
        help=f"requests that get no reply: {HALTING_FORMS}; may be repeated",
    )
    parser.add_argument("--halt-reply", metavar="TEXT", help="what a request that is halted gets as its reply")
    parser.add_argument(
        "--hide-scores", action="store_true", help="send labels and halts alone: no logits, probabilities, thresholds"
    )
    parser.add_argument("--probe-revision", help="of heads on the Hub that name none")
    parser.add_argument("--probe-namespace", help="whose heads aliases stand for")
    parser.add_argument(
        "--probe-strict",
        action=argparse.BooleanOptionalAction,
        help="refuse heads of another backbone; else a warning. Default: with --halt-on",
    )
    parser.add_argument(
        "--skip-fingerprints",
        dest="compare_fingerprints",
        action="store_false",
        help="compare sizes alone, which spares reading the weights once more",
    )
    parser.add_argument("--allow-untested-vllm", action="store_true", help="go on with another version of vLLM")
    theirs = parser.add_argument_group("options of vLLM's that heads must know of")
    theirs.add_argument("--revision", help="of the backbone")
    theirs.add_argument("--download-dir", help="where to keep the backbone")
    for name, meaning in _JSON.items():
        theirs.add_argument(f"--{name.replace('_', '-')}", type=_json, metavar="JSON", help=meaning)
    ours, rest = parser.parse_known_args(list(map(_with_dashes, sys.argv[1:] if argv is None else argv)))
    _check_theirs(rest)
    if ours.halt_reply is not None and not (ours.halt_on and ours.halt_reply):
        raise ProbeError("--halt-reply is the text of halted requests: it must not be empty, and needs --halt-on")
    ours.probe, ours.halt_on = _heads(ours.probe), ours.halt_on and read_halting(ours.halt_on)
    transfer = transfer_config(ours.kv_transfer_config)
    given = {name: value for name, value in vars(ours).items() if value is not None}
    of_server = {name: given.pop(name, None) for name in ("hide_scores", "halt_reply")}
    # Its import takes seconds: all that is known without it is refused before.
    arguments = heads.engine_kwargs(**given)
    arguments["additional_config"][KEY] |= of_server
    arguments["kv_transfer_config"] = transfer
    words = ["--middleware", MIDDLEWARE]
    for name, value in arguments.items():
        words += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return words + rest


def _heads(texts: list[str]) -> dict[str, str] | list[str]:
    named = [text.partition("=") for text in texts]
    if all(sign for _, sign, _ in named):
        names = [name for name, _, _ in named]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ProbeError(f"--probe names {', '.join(twice)} more than once: give each name once")
        return {name: source for name, _, source in named}
    if any(sign for _, sign, _ in named):
        raise ProbeError("--probe: give every head a name (NAME=HEAD), or none")
    return texts


def _with_dashes(word: str) -> str:
    """Spell an option as this parser does. vLLM takes underscores as well."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _check_theirs(words: Sequence[str]) -> None:
    """Raise `ProbeError` for an option of vLLM's own that heads do not go with, before vLLM is loaded."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        name, dot, _ = name.partition(".")
        if dot and name.removeprefix("--").replace("-", "_") in (*_JSON, "speculative_config"):
            raise ProbeError(f"{word} must be written as one JSON: {name} '{{...}}'")
        argument = _SHORT.get(name, name.removeprefix("--").replace("-", "_"))
        if name == "--model":
            raise ProbeError("--model is refused: heads are compared with the model that comes first, before --probe")
        if not word.startswith("-") or argument not in RESTRICTED:
            continue
        follows = words[place + 1] if place + 1 < len(words) else "--"
        text = value if equals or dot else "true" if follows.startswith("--") else follows
        try:
            given = json.loads(text)
        except ValueError:
            given = text
        check_arguments({argument: given})


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from None


def main() -> None:
    """Serve until the process is stopped."""
    try:
        words = server_arguments()
    except ProbeError as error:
        sys.exit(f"error: {error}")
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    sys.argv = [sys.argv[0], *words]
    serve()


if __name__ == "__main__":
    main()
