"""`llama-probe push` and `llama-probe pull`. The token is the one of `hf auth login` or `HF_TOKEN`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Revision, hub_options


def push(
    head: Annotated[str, typer.Argument(help="A head folder, or the alias of a bundled head.")],
    repo_id: Annotated[str, typer.Argument(help="user/name; created where it does not exist.")],
    subfolder: Annotated[str | None, typer.Option(help="Folder in the repository, so that it holds several.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created where it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Of the one commit.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A further tag for the card; may be given again.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the head, where its results do not state it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload a head to the Hub in one commit: config, weights, results, plots and card."""
    from ..heads.probe import ProbeModel
    from ..hub.publish import push_folder
    from ..hub.resolve import resolve_head

    folder = resolve_head(head)
    ProbeModel.from_pretrained(folder)  # raises if the head is damaged
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
    if as_json:
        print(json.dumps({"commit": info.oid, "url": info.commit_url, "pull_request": info.pr_url}))
    else:
        print(f"pushed: {info.pr_url or info.commit_url}")


def pull(
    head: Annotated[str, typer.Argument(help="user/repo, with @revision and :subfolder where wanted.")],
    output: Annotated[Path | None, typer.Option(help="Folder for it; one of the head's name where left out.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Copy a head from the Hub into a folder."""
    from ..heads.probe import ProbeModel
    from ..hub.publish import pull_head

    folder = pull_head(head, output, hub_options(head, revision), check=ProbeModel.from_pretrained)
    print(json.dumps({"folder": str(folder)}) if as_json else f"head written to {folder}")
