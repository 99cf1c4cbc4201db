"""`llama-probe push`, `pull` and `export`. The token is the one of `hf auth login` or `HF_TOKEN`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import CommitInfo

from ..backbone.loading import backbone_target
from ..evaluation.plots import write_plots
from ..files import check_new_folder
from ..heads.probe import ProbeModel
from ..hub.card import write_card
from ..hub.folder import list_heads
from ..hub.publish import pull_head, push_folder
from ..hub.resolve import resolve_head
from ..hub.transport import HubOptions
from ..serving.host import read_heads
from .options import Backbone, Dtype, Probes, Result, Revision, TrustRemoteCode, check_revision


Private = Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")]
PushRevision = Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")]


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
    card = {"tags": tag or [], "license": license}
    place = {"private": private, "revision": revision, "create_pr": create_pr, "commit_message": commit_message}
    pushed = _facts(push_folder(folder, repo_id, subfolder=subfolder, **place, **card))
    return pushed, partial(print, _in_words(pushed))


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


def export(
    output: Annotated[Path, typer.Argument(help="Folder for the repository. Must not exist, or be empty.")],
    probe: Probes = ["safety"],  # noqa: B006 - typer copies it
    backbone: Backbone = "demo",
    dtype: Dtype = "auto",
    base_model: Annotated[str | None, typer.Option(help="Hub id of the backbone, for the card.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the repository, for the card: the strictest of backbone and heads.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Also upload it, as user/name.")] = None,
    private: Private = None,
    revision: PushRevision = None,
    create_pr: CreatePr = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Write a Hub repository that runs backbone and heads without this package."""
    check_new_folder(output.absolute())
    heads = read_heads(probe, backbone_target(backbone), HubOptions(trust_remote_code=trust_remote_code))
    from ..serving.export import export_repository, push_repository  # takes seconds to import

    facts = {"base_model": base_model, "license": license, "repo_id": push}
    folder = export_repository(backbone, output, heads, dtype=dtype, **facts)
    for name, head in list_heads(folder).items():
        if write_plots(head):
            write_card(head, source=f"{push}:{name}" if push else None)  # shows the plots
    values, lines = {"folder": str(folder)}, [f"repository written to {output}; its README.md tells how to use it"]
    if push is not None:
        pushed = _facts(push_repository(folder, push, private=private, revision=revision, create_pr=create_pr))
        values |= pushed
        lines.append(_in_words(pushed))
    return values, partial(print, *lines, sep="\n")


def _facts(info: CommitInfo) -> dict[str, Any]:
    return {"commit": info.oid, "url": info.commit_url, "pull_request": info.pr_url}


def _in_words(pushed: dict[str, Any]) -> str:
    return f"pushed: {pushed['pull_request'] or pushed['url']}"
