"""Memory that is freed is used again, and not asked for anew."""

import os
import subprocess
import sys

import pytest

from llama_probe.training import allocator


# Print the pages that the system hands out for ten large blocks, one after the other, without large pages.
COUNT = """
import ctypes, resource, runpy
keep_freed_memory = runpy.run_path({path!r})["keep_freed_memory"]  # the module alone: the package takes seconds
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
assert keep_freed_memory()
def pages():
    b"x" * (1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = pages()
print([pages() for _ in range(10)][-1] - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "confstr"), reason="glibc")
def test_freed_memory_is_kept():
    command = [sys.executable, "-c", COUNT.format(path=allocator.__file__)]
    pages = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(pages) < 0.01 * 10 * (1 << 26) // 4096, "nearly all of them without the setting"
