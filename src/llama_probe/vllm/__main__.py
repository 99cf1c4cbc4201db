"""`python -m llama_probe.vllm MODEL --probe HEAD`: vLLM's server with OpenAI's API, and heads."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from .. import vllm as heads
from ..errors import ProbeError
from .compatibility import RESTRICTIONS, check_arguments, check_version, transfer_config
from .halting_words import CHAT, HALTING_FORMS, JUDGE_PATHS, judge_path, read_halting, read_unsure


# Options of vLLM's that are restricted, and their short forms.
_RESTRICTED = {restriction.argument: () for restriction in RESTRICTIONS if restriction.argument != "enable_dbo"} | {
    "decode_context_parallel_size": ("-dcp",),
    "prefill_context_parallel_size": ("-pcp",),
    "speculative_config": ("-sc",),
}
_JSON = {
    "hf_overrides": "of the backbone's config",
    "additional_config": "beside what heads put there",
    "kv_transfer_config": "of a connector beside that of heads",
}
# vLLM's parser may find none of these in the words that are left for it.
_READ_HERE = ("model", "revision", "download_dir", "pipeline_parallel_size", *_JSON)
_PROGRAM = "python -m llama_probe.vllm"
MIDDLEWARE = "llama_probe.vllm.middleware.ProbeStreams"


def server_arguments(argv: Sequence[str] | None = None) -> list[str]:
    """Return the command line of vLLM's server for one of ours. Options that are not ours go through."""
    ours, rest = _parser().parse_known_args(list(map(_with_dashes, sys.argv[1:] if argv is None else argv)))
    check_arguments(vars(ours))
    _check_left({re.split("[.=]", word)[0].removeprefix("--").replace("-", "_") for word in rest if word[:2] == "--"})
    if ours.halt_reply is not None and not (ours.halt_on and ours.halt_reply):
        raise ProbeError("--halt-reply is the text of halted requests: it must not be empty, and needs --halt-on")
    ours.probe = _heads(ours.probe)
    for option in ("halt_on", "monitor"):
        rules = read_halting(getattr(ours, option) or ())
        setattr(ours, option, rules or None)
        if unknown := [name for name in rules if not _may_be_named(name, ours.probe)]:
            raise ProbeError(f"{_option(option)} names {', '.join(unknown)}, and no --probe does")
    ours.unsure, ours.judge = _judge(ours)
    _check_memory()
    transfer = transfer_config(ours.kv_transfer_config)
    given = {name: value for name, value in vars(ours).items() if value is not None}
    for_server = {name: given.pop(name, None) for name in ("hide_scores", "halt_reply", "unsure", "judge")}
    # From here on imports take seconds: all that is known without them was refused before.
    check_version(ours.allow_untested_vllm)
    _check_parsed(rest)
    arguments = heads.engine_kwargs(**given, for_server=for_server)
    arguments["kv_transfer_config"] = transfer
    words = ["--middleware", MIDDLEWARE]
    for name, value in arguments.items():
        words += [_option(name), value if isinstance(value, str) else json.dumps(value)]
    return words + rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Serve a model with heads over OpenAI's API. Options of vLLM's own server may follow.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or Hub id of the backbone; demo for the demo backbone")
    parser.add_argument(
        "--probe", action="append", required=True, metavar="[NAME=]HEAD", help="folder, Hub id or alias; repeatable"
    )
    halting = f"requests that get no reply, or a part of it: {HALTING_FORMS}; repeatable"
    parser.add_argument("--halt-on", action="append", metavar="HEAD[:LABEL[:THRESHOLD]]", help=halting)
    parser.add_argument(
        "--halt-reply", metavar="TEXT", help="what a request that is halted gets as its reply, or its end"
    )
    monitoring = "heads that flag as with --halt-on, and halt nothing; repeatable"
    parser.add_argument("--monitor", action="append", metavar="HEAD[:LABEL[:THRESHOLD]]", help=monitoring)
    holding = "tokens of a reply to hold back until later ones are clear, beside the one without a score; default 0"
    parser.add_argument("--hold-back", type=int, metavar="K", help=holding)
    parser.add_argument(
        "--hide-scores", action="store_true", help="send labels and halts alone: no logits, probabilities, thresholds"
    )
    judging = f"guard that decides on prompts of which a head is unsure: a URL that ends with {', '.join(JUDGE_PATHS)}"
    parser.add_argument("--judge", metavar="URL", help=f"{judging}. Its key is read from LLAMA_PROBE_JUDGE_KEY")
    band = "scores of a head in --halt-on of which the judge decides, LOW <= score < HIGH; repeatable"
    parser.add_argument("--unsure", action="append", metavar="HEAD=LOW:HIGH", help=band)
    parser.add_argument("--judge-model", metavar="NAME", help="which the judge is asked for")
    parser.add_argument("--judge-timeout", type=float, metavar="SECONDS", help="for an answer; default 5")
    failing = "what an error or a time-out of the judge does to a prompt: closed halts it (default), open lets it pass"
    parser.add_argument("--judge-fails", choices=("closed", "open"), help=failing)
    parser.add_argument("--probe-revision", help="of heads on the Hub that name none")
    strict = "refuse heads of another backbone; else a warning. Default: with --halt-on"
    parser.add_argument("--probe-strict", action=argparse.BooleanOptionalAction, help=strict)
    sizes = "compare sizes alone, which spares reading the weights once more"
    parser.add_argument("--skip-fingerprints", dest="compare_fingerprints", action="store_false", help=sizes)
    parser.add_argument("--allow-untested-vllm", action="store_true", help="go on with another version of vLLM")
    theirs = parser.add_argument_group("options of vLLM's that heads must know of")
    theirs.add_argument("--revision", help="of the backbone")
    theirs.add_argument("--download-dir", help="where to keep the backbone")
    theirs.add_argument("--pipeline-parallel-size", "-pp", type=int, metavar="N", help="stages that share the layers")
    for name, meaning in _JSON.items():
        theirs.add_argument(_option(name), type=_json, metavar="JSON", help=meaning)
    for name, short in _RESTRICTED.items():
        theirs.add_argument(*short, _option(name), type=_json_or_text, help=argparse.SUPPRESS)
    theirs.add_argument("--enable-dbo", action="store_true", default=None, help=argparse.SUPPRESS)
    return parser


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _heads(texts: list[str]) -> dict[str, str] | list[str]:
    named = dict(text.split("=", 1) for text in texts if "=" in text)
    if not named:
        return texts
    if len(named) < len(texts):
        raise ProbeError(f"--probe {', '.join(texts)}: give every head a name of its own (NAME=HEAD), or none")
    return named


