"""Routes of a push: how each file goes up, the LFS objects themselves, and the commit that puts all in place."""

import base64
import binascii
import hashlib
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .access import parameter, repo_id_of, writable
from .downloads import check_signature
from .models import card_data
from .refusal import Refusal
from .repository import LFS_SUFFIXES, Blob, Repository, check_path, check_tree


def _is_proposal(request: Request) -> bool:
    return "create_pr" in request.query_params


async def preupload(request: Request) -> Response:
    repo, _ = writable(request, proposal=_is_proposal(request))
    commit, answer = repo.find(parameter(request, "revision")), []
    for file in (await request.json())["files"]:
        large = file["path"].endswith(LFS_SUFFIXES) or file["size"] >= request.state.hub.lfs_bytes
        entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if file["path"] in commit.files:
            entry["oid"] = commit.files[file["path"]].content_oid
        answer.append(entry)
    return JSONResponse({"files": answer, "commitOid": commit.oid})


async def batch(request: Request) -> Response:
    body, hub = await request.json(), request.state.hub
    # A batch for a pull request names no branch.
    repo, _ = writable(request, proposal="ref" not in body)
    if body["operation"] != "upload" or not {"basic", "multipart"} <= set(body["transfers"]):
        raise Refusal(400, "This server takes uploads only, basic and multipart")
    return JSONResponse(
        {"transfer": "basic", "objects": [_upload_actions(hub, repo, item) for item in body["objects"]]}
    )


def _upload_actions(hub, repo: Repository, item: dict[str, Any]) -> dict[str, Any]:
    """How an object goes up: not at all where it is there, in one piece, or in parts of `hub.part_bytes`."""
    oid, size = item["oid"], item["size"]
    if oid in repo.objects:
        return {"oid": oid, "size": size}
    upload: dict[str, Any] = {"href": hub.signed(hub.cdn_url, "PUT", f"/cdn/{repo.id}/{oid}")}
    if size > hub.part_bytes:
        parts = range(1, -(-size // hub.part_bytes) + 1)
        upload["href"] = hub.signed(hub.url, "POST", f"/{repo.id}.git/info/lfs/complete")
        upload["header"] = {str(n): hub.signed(hub.cdn_url, "PUT", f"/cdn/{repo.id}/{oid}/{n}") for n in parts}
        upload["header"]["chunk_size"] = str(hub.part_bytes)
    verify = {"href": f"{hub.url}/{repo.id}.git/info/lfs/verify"}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


def _keep(repo: Repository, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "The uploaded bytes do not have the declared sha256")
    repo.objects[oid] = data


async def put_object(request: Request) -> Response:
    check_signature(request)
    hub, oid, data = request.state.hub, parameter(request, "oid"), await request.body()
    if "part" in request.path_params:
        hub.parts[repo_id_of(request), oid, int(parameter(request, "part"))] = data
    else:
        _keep(hub.repositories[repo_id_of(request)], oid, data)
    return Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})


async def complete(request: Request) -> Response:
    """Joins the parts of an object."""
    check_signature(request)
    hub, repo_id, body = request.state.hub, repo_id_of(request), await request.json()
    pieces = [hub.parts.get((repo_id, body["oid"], part["partNumber"]), b"") for part in body["parts"]]
    _keep(hub.repositories[repo_id], body["oid"], b"".join(pieces))
    return JSONResponse({"success": True})


async def verify(request: Request) -> Response:
    # Whoever may propose may verify: the request does not say whether its object is for a branch.
    (repo, _), body = writable(request, proposal=True), await request.json()
    if len(repo.objects.get(body["oid"], b"")) != body["size"]:
        raise Refusal(404, "The object was not uploaded, or has another size")
    return JSONResponse({"success": True})


def _new_blob(repo: Repository, kind: str, value: dict[str, Any]) -> Blob:
    if kind == "file":
        try:
            return Blob(base64.b64decode(value["content"], validate=True))
        except binascii.Error:
            raise Refusal(400, f"{value['path']} is not base64") from None
    data = repo.objects.get(value["oid"])
    if value["algo"] != "sha256" or data is None or value.get("size", len(data)) != len(data):
        raise Refusal(400, f"{value['path']} points at an LFS object that was not uploaded: {value['oid']}")
    return Blob(data, lfs=True)


def _apply(repo: Repository, files: dict[str, Blob], kind: str, value: dict[str, Any]) -> None:
    """Changes a tree by one line of a commit."""
    if kind in ("file", "lfsFile"):
        files[check_path(value["path"])] = _new_blob(repo, kind, value)
    elif kind in ("deletedFile", "deletedFolder"):
        folder = value["path"].rstrip("/") + "/"
        gone = [
            path for path in files if (path.startswith(folder) if kind == "deletedFolder" else path == value["path"])
        ]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for path in gone:
            del files[path]
    else:
        raise Refusal(400, f"Unknown operation in commit: {kind}")


async def commit(request: Request) -> Response:
    """Applies all lines of a commit to a copy of the tree, and only then makes it the branch's."""
    as_pull, revision = _is_proposal(request), parameter(request, "revision")
    (repo, token), hub = writable(request, proposal=as_pull), request.state.hub
    lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
    header = lines[0]["value"] if lines and lines[0]["key"] == "header" else {}
    if not header.get("summary"):
        raise Refusal(400, "A commit starts with a header that has a summary")
    head = repo.head(revision)
    if header.get("parentCommit", head.oid) != head.oid:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        _apply(repo, files, line["key"], line["value"])
    check_tree(files)
    if error := card_data(files.get("README.md", Blob(b"")).data.decode("utf-8", "replace"))[1]:
        raise Refusal(400, f"Invalid metadata in README.md: {error}")
    made = repo.commit(revision, files, header["summary"], header.get("description", ""), token.user, as_pull)
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{hub.url}/{repo.id}/commit/{made.oid}"}
    if as_pull:
        answer["pullRequestUrl"] = f"{hub.url}/{repo.id}/discussions/{len(repo.pulls)}"
    return JSONResponse(answer)
