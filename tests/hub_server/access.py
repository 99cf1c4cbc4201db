"""The repository of a request, opened for what its token may do."""

import re
from urllib.parse import unquote

from starlette.requests import Request

from .accounts import Token
from .refusal import Refusal, repo_not_found
from .repository import Repository


def parameter(request: Request, name: str) -> str:
    """A part of the path, without its quotes: routes match the path as it came, where a revision is one quoted part."""
    return unquote(request.path_params[name])


def repo_id_of(request: Request) -> str:
    """`namespace/name` of the path; a name alone is the id of a repository without a namespace. Data sets begin with `datasets/`."""
    kind = ["datasets"] if re.match(r"/(api/|cdn/)?datasets/", request.url.path) else []
    return "/".join(
        [*kind, *(parameter(request, part) for part in ("namespace", "name") if part in request.path_params)]
    )


def visitor(request: Request) -> Token | None:
    """The token that came with a request; a `Refusal` (401) for one that is not known."""
    return request.state.hub.accounts.find(request.headers.get("authorization"))


def known_visitor(request: Request) -> Token:
    """As `visitor`, with a `Refusal` (401) where no token came."""
    token = visitor(request)
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    return token


def readable(request: Request, repo_id: str | None = None) -> Repository:
    """The repository that a request names, if its token may know of it; a `Refusal` otherwise."""
    token = visitor(request)
    repo = request.state.hub.repositories.get(repo_id or repo_id_of(request))
    if repo is None or (repo.private if token is None else not token.may_read(repo)):
        raise repo_not_found(known=token is not None)
    return repo


def downloadable(request: Request) -> Repository:
    """As `readable`, with a `Refusal` (401 or 403) for a gated repository whose owner has not let the user in."""
    repo, token = readable(request), visitor(request)
    if repo.gated and (token is None or token.user not in {repo.owner, *repo.granted}):
        message = f"Access to model {repo.id} is restricted. You must have access to it and be authenticated."
        raise Refusal(401 if token is None else 403, message, "GatedRepo")
    return repo


def writable(request: Request, repo_id: str | None = None, proposal: bool = False) -> tuple[Repository, Token]:
    """As `readable`, for a token that may write (or, for a `proposal`, open a pull request); 403 for another."""
    repo, token = readable(request, repo_id), known_visitor(request)
    if not (token.may_propose(repo) if proposal else token.may_write(repo)):
        raise Refusal(403, "Forbidden: this token has no write access to the repository")
    return repo, token
