"""Routes of a repository's revisions: its trees, branches, tags, pull requests and history."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .access import parameter, readable, writable
from .models import file_entry
from .refusal import Refusal, entry_not_found, revision_not_found
from .repository import Blob, Commit


def folder_entry(path: str, files: Mapping[str, Blob]) -> dict[str, Any]:
    """A folder as the API lists it."""
    inside = "\n".join(f"{name}\0{files[name].oid}" for name in sorted(files) if name.startswith(f"{path}/"))
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(inside.encode()).hexdigest()}


def tree_entries(files: Mapping[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder (the root, where it is empty), sorted; one level deep unless `recursive`."""
    start, entries = f"{folder}/" if folder else "", {}
    for path in sorted(files):
        if not path.startswith(start):
            continue
        parts = path[len(start) :].split("/")
        for end in range(1, len(parts) if recursive else min(len(parts), 2)):
            above = start + "/".join(parts[:end])
            entries[above] = folder_entry(above, files)
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", **file_entry(path, files[path], "path", "oid")}
    return [entries[path] for path in sorted(entries)]


async def tree(request: Request) -> Response:
    commit = readable(request).find(parameter(request, "revision"))
    folder = parameter(request, "path").strip("/") if "path" in request.path_params else ""
    entries = tree_entries(commit.files, folder, request.query_params.get("recursive", "").lower() in ("1", "true"))
    if folder and not entries:
        raise entry_not_found(folder, commit.oid)
    return JSONResponse(entries)


async def paths_info(request: Request) -> Response:
    files = readable(request).find(parameter(request, "revision")).files
    found = []
    for path in parse_qs((await request.body()).decode()).get("paths", []):
        if path in files:
            found.append({"type": "file", **file_entry(path, files[path], "path", "oid")})
        elif any(name.startswith(f"{path}/") for name in files):
            found.append(folder_entry(path, files))
    return JSONResponse(found)


async def refs(request: Request) -> Response:
    repo = readable(request)

    def listed(kind: str, commits: Mapping[str, Commit]) -> Iterable[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": at.oid} for name, at in commits.items()]

    answer = {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []}
    if "include_prs" in request.query_params:
        answer["pullRequests"] = listed("pr", repo.pulls)
    return JSONResponse(answer)


async def commits(request: Request) -> Response:
    history = readable(request).find(parameter(request, "revision")).history()
    return JSONResponse(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            }
            for commit in history
        ]
    )


async def create_tag(request: Request) -> Response:
    repo, _ = writable(request)
    commit, name = repo.find(parameter(request, "revision")), (await request.json())["tag"]
    if name in repo.tags:
        raise Refusal(409, f"Tag reference exists already: {name}")
    repo.tags[name] = commit
    return Response()


async def delete_tag(request: Request) -> Response:
    repo, _ = writable(request)
    # The route is that of `create_tag`: what is a revision there is the tag here.
    if repo.tags.pop(parameter(request, "revision"), None) is None:
        raise revision_not_found(parameter(request, "revision"))
    return Response()


async def create_branch(request: Request) -> Response:
    repo, _ = writable(request)
    name, body = parameter(request, "branch"), await request.json()
    commit = repo.find(body.get("startingPoint") or "main")
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: {name}")
    repo.branches[name] = commit
    return Response()


async def delete_branch(request: Request) -> Response:
    repo, _ = writable(request)
    name = parameter(request, "branch")
    if name == "main":
        raise Refusal(403, "The main branch cannot be deleted")
    if repo.branches.pop(name, None) is None:
        raise revision_not_found(name)
    return Response()
