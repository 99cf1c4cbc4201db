"""Routes of repositories as a whole: who asks, create, delete, settings, search and what a model's page says."""

import json
import re
from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .access import downloadable, known_visitor, parameter, readable, repo_id_of, visitor, writable
from .refusal import Refusal
from .repository import FIRST_FILES, Blob, Commit, Repository


def card_data(readme: str) -> tuple[dict[str, Any], str | None]:
    """The metadata at the head of a README, and what is wrong with it."""
    match = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r?\n|$)", readme, re.DOTALL)
    if match is None:
        return {}, None
    try:
        data = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        return {}, f"the metadata is not valid YAML: {error}"
    if not isinstance(data, dict):
        return {}, "the metadata must be a mapping"
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        return {}, '"tags" must be an array of strings'
    return json.loads(json.dumps(data, default=str)), None


def model_tags(card: dict[str, Any], commit: Commit) -> list[str]:
    """The tags of a model: those of its card, and those that the Hub makes from the card's other fields."""
    tags = [*card.get("tags", []), *(card[key] for key in ("library_name", "pipeline_tag") if key in card)]
    for key, prefix in (("license", "license:"), ("base_model", "base_model:"), ("datasets", "dataset:")):
        values = card.get(key, [])
        tags += [f"{prefix}{value}" for value in (values if isinstance(values, list) else [values])]
    if any(path.endswith(".safetensors") for path in commit.files):
        tags.append("safetensors")
    return list(dict.fromkeys(tags))


def file_entry(path: str, blob: Blob, name: str, oid: str) -> dict[str, Any]:
    """A file as the API lists it; `name` and `oid` are the keys under which the path and the blob's name go."""
    entry: dict[str, Any] = {name: path, "size": blob.size, oid: blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


def describe(repo: Repository, commit: Commit, with_blobs: bool = False) -> dict[str, Any]:
    """What the API says of a model at a commit."""
    readme = commit.files.get("README.md", Blob(b"")).data.decode("utf-8", "replace")
    card, _ = card_data(readme)
    siblings = [
        file_entry(path, commit.files[path], "rfilename", "blobId") if with_blobs else {"rfilename": path}
        for path in sorted(commit.files)
    ]
    return {
        "_id": repo.id,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.owner,
        "sha": commit.oid,
        "createdAt": repo.created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "lastModified": commit.date.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": model_tags(card, commit),
        **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
        **({"cardData": card} if card else {}),
        "siblings": siblings,
    }


def _chosen(info: dict[str, Any], request: Request) -> dict[str, Any]:
    """Only the fields that a request names with `expand`."""
    fields = request.query_params.getlist("expand")
    return {key: value for key, value in info.items() if key in {"_id", "id", *fields}} if fields else info


def is_private(body: dict[str, Any], default: bool = False) -> bool:
    """What a request wants a repository to be; clients before 2.0 say it with `private`."""
    return body["visibility"] == "private" if "visibility" in body else body.get("private", default)


async def whoami(request: Request) -> Response:
    token = known_visitor(request)
    role = {"fine": "fineGrained"}.get(token.role, token.role)
    auth = {"type": "access_token", "accessToken": {"displayName": "token", "role": role}}
    return JSONResponse({"type": "user", "id": token.user, "name": token.user, "orgs": [], "auth": auth})


async def create(request: Request) -> Response:
    hub, token, body = request.state.hub, known_visitor(request), await request.json()
    if body.get("type") not in (None, "model"):
        raise Refusal(400, "This server holds models only")
    owner, name = body.get("organization") or token.user, body["name"]
    if not token.may_create(owner):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    if not re.fullmatch(r"\w([\w.-]{0,94}\w)?", name, re.ASCII) or re.search(r"--|\.\.|\.git$", name):
        raise Refusal(400, f"Invalid repo name: {name}")
    repo_id = f"{owner}/{name}"
    answer = {"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in hub.repositories:
        return JSONResponse({"error": "You already created this model repo", **answer}, 409)
    first = {path: Blob(data) for path, data in FIRST_FILES.items()}
    hub.repositories[repo_id] = Repository(repo_id, first, is_private(body))
    return JSONResponse(answer)


async def delete(request: Request) -> Response:
    body = await request.json()
    owner = body.get("organization") or known_visitor(request).user
    repo, _ = writable(request, f"{owner}/{body['name']}")
    del request.state.hub.repositories[repo.id]
    return Response()


async def settings(request: Request) -> Response:
    repo, _ = writable(request)
    body = await request.json()
    repo.private = is_private(body, repo.private)
    if "gated" in body:
        repo.gated = body["gated"]
    return JSONResponse({"visibility": "private" if repo.private else "public", "gated": repo.gated})


async def validate_card(request: Request) -> Response:
    data, error = card_data((await request.json())["content"])
    if error is not None:
        return JSONResponse({"errors": [{"message": error}], "warnings": []}, 400)
    warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": [], "warnings": warnings})


async def search(request: Request) -> Response:
    token, query = visitor(request), request.query_params
    models = []
    for repo in request.state.hub.repositories.values():
        info = describe(repo, repo.find("main"))
        if (
            (token.may_read(repo) if token else not repo.private)
            and query.get("author") in (None, repo.owner)
            and query.get("search", "").lower() in repo.id.lower()
            and query.get("pipeline_tag") in (None, info.get("pipeline_tag"))
            and set(query.getlist("filter")) <= set(info["tags"])
        ):
            models.append(info)
    models.sort(key=lambda info: info["lastModified"], reverse=True)
    hidden = set() if "full" in query or "expand" in query else {"siblings", "author", "sha", "lastModified"}
    hidden |= set() if "cardData" in query or "expand" in query else {"cardData"}
    listed = [{key: value for key, value in info.items() if key not in hidden} for info in models]
    return JSONResponse([_chosen(info, request) for info in listed[: int(query.get("limit", len(listed)))]])


async def info(request: Request) -> Response:
    repo = readable(request)
    revision = parameter(request, "revision") if "revision" in request.path_params else "main"
    return JSONResponse(_chosen(describe(repo, repo.find(revision), "blobs" in request.query_params), request))


async def may_read(request: Request) -> Response:
    downloadable(request)
    return JSONResponse({})


async def may_write(request: Request) -> Response:
    writable(request, repo_id_of(request))
    return JSONResponse({})
