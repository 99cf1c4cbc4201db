"""The changed start of vLLM's server, with imports that move between minor versions.

The classes of vLLM that heads extend are in `scheduler`, `connector`, `models` and `paged_states`. `middleware` replaces the
`generate` of the server's engine client.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ProbeError


if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

BuildAndServe = Callable[..., Awaitable[Awaitable[None]]]


def parse_server_arguments(program: str, usage: str, words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of vLLM's server for a command line."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog=program, usage=usage)).parse_args(list(words))


def run_server(arguments: argparse.Namespace) -> None:
    """Run vLLM's server until it is stopped, as its own `main` does, which would parse the command line.

    Raises:
        ProbeError: the engine died. Errors of the start are those of vLLM.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    entry.build_and_serve = report_death(entry.build_and_serve)
    cli_env_setup()
    entry.configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    uvloop.run(entry.run_server(arguments))


def report_death(build_and_serve: BuildAndServe) -> BuildAndServe:
    """Return vLLM's `build_and_serve` with an error if the engine dies, where vLLM's own ends in silence.

    A server that is told to stop shuts its engine client down first. Without such a shutdown, the server has stopped by itself.
    """

    async def build_and_serve_or_raise(engine: EngineClient, *args: Any, **kwargs: Any) -> Awaitable[None]:
        was_stopped = False
        shutdown = engine.shutdown

        def note_shutdown(*args: Any, **kwargs: Any) -> None:
            nonlocal was_stopped
            was_stopped = True
            shutdown(*args, **kwargs)

        engine.shutdown = note_shutdown
        rest = await build_and_serve(engine, *args, **kwargs)
        if was_stopped:
            return rest
        is_dead = engine.errored
        await rest
        raise ProbeError(
            "the engine died, and the server with it; see above" if is_dead else "the server stopped; see above"
        )

    return build_and_serve_or_raise
