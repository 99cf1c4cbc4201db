"""`python -m llama_probe.vllm MODEL --probe HEAD`: vLLM's server with OpenAI's API, and heads."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from .. import vllm as heads
from ..errors import ProbeError
from ..files import JSON
from .compatibility import check_version
from .halting_words import CHAT, HALTING_FORMS, JUDGE_PATHS, judge_path, read_halting, read_unsure
from .patches import parse_server_arguments, run_server


_PROGRAM = "python -m llama_probe.vllm"
_NAMED = re.compile(r"[\w-]+=")  # the name before a head; a path may hold a `=`, too
MIDDLEWARE = "llama_probe.vllm.middleware.ProbeStreams"


def server_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of vLLM's server for a command line. vLLM reads all options that are not of heads."""
    ours, rest = _parser().parse_known_args(argv)
    options = vars(ours)
    if ours.halt_reply and not ours.halt_on:
        raise ProbeError("--halt-reply is the text of halted requests: it needs --halt-on")
    ours.probe = _heads(ours.probe)
    for option in ("halt_on", "monitor"):
        options[option] = read_halting(options[option] or (), f"--{option.replace('_', '-')}") or None
    ours.unsure, ours.judge = _judge(ours)
    for_server = {name: options.pop(name) for name in ("hide_scores", "halt_reply", "unsure", "judge")}
    # All options of heads are checked above, because the imports from here on take seconds.
    check_version(ours.strict_versions)
    words = [ours.model, *rest]  # with the model among them, one word too many is an error
    theirs = parse_server_arguments(_PROGRAM, "%(prog)s MODEL --probe HEAD [options]", words)
    if theirs.headless or theirs.grpc or theirs.api_server_count not in (None, 1):
        raise ProbeError("--headless, --grpc and --api-server-count do not go with heads: one process serves HTTP")
    theirs.served_model_name = theirs.served_model_name or [ours.model]  # `model` may become a folder
    options = {name: value for name, value in (vars(theirs) | options).items() if value is not None}
    vars(theirs).update(heads.engine_kwargs(**options, for_server=for_server))
    theirs.middleware = [MIDDLEWARE, *theirs.middleware]
    return theirs


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
    halting = f"heads that block requests and end replies: {HALTING_FORMS}; repeatable"
    parser.add_argument("--halt-on", action="append", metavar="HEAD[:LABEL[:THRESHOLD]]", help=halting)
    parser.add_argument("--halt-reply", metavar="TEXT", help="reply to a halted prompt, and end of a halted reply")
    monitoring = "heads that flag by the same rules and halt nothing; repeatable"
    parser.add_argument("--monitor", action="append", metavar="HEAD[:LABEL[:THRESHOLD]]", help=monitoring)
    holding = "tokens of a reply to hold back until later tokens are clear, besides the newest one; default 0"
    parser.add_argument("--hold-back", type=int, metavar="K", help=holding)
    parser.add_argument(
        "--hide-scores", action="store_true", help="send labels and halts alone: no logits, probabilities, thresholds"
    )
    judging = f"guard that decides where a head is unsure: a URL that ends with {', '.join(JUDGE_PATHS)}"
    parser.add_argument("--judge", metavar="URL", help=f"{judging}. Its key is read from LLAMA_PROBE_JUDGE_KEY")
    band = "the judge decides on prompts with LOW <= score < HIGH of a head in --halt-on; repeatable"
    parser.add_argument("--unsure", action="append", metavar="HEAD=LOW:HIGH", help=band)
    parser.add_argument("--judge-model", metavar="NAME", help="model that the judge is asked for")
    parser.add_argument("--judge-timeout", type=float, metavar="SECONDS", help="to wait for an answer; default 5")
    failing = "what happens to a prompt if the judge fails: closed halts it (default), open lets it pass"
    parser.add_argument("--judge-fails", choices=("closed", "open"), help=failing)
    strict = "refuse heads of another backbone, instead of a warning. Default: with --halt-on"
    parser.add_argument("--probe-strict", action=argparse.BooleanOptionalAction, help=strict)
    sizes = "compare sizes alone, which spares reading the weights once more"
    parser.add_argument("--skip-fingerprints", dest="compare_fingerprints", action="store_false", help=sizes)
    importing = "a Python file that registers a head type of your own, for every process; repeatable"
    parser.add_argument("--import", dest="import_files", action="append", metavar="FILE.py", help=importing)
    newer = "refuse releases of vLLM and transformers that are newer than the tested ones, instead of a warning"
    parser.add_argument("--strict-versions", action="store_true", help=newer)
    return parser


def _heads(texts: list[str]) -> dict[str, str] | list[str]:
    named = dict(text.split("=", 1) for text in texts if _NAMED.match(text))
    if not named:
        return texts
    if len(named) < len(texts):
        raise ProbeError(f"--probe {', '.join(texts)}: give every head a name of its own (NAME=HEAD), or none")
    return named


def _judge(ours: argparse.Namespace) -> tuple[dict[str, tuple[float, float]] | None, JSON | None]:
    """Remove the options of the judge. Return the bands by head, and the fields of a `Judge`."""
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


def main() -> None:
    """Serve until the process is stopped. If an option is wrong or the engine fails, exit with one line and status 1."""
    try:
        run_server(server_arguments())
    except (OSError, RuntimeError, ValueError) as error:  # a `ProbeError`, an error of vLLM, or a port that is in use
        reason = " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            reason += "; if memory is short, lower --gpu-memory-utilization or VLLM_CPU_KVCACHE_SPACE"
        sys.exit(f"error: {ProbeError(reason)}")  # which cuts a long text


if __name__ == "__main__":
    main()
