"""The application: its routes, and the front that every request passes."""

import traceback
from urllib.parse import urlsplit

from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import downloads, models, revisions, uploads
from .access import readable
from .refusal import Refusal, answer_refusal


MODEL = "/api/models/{namespace}/{name}"
LFS = "/{namespace}/{name}.git/info/lfs"
CDN = "/cdn/{namespace}/{name}/{oid}"
DATA = "/api/datasets/{namespace}/{name}"  # which are planted, and read


async def unknown_repo(request: Request) -> Response:
    """An id without a namespace, of which this server has none."""
    readable(request)
    raise AssertionError("a repository has a namespace")


def make_app(hub) -> ASGIApp:
    """The Hub and, under `/cdn`, the other origin that holds its LFS objects."""
    routes = [
        Route("/api/whoami-v2", models.whoami),
        Route("/api/repos/create", models.create, methods=["POST"]),
        Route("/api/repos/delete", models.delete, methods=["DELETE"]),
        Route("/api/validate-yaml", models.validate_card, methods=["POST"]),
        Route("/api/models", models.search),
        Route(MODEL, models.info),
        Route(MODEL + "/revision/{revision}", models.info),
        Route(MODEL + "/settings", models.settings, methods=["PUT"]),
        Route(MODEL + "/auth-check", models.may_read),
        Route(MODEL + "/auth-check/write", models.may_write),
        Route(MODEL + "/tree/{revision}", revisions.tree),
        Route(MODEL + "/tree/{revision}/{path:path}", revisions.tree),
        Route(MODEL + "/paths-info/{revision}", revisions.paths_info, methods=["POST"]),
        Route(MODEL + "/refs", revisions.refs),
        Route(MODEL + "/commits/{revision}", revisions.commits),
        Route(MODEL + "/tag/{revision}", revisions.create_tag, methods=["POST"]),
        Route(MODEL + "/tag/{revision}", revisions.delete_tag, methods=["DELETE"]),
        Route(MODEL + "/branch/{branch}", revisions.create_branch, methods=["POST"]),
        Route(MODEL + "/branch/{branch}", revisions.delete_branch, methods=["DELETE"]),
        Route(MODEL + "/preupload/{revision}", uploads.preupload, methods=["POST"]),
        Route(MODEL + "/commit/{revision}", uploads.commit, methods=["POST"]),
        Route(LFS + "/objects/batch", uploads.batch, methods=["POST"]),
        Route(LFS + "/complete", uploads.complete, methods=["POST"]),
        Route(LFS + "/verify", uploads.verify, methods=["POST"]),
        Route("/cdn/datasets/{namespace}/{name}/{oid}/{path:path}", downloads.get_object),
        Route(CDN, uploads.put_object, methods=["PUT"]),
        Route(CDN + "/{part}", uploads.put_object, methods=["PUT"]),
        Route(CDN + "/{path:path}", downloads.get_object),
        Route("/{namespace}/{name}/resolve/{revision}/{path:path}", downloads.resolve),
        Route(DATA, models.info),
        Route(DATA + "/revision/{revision}", models.info),
        Route(DATA + "/tree/{revision}", revisions.tree),
        Route(DATA + "/tree/{revision}/{path:path}", revisions.tree),
        Route(DATA + "/paths-info/{revision}", revisions.paths_info, methods=["POST"]),
        Route(DATA + "/refs", revisions.refs),
        Route("/datasets/{namespace}/{name}/resolve/{revision}/{path:path}", downloads.resolve),
        Route("/api/models/{name}", unknown_repo),
        Route("/api/datasets/{name}", unknown_repo),
        Route("/{name}/resolve/{revision}/{path:path}", unknown_repo),
    ]
    return Front(ExceptionMiddleware(Router(routes), {Refusal: answer_refusal}), hub)


class Front:
    """Passes requests on with their whole body, keeps the log, and plays the faults.

    Routes match the path as it came: decoded, `refs%2Fpr%2F1` would be three parts. An error of the server's own is
    kept in `hub.errors` and answered with 501, which the client does not repeat.
    """

    def __init__(self, app: ASGIApp, hub) -> None:
        self.app, self.hub = app, hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hub, method, path = self.hub, scope["method"], scope["raw_path"].decode("ascii")
        scope["path"], scope["state"] = path, {"hub": hub}
        fault = hub.faults.take(("answer", "cut", "cut answer", "run"), method, path)
        kind = fault.kind if fault is not None else ""
        if kind == "cut":
            await receive()
            await self._cut(scope)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)

        async def whole_body() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        started = False

        async def logged_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if kind == "cut answer":
                    await self._cut(scope)
                else:
                    hub.requests.append((method, path, message["status"]))
            await send(message)

        app = self.app
        try:
            if kind == "run":
                fault.action()
            if kind == "answer":
                app = Refusal(fault.status, "a fault that was asked for").response()
            elif error := self._misplaced(scope):
                app = PlainTextResponse(error, 400)
            await app(scope, whole_body, logged_send)
        except Exception:
            hub.errors.append(traceback.format_exc())
            if not started:
                await PlainTextResponse(hub.errors[-1], 501)(scope, whole_body, logged_send)

    def _misplaced(self, scope: Scope) -> str | None:
        """Why a request should not have come to its host; as with the real CDN, a token there is an error."""
        headers = dict(scope["headers"])
        at_cdn = headers.get(b"host", b"").decode() == urlsplit(self.hub.cdn_url).netloc
        if at_cdn != scope["path"].startswith("/cdn/"):
            return "LFS objects are on another origin than the rest"
        return "a token was sent to the CDN" if at_cdn and b"authorization" in headers else None

    async def _cut(self, scope: Scope) -> None:
        self.hub.requests.append((scope["method"], scope["path"], None))
        await self.hub.abort(scope)
