"""What the Hub answers when it says no: a status, and the headers from which the client picks its exception."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class Refusal(Exception):
    """Ends a request with a status, a message, and the `X-Error-Code` that the client knows it by."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}

    def response(self) -> Response:
        headers = {"X-Error-Message": self.message.encode("ascii", "replace").decode(), **self.headers}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return JSONResponse({"error": self.message}, self.status, headers)


def repo_not_found(known: bool) -> Refusal:
    """The same answer for a missing and for a hidden repository: 401 to a stranger, 404 to a `known` user."""
    return Refusal(404 if known else 401, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> Refusal:
    """404 for a branch, tag, pull request or commit that is not there."""
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, commit: str | None = None) -> Refusal:
    """404 for a path; with its commit, the client remembers that the file is not in that commit."""
    headers = {} if commit is None else {"X-Repo-Commit": commit}
    return Refusal(404, f"Entry not found: {path}", "EntryNotFound", headers)


async def answer_refusal(request: Request, refusal: Refusal) -> Response:
    """Turns a `Refusal` that a route raised into its response."""
    return refusal.response()
