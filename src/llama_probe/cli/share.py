"""`llama-probe push`, `pull` and `export`, with the token of `hf auth login` or `HF_TOKEN`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from huggingface_hub import CommitInfo

from ..backbone.loading import DtypeName, backbone_target
from ..errors import ProbeError
from ..evaluation.plots import write_plots
from ..files import JSON, check_new_folder, check_writable
from ..heads.probe import ProbeModel
from ..hub.card import write_card
from ..hub.folder import list_heads
from ..hub.publish import pull_head, push_folder
from ..hub.resolve import resolve_head
from ..hub.transport import HubOptions
from ..serving.loading import read_heads
from .options import BACKBONE, PROBE, Result


@dataclass(kw_only=True)
class Upload:
    """Place of an upload.

    Attributes:
        private: visibility of a new repository.
        revision: branch to push to; created if it does not exist.
        create_pr: open a pull request instead.
    """

    private: Annotated[bool | None, {"names": "--private/--public"}] = None
    revision: str | None = None
    create_pr: bool = False


def push(
    head: str,
    repo_id: str,
    /,
    *,
    place: Upload,
    subfolder: str | None = None,
    commit_message: str | None = None,
    tag: list[str] | None = None,
    license: str | None = None,
) -> Result:
    """Upload a head folder to the Hub in one commit.

    Args:
        head: a head folder, or the alias of a bundled head.
        repo_id: name of the repository, user/name; created if it does not exist.
        subfolder: folder in the repository, for several heads in one.
        commit_message: message of the commit.
        tag: a further tag for the card.
        license: licence of the head, if its results do not state it.
    """
    folder = resolve_head(head)
    ProbeModel.from_pretrained(folder)  # raises if the head is damaged
    info = push_folder(
        folder, repo_id, subfolder=subfolder, commit_message=commit_message, tags=tag or [], license=license,
        **vars(place),
    )  # fmt: skip
    values, line = _pushed(info)
    return values, partial(print, line)


def pull(
    head: str,
    /,
    *,
    output: Path | None = None,
    revision: str | None = None,
    force_download: bool = False,
) -> Result:
    """Copy a head from the Hub into a folder.

    Args:
        head: name of the repository, user/repo, with @revision and :subfolder if needed.
        output: folder for it. Default: one of the head's name.
        force_download: fetch cached files again.
    """
    options = HubOptions(revision, force_download=force_download)
    folder = pull_head(head, output, options, check=ProbeModel.from_pretrained)
    return {"folder": str(folder)}, partial(print, f"head written to {folder}")


def export(
    output: Path,
    /,
    *,
    place: Upload,
    probe: Annotated[list[str], PROBE] = ("safety",),
    backbone: Annotated[str, BACKBONE] = "demo",
    dtype: DtypeName = "auto",
    base_model: str | None = None,
    license: str | None = None,
    push: str | None = None,
) -> Result:
    """Write a Hub repository that runs backbone and heads without this package.

    Args:
        output: folder for the repository. Must not exist, or be empty.
        probe: a head for it.
        backbone: the model for it.
        base_model: Hub id of the backbone, for the card.
        license: licence of the repository, for the card: the strictest of backbone and heads.
        push: also upload it, as user/name.
    """
    unused = [name for name, value in vars(place).items() if value not in (None, False)]
    if push is None and unused:
        raise ProbeError(f"--{unused[0].replace('_', '-')} needs --push USER/NAME")
    check_new_folder(output.absolute())
    check_writable(output.absolute(), "the repository")
    heads = read_heads(probe, backbone_target(backbone))
    from ..serving.export import export_repository, push_repository  # takes seconds to import

    folder = export_repository(
        backbone, output, heads, dtype=dtype, base_model=base_model, license=license, repo_id=push
    )
    for name, head in list_heads(folder).items():
        if write_plots(head):
            write_card(head, source=f"{push}:{name}" if push else None)  # shows the plots
    values = {"folder": str(folder)}
    lines = [f"repository written to {output}; its README.md tells how to use it"]
    if push is not None:
        pushed, line = _pushed(push_repository(folder, push, **vars(place)))
        values |= pushed
        lines.append(line)
    return values, partial(print, *lines, sep="\n")


def _pushed(info: CommitInfo) -> tuple[JSON, str]:
    values = {"commit": info.oid, "url": info.commit_url, "pull_request": info.pr_url}
    return values, f"pushed: {info.pr_url or info.commit_url}"
