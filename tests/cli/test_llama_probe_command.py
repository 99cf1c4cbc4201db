"""The entry point of the console script."""

import subprocess
import sys

import pytest
from repository import SETUP


# Ctrl-C while a module is imported.
INTERRUPTED = """
import os, signal, sys

class Interrupts:
    def find_spec(name, *_):
        if name == "{name}":
            os.kill(os.getpid(), signal.SIGINT)
            print("goes on", flush=True)
            os._exit(0)

signal.signal(signal.SIGINT, signal.{handler})
sys.meta_path.insert(0, Interrupts)
from {module} import {function}
sys.argv = ["llama-probe", "inspect"]
{function}()
"""


def interrupted(name: str, handler: str = "default_int_handler") -> tuple:
    module, _, function = SETUP["options.entry_points"]["console_scripts"].partition("= ")[2].partition(":")
    code = INTERRUPTED.format(name=name, handler=handler, module=module, function=function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["llama_probe", "torch"])
def test_ctrl_c_during_the_imports_ends_in_silence(name):
    assert interrupted(name) == (130, "", "")


def test_an_interrupt_that_is_ignored_stays_so():
    assert interrupted("torch", "SIG_IGN")[:2] == (0, "goes on\n")
