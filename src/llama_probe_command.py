"""Start of the `llama-probe` command: outside the package, whose import takes the seconds in which people press Ctrl-C."""

import os
import signal


_heard = False


def main() -> None:
    """Entry point; see `llama_probe.cli.main`."""
    global _heard
    _heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it may be ignored, as in the background
    if _heard:  # at once: torch's import ends by another signal where it meets a KeyboardInterrupt
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from llama_probe.cli import main

    main()


def listen() -> None:
    """Leave Ctrl-C to the command, after the imports."""
    if _heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