def _judge(ours: argparse.Namespace) -> tuple[dict[str, list[float]] | None, dict[str, Any] | None]:
    """Take the options of the judge out of the others. Return the bands by head, and the fields of a `Judge`."""
    options = {name: vars(ours).pop(f"judge_{name}") for name in ("model", "timeout", "fails")}
    bands = read_unsure(ours.unsure or ())
    if ours.judge is None or not bands:
        if bands or any(value is not None for value in (ours.judge, *options.values())):
            raise ProbeError("--judge and --unsure need each other; --judge-model, -timeout and -fails need both")
        return None, None
    if unknown := sorted(bands.keys() - (ours.halt_on or {}).keys()):
        raise ProbeError(f"--unsure names {', '.join(unknown)}, and no --halt-on does")
    if judge_path(ours.judge) == CHAT and not options["model"]:
        raise ProbeError("--judge of chats needs --judge-model, the name of a guard model")
    if options["timeout"] is not None and not 0 < options["timeout"] <= 600:
        raise ProbeError(f"--judge-timeout {options['timeout']} must be seconds, above 0 and at most 600")
    return bands, {"url": ours.judge, **{name: value for name, value in options.items() if value is not None}}


def _may_be_named(name: str, probes: dict[str, str] | list[str]) -> bool:
    """Return False if no head has this name. That of a source is known exactly only after imports that take seconds."""
    if isinstance(probes, dict):
        return name in probes
    spelled = (re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.realpath(source)) for source in probes)
    return any(name.removesuffix("-head") in source for source in spelled)


def _with_dashes(word: str) -> str:
    """Spell an option as this parser does. vLLM takes underscores as well, but not dashes in a key after a dot."""
    name, rest = re.match(r"([^.=]*)(.*)", word, re.DOTALL).groups()
    return name.replace("_", "-") + rest if word.startswith("--") else word


def _check_parsed(words: Sequence[str]) -> None:
    """Refuse what vLLM's own parser finds in the words: abbreviations, parts of a JSON, lines of a `--config` file."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog=_PROGRAM, usage="%(prog)s MODEL --probe HEAD [options]"))
    # A name that is there already gets no default: another value than None comes from a word.
    parsed = vars(parser.parse_args(list(words), argparse.Namespace(**dict.fromkeys(_READ_HERE))))
    _check_left({name for name in _READ_HERE if parsed[name] is not None})
    check_arguments(parsed)


def _check_left(names: set[str]) -> None:
    """Refuse options that heads must know of, among those that are left for vLLM's parser. It takes abbreviations."""
    for name in _READ_HERE:
        if any(left and name.startswith(left) for left in names):
            place = "as the first argument" if name == "model" else "under its full name, JSON in one piece"
            raise ProbeError(f"{_option(name)} is refused here: heads need it on the command line, {place}")


def _check_memory() -> None:
    """Refuse a KV cache on the CPU that the machine cannot hold. vLLM finds that in a worker, with three tracebacks."""
    asked = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    if asked > there:
        raise ProbeError(f"VLLM_CPU_KVCACHE_SPACE={asked} is more than the machine's memory, which is {there} GiB")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from None


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Serve until the process is stopped. If the engine fails, exit with one line and status 1."""
    try:
        serve(server_arguments())
    except ProbeError as error:
        sys.exit(f"error: {error}")


def serve(words: Sequence[str]) -> None:
    """Run vLLM's server with these arguments. Raise `ProbeError` if the engine does not start, or dies."""
    from vllm.entrypoints.launchers.api_server import entry

    build_and_serve = entry.build_and_serve

    async def serve_until_stopped(*args: Any, **kwargs: Any) -> Any:
        rest = await build_and_serve(*args, **kwargs)
        # After a signal the rest is uvicorn's shutdown. Without one only a dead engine ends the server.
        if rest.__name__ != "shutdown":
            await rest
            raise ProbeError("the engine died, and the server with it; see above")
        return rest

    entry.build_and_serve = serve_until_stopped
    sys.argv = [sys.argv[0], *words]
    try:
        entry.main()
    except ProbeError:
        raise
    except ValueError as error:  # an option's value that vLLM refuses when it makes its config
        raise ProbeError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ProbeError(
            f"{said}; if memory is short, lower --gpu-memory-utilization or VLLM_CPU_KVCACHE_SPACE"
        ) from error


if __name__ == "__main__":
    main()
