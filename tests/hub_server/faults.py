"""Faults to inject: each befalls the next requests that match it, and counts them."""

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote


@dataclass
class Fault:
    """Something that goes wrong with requests of a method whose path holds `path`.

    It lets `after` of them pass and then befalls `times` (all, where `None`); `hits` says how many it has befallen, so
    that a test can show that its fault took place.
    """

    kind: str
    method: str | None = None
    path: str = ""
    times: int | None = 1
    after: int = 0
    status: int = 500
    data: bytes | None = None
    declared: bool = True
    action: Callable[[], object] | None = None
    hits: int = 0
    passed: int = 0

    def befalls(self, method: str, path: str) -> bool:
        if self.method not in (None, method) or self.path not in unquote(path) or self.hits == self.times:
            return False
        if self.passed < self.after:
            self.passed += 1
            return False
        self.hits += 1
        return True


class Faults:
    """The faults of a server. Every method takes `path`, `times` and `after`, and returns the `Fault`.

    The client repeats a request that was cut, or answered with 408, 429 or 5xx, up to five times with waits of 23 s in
    all: one such fault is mended by the client, and six are an error. 400 and 403 are errors at once.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def add(self, kind: str, **fields) -> Fault:
        """Adds a fault of a kind that has a method below, with any fields of `Fault`."""
        fault = Fault(kind, **fields)
        self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """Ends all faults."""
        self.faults.clear()

    def take(self, kinds: tuple[str, ...], method: str, path: str) -> Fault | None:
        """The first fault of one of the kinds that befalls a request."""
        return next((fault for fault in self.faults if fault.kind in kinds and fault.befalls(method, path)), None)

    def server_error(self, status: int = 500, **match) -> Fault:
        """Answers with a status and does nothing else."""
        return self.add("answer", status=status, **match)

    def forbid(self, **match) -> Fault:
        """Answers 403: to a commit, unless told otherwise."""
        return self.add("answer", status=403, **{"method": "POST", "path": "/commit/", **match})

    def refuse_upload(self, status: int = 403, **match) -> Fault:
        """Answers the upload of a blob with a status."""
        return self.add("answer", status=status, **{"method": "PUT", "path": "/cdn/", **match})

    def cut_upload(self, **match) -> Fault:
        """Closes the connection in the middle of the upload of a blob."""
        return self.add("cut", **{"method": "PUT", "path": "/cdn/", **match})

    def cut_answer(self, **match) -> Fault:
        """Does what was asked, and closes the connection instead of saying so: to a commit, unless told otherwise."""
        return self.add("cut answer", **{"method": "POST", "path": "/commit/", **match})

    def run(self, action: Callable[[], object], **match) -> Fault:
        """Calls a function before the request is looked at: the commit of somebody else in between, for instance."""
        return self.add("run", action=action, **match)

    def truncate(self, declared: bool = True, **match) -> Fault:
        """Sends half of a file: under the Content-Length of the whole, or with `declared=False` under its own."""
        return self.add("truncate", declared=declared, **match)

    def wrong_sha(self, data: bytes | None = None, **match) -> Fault:
        """Sends `data` instead of a file, under the file's etag; by default the file with its last byte changed."""
        return self.add("wrong sha", data=data, **match)
