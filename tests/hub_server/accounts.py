"""Users and their tokens, and what each token may do with a repository."""

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field

from .refusal import Refusal
from .repository import Repository


ROLES = ("read", "write", "fine")


@dataclass(frozen=True)
class Token:
    """A user's token; a `fine` one reaches only the `repos` it names, besides what everyone may read."""

    value: str = field(repr=False)
    user: str
    role: str
    repos: frozenset[str] = frozenset()

    def may_read(self, repo: Repository) -> bool:
        return not repo.private or self._owns(repo)

    def may_propose(self, repo: Repository) -> bool:
        """Whether the token may open a pull request, which needs no rights on the branch."""
        return self.may_write(repo) or (self.role == "write" and self.may_read(repo))

    def may_write(self, repo: Repository) -> bool:
        return self.role != "read" and self._owns(repo)

    def may_create(self, namespace: str) -> bool:
        return self.role == "write" and self.user == namespace

    def _owns(self, repo: Repository) -> bool:
        return self.user == repo.owner and (self.role != "fine" or repo.id in self.repos)


class Accounts:
    """All users of a server."""

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.tokens: dict[str, Token] = {}

    def add_user(self, name: str) -> str:
        """Adds a user; returns a token that may write to the user's repositories."""
        self.users.add(name)
        return self.add_token(name, "write")

    def add_token(self, name: str, role: str, repos: Iterable[str] = ()) -> str:
        """Adds a token of a role (`read`, `write` or `fine`) for a known user; `repos` are those a `fine` one names."""
        if name not in self.users or role not in ROLES:
            raise ValueError(f"no user {name!r} or no role {role!r} (roles: {', '.join(ROLES)})")
        value = "hf_" + "".join(secrets.choice(string.ascii_letters) for _ in range(34))
        self.tokens[value] = Token(value, name, role, frozenset(repos))
        return value

    def find(self, authorization: str | None) -> Token | None:
        """The token of an Authorization header; `None` without a header, a `Refusal` for a token that is not known."""
        if authorization is None:
            return None
        token = self.tokens.get(authorization.removeprefix("Bearer "))
        if token is None:
            # The client tells a wrong token from a hidden repository by exactly these words.
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token
