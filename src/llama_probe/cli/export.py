"""`llama-probe export`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..backbone.loading import backbone_target
from ..evaluation.plots import write_plots
from ..files import check_new_folder
from ..hub.card import write_card
from ..hub.folder import list_heads
from ..hub.transport import HubOptions
from ..serving.sources import read_heads
from .options import Backbone, CreatePr, Dtype, Private, Probes, PushRevision, Result, TrustRemoteCode
from .share import commit_facts, print_commit


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

    folder = export_repository(
        backbone, output, heads, dtype=dtype, base_model=base_model, license=license, repo_id=push
    )
    for name, head in list_heads(folder).items():
        if write_plots(head):
            write_card(head, source=f"{push}:{name}" if push else None)  # shows the plots
    pushed = {}
    if push is not None:
        pushed = commit_facts(push_repository(folder, push, private=private, revision=revision, create_pr=create_pr))
    return {"folder": str(folder), **pushed}, partial(_print, output, pushed)


def _print(output: Path, pushed: dict[str, str | None]) -> None:
    print(f"repository written to {output}; its README.md tells how to use it")
    if pushed:
        print_commit(pushed)
