"""Faults to inject: each affects the next requests that match it, and counts them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote


@dataclass
class Fault:
    """A fault for requests of a method whose path holds `path`; it affects `times` of them, or all if None."""

    kind: str
    method: str | None = None
    path: str = ""
    times: int | None = 1
    status: int = 500
    code: str | None = None
    declared: bool = True
    action: Callable[[], object] | None = None
    hits: int = 0

    def befalls(self, method: str, path: str) -> bool:
        if self.method not in (None, method) or self.path not in unquote(path) or self.hits == self.times:
            return False
        self.hits += 1
        return True


@dataclass
class Faults:
    """The faults of a server. Each method takes `path` and `times`, and returns the `Fault`.

    The client repeats a request that was cut, or answered with 408, 429 or 5xx, up to five times. So one such fault is
    mended by the client, and six are an error.
    """

    faults: list[Fault] = field(default_factory=list)

    def add(self, kind: str, **fields) -> Fault:
        self.faults.append(Fault(kind, **fields))
        return self.faults[-1]

    def clear(self) -> None:
        self.faults.clear()

    def take(self, kinds: tuple[str, ...], method: str, path: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.kind in kinds and fault.befalls(method, path)), None)

    def answer(self, status: int = 500, **match) -> Fault:
        """Answer with a status, and with `code` as the client's name for the error."""
        return self.add("answer", status=status, **match)

    def forbid(self, **match) -> Fault:
        """Answer 403 to a commit."""
        return self.answer(403, method="POST", path="/commit/", **match)

    def refuse_upload(self, **match) -> Fault:
        """Answer 403 to the upload of a large file."""
        return self.answer(403, method="PUT", path="/cdn/", **match)

    def cut_upload(self, **match) -> Fault:
        """Close the connection in the middle of the upload of a large file."""
        return self.add("cut", method="PUT", path="/cdn/", **match)

    def run(self, action: Callable[[], object], **match) -> Fault:
        """Call a function before the request is answered, for example a commit of somebody else."""
        return self.add("run", action=action, **match)

    def lose(self, **match) -> Fault:
        """Do what is asked for, and answer 500."""
        return self.add("lose", **match)

    def drip(self, **match) -> Fault:
        """Send a file a byte at a time, 50 of them a second."""
        return self.add("drip", method="GET", **match)

    def truncate(self, declared: bool = True, **match) -> Fault:
        """Send half of a file: under the Content-Length of the whole, or with `declared=False` under its own."""
        return self.add("truncate", method="GET", declared=declared, **match)

    def wrong_sha(self, **match) -> Fault:
        """Send a file with its last byte changed, under the old etag."""
        return self.add("wrong sha", method="GET", **match)
