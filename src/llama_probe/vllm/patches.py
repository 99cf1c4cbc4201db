"""The functions that differ between minor versions of vLLM, and the changed start of its server. Each function says where it was read.

The classes of vLLM that heads extend are in `scheduler`, `connector`, `models` and `paged_states`. `middleware` replaces the
`generate` of the server's engine client. `surface` lists every name of vLLM that these files use.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..compatibility import minor
from ..errors import ProbeError


if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

BuildAndServe = Callable[..., Awaitable[Awaitable[None]]]


def choose_model_runner() -> None:
    """Let vLLM take its first model runner, unless the variable has a value. Read in 0.32 to 0.34.

    Up to 0.33, vLLM would choose the second one on a GPU, with which heads were not run. From 0.34 on there is no other.
    """
    from vllm.version import __version__

    if minor(__version__) < (0, 34):
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


def _command_line() -> ModuleType:
    """Return vLLM's module of arguments of its server, which moved in 0.33. Read in 0.34."""
    try:
        from vllm.entrypoints.common import cli_args
    except ImportError:
        from vllm.entrypoints.launchers import cli_args
    return cli_args


def _prepare_environment() -> None:
    """Set the variables that vLLM's command line sets, by a function that moved in 0.33. Read in 0.34."""
    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    cli_env_setup()


def parse_server_arguments(program: str, usage: str, words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of vLLM's server for a command line. Read in 0.34."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return _command_line().make_arg_parser(FlexibleArgumentParser(prog=program, usage=usage)).parse_args(list(words))


def run_server(arguments: argparse.Namespace) -> None:
    """Run vLLM's server until it is stopped, as its own `main` does, which would parse the command line. Read in 0.34.

    Raises:
        ProbeError: the engine died. Errors of the start are those of vLLM.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server import entry

    entry.build_and_serve = report_death(entry.build_and_serve)
    _prepare_environment()
    entry.configure_logging_from_args(arguments)
    _command_line().validate_parsed_serve_args(arguments)
    uvloop.run(entry.run_server(arguments))


def report_death(build_and_serve: BuildAndServe) -> BuildAndServe:
    """Return vLLM's `build_and_serve` with an error if the engine dies, where vLLM's own ends in silence. Read in 0.34.

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
