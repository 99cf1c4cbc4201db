"""`llama-probe export`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.plots import write_plots
from ..hub.card import write_card
from ..hub.folder import list_heads
from ..serving.export import export_repository, push_repository
from .options import Backbone, CreatePr, Dtype, Json, Private, Probes, PushRevision, TrustRemoteCode


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
    as_json: Json = False,
) -> None:
    """Write a Hub repository that runs backbone and heads without this package."""
    info = None
    with contextlib.redirect_stdout(sys.stderr):
        folder = export_repository(
            backbone,
            output,
            probe,
            dtype=dtype,
            base_model=base_model,
            license=license,
            repo_id=push,
            trust_remote_code=trust_remote_code,
        )
        for name, head in list_heads(folder).items():
            if write_plots(head):
                write_card(head, source=f"{push}:{name}" if push else None)  # shows the plots
        if push is not None:
            info = push_repository(folder, push, private=private, revision=revision, create_pr=create_pr)
    if as_json:
        pushed = {} if info is None else {"commit": info.oid, "url": info.commit_url, "pull_request": info.pr_url}
        print(json.dumps({"folder": str(folder), **pushed}))
        return
    print(f"repository written to {output}; its README.md tells how to use it")
    if info is not None:
        print(f"pushed: {info.pr_url or info.commit_url}")
