"""`llama-probe push` and `llama-probe pull`. The token is the one of `hf auth login` or `HF_TOKEN`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import CommitInfo

from ..heads.probe import ProbeModel
from ..hub.publish import pull_head, push_folder
from ..hub.resolve import resolve_head
from ..hub.transport import HubOptions
from .options import CreatePr, Private, PushRevision, Result, Revision, TrustRemoteCode, check_revision


def push(
    head: Annotated[str, typer.Argument(help="A head folder, or the alias of a bundled head.")],
    repo_id: Annotated[str, typer.Argument(help="user/name; created if it does not exist.")],
    subfolder: Annotated[str | None, typer.Option(help="Folder in the repository, for several heads in one.")] = None,
    private: Private = None,
    revision: PushRevision = None,
    create_pr: CreatePr = False,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A further tag for the card. Repeatable.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the head, if its results do not state it.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Upload a head folder to the Hub in one commit."""
    folder = resolve_head(head)
    ProbeModel.from_pretrained(folder, trust_remote_code=trust_remote_code)  # raises if the head is damaged
    info = push_folder(
        folder,
        repo_id,
        subfolder=subfolder,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        tags=tag or [],
        license=license,
    )
    pushed = commit_facts(info)
    return pushed, partial(print_commit, pushed)


def commit_facts(info: CommitInfo) -> dict[str, str | None]:
    """Return the JSON values of a commit."""
    return {"commit": info.oid, "url": info.commit_url, "pull_request": info.pr_url}


def print_commit(pushed: dict[str, str | None]) -> None:
    """Print the address of a commit, or of its pull request."""
    print(f"pushed: {pushed['pull_request'] or pushed['url']}")


def pull(
    head: Annotated[str, typer.Argument(help="user/repo, with @revision and :subfolder if needed.")],
    output: Annotated[Path | None, typer.Option(help="Folder for it. Default: one of the head's name.")] = None,
    revision: Revision = None,
    force_download: Annotated[bool, typer.Option("--force-download", help="Fetch cached files again.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Copy a head from the Hub into a folder."""
    check_revision(head, revision)
    check = partial(ProbeModel.from_pretrained, trust_remote_code=trust_remote_code)
    folder = pull_head(head, output, HubOptions(revision, force_download=force_download), check=check)
    return {"folder": str(folder)}, partial(print, f"head written to {folder}")
