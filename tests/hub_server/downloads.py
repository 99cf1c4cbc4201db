"""Routes of a pull: a file of a revision, and the other origin to which the Hub sends the client for LFS objects."""

import re
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from .access import downloadable, parameter, repo_id_of
from .refusal import Refusal
from .repository import Blob


class Truncated(Response):
    """Stops after half of the bytes that its Content-Length declares; the server then closes the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2], "more_body": True})


def check_signature(request: Request) -> None:
    """Refuses a URL that the Hub did not sign for this method and path: no token protects what lies behind it."""
    hub, method = request.state.hub, "GET" if request.method == "HEAD" else request.method
    if request.query_params.get("key") != hub.signature(method, request.url.path):
        raise Refusal(403, "SignatureDoesNotMatch")


def send_file(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """Bytes or the Range of them that was asked for, as the faults have it."""
    faults, response, status = request.state.hub.faults, Response, 200
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    if request.method == "GET" and (fault := faults.take(("wrong sha",), "GET", request.url.path)):
        data = data[:-1] + bytes([data[-1] ^ 0xFF]) if fault.data is None else fault.data
    if match := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", "")):
        first, last = match.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= end:
            raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"], status = f"bytes {start}-{end - 1}/{len(data)}", 206
        data = data[start:end]
    if request.method == "GET" and (fault := faults.take(("truncate",), "GET", request.url.path)):
        if fault.declared:
            response = Truncated
        else:
            data = data[: len(data) // 2]
    return response(data, status, headers)


async def resolve(request: Request) -> Response:
    repo, hub = downloadable(request), request.state.hub
    commit, path = repo.find(parameter(request, "revision")), parameter(request, "path")
    blob: Blob = repo.file(commit, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.content_oid}"'}
    if not blob.lfs:
        return send_file(request, blob.data, headers)
    # The name of the file is in the URL so that faults find it there, and because the real CDN is told it as well.
    location = hub.signed(hub.cdn_url, "GET", f"/cdn/{repo.id}/{blob.sha256}/{quote(path)}")
    headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(blob.size)}
    return RedirectResponse(location, 302, headers)


async def get_object(request: Request) -> Response:
    check_signature(request)
    repo, oid = request.state.hub.repositories[repo_id_of(request)], parameter(request, "oid")
    return send_file(request, repo.objects[oid], {"ETag": f'"{oid}"'})
