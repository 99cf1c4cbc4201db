"""A Hub repository that runs without the package: backbone, tokenizer, heads, and the code that reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCardData

from ..backbone.decoder import backbone_name
from ..backbone.loading import backbone_target, load_backbone
from ..errors import ProbeError
from ..files import check_new_folder, new_folder, package_version
from ..heads.match import check_backbone
from ..heads.probe import ProbeModel
from ..heads.registry import is_own_type
from ..hub.card import card_template, is_hub_id, write_card
from ..hub.folder import CARD_NAME, HEAD_FILES
from ..hub.publish import check_links, hide_local_path
from ..hub.transport import commit_files
from .loading import SAVED_HEADS


SUFFIX = "_llama_probe"  # of the files of the runtime
# Files of an earlier export that would be loaded beside, or in place of, the new ones.
_OWN_FILES = re.compile(
    rf"\w+{SUFFIX}\.py|"
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|chat_template\.jinja"
    r"|additional_chat_templates/.*"
)
_CARD = Path(__file__).with_name("export_card.md")
# Model types that the runtime was tested with, and the stems of their classes: XForCausalLM.
FAMILIES = {
    "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma3_text": "Gemma3", "phi3": "Phi3",
}  # fmt: skip


def export_repository(
    backbone: str,
    folder: str | os.PathLike,
    heads: Mapping[str, ProbeModel],
    *,
    dtype: str = "auto",
    base_model: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a repository that `AutoModel.from_pretrained(folder, probe="name", trust_remote_code=True)` loads.

    Loading it needs transformers, torch and safetensors. Without `probe=` it is the plain backbone. A head that follows replies or
    reads tool results needs the package.

    Args:
        folder: a new or empty folder.
        dtype: dtype to load the backbone in; `"auto"` is that of the checkpoint.
        base_model: Hub id of the backbone, for the card. Defaults to `backbone`, or what its heads record.
        license: licence of the whole, for the card: the strictest of the backbone and the heads.
        repo_id: the repository to which the folder will be pushed, for the cards.

    Returns:
        The absolute path of the folder.

    Raises:
        ProbeError: the folder is not empty, the backbone is of another family than `FAMILIES` or cannot be saved, a head does not
            fit, or has a type from outside the package. Nothing is written then.
    """
    folder = Path(folder).absolute()
    check_new_folder(folder)
    for name, head in heads.items():
        if is_own_type(probe_type := head.config.probe_type):
            raise ProbeError(
                f"head {name!r} has a type of your own, {probe_type!r}: an export cannot carry it, leave it out"
            )
    if (target := backbone_target(backbone)) is not None:
        _check_family(target.model_type)
    lm, tokenizer = load_backbone(backbone, dtype, device="cpu", is_copied=True)
    _check_family(model_type := lm.config.model_type)
    if any(type(module).__module__.startswith("peft.") for module in lm.modules()):
        raise ProbeError("the backbone carries a PEFT adapter: merge it first (model.merge_and_unload())")
    for name, head in heads.items():
        check_backbone(name, head.config, lm, alias=head.alias)
    known = [backbone_name(lm), *(head.config.base_model_name_or_path for head in heads.values())]
    base_model = base_model or next(filter(is_hub_id, known), None)
    vars(lm.config).pop(SAVED_HEADS, None)  # the heads here are those of `heads`
    lm.config.auto_map = auto_map(model_type)
    if base_model is not None:
        lm.config.base_model_name_or_path = base_model
    with new_folder(folder) as repository:
        try:
            lm.save_pretrained(repository)
        except ValueError as error:  # a quantiser that cannot write its weights, a generation config of another use
            raise ProbeError(f"the backbone cannot be saved: {' '.join(str(error).split())}") from error
        tokenizer.save_pretrained(repository)
        for name, text in runtime_files().items():
            (repository / name).write_text(text, encoding="utf-8")
        for name, head in heads.items():
            hide_local_path(head.save_pretrained(repository / name))
            write_card(repository / name, source=f"{repo_id}:{name}" if repo_id else None)
        tags = {"pipeline_tag": "text-generation", "tags": ["llama_probe", "probe", "custom_code"]}
        metadata = ModelCardData(library_name="llama_probe", license=license, base_model=base_model, **tags)
        rows = [_row(name, head) for name, head in heads.items()]
        chat = bool(tokenizer.chat_template) and rows[0]["config"].prompt_format != "raw"
        values = {"metadata": metadata.to_yaml(), "heads": rows, "base": base_model, "chat": chat}
        name = repo_id or folder.name  # the argument of `from_pretrained` in its examples
        card = card_template(_CARD).render(**values, name=name, version=package_version()) + "\n"
        (repository / CARD_NAME).write_text(card, encoding="utf-8")
    return folder


def push_repository(folder: str | os.PathLike, repo_id: str, **kwargs) -> CommitInfo:
    """Upload an exported folder in one commit; repository and branch are created if missing.

    If the push fails, or another push comes before it, the branch is not changed. Weights and code of an earlier export are
    replaced; other files stay.

    Args:
        folder: from `export_repository`.
        repo_id: `user/name`, or a name for the own user.
        kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message`, as in `PreTrainedModel.push_to_hub`.

    Raises:
        ProbeError: it has links to files elsewhere, or the Hub refused the upload.
    """
    folder = Path(folder)
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    check_links(folder, files)

    def is_stale(file: str) -> bool:
        head, _, name = file.rpartition("/")
        return _OWN_FILES.fullmatch(file) is not None or (
            name in HEAD_FILES and head != "" and (folder / head).is_dir()
        )

    options: dict[str, Any] = {"commit_message": "Upload a model with probe heads with llama_probe", **kwargs}
    return commit_files(repo_id, {file: folder / file for file in files}, is_stale, **options)


def runtime_files() -> dict[str, str]:
    """Return the texts of the runtime by file name: `modeling/`, beside the package's modules or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next(path / "modeling" for path in (package, package.parents[1]) if (path / "modeling").is_dir())
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*{SUFFIX}.py"))}


def auto_map(model_type: str) -> dict[str, str]:
    """Return the `auto_map` of an exported `config.json`."""
    name = f"modeling{SUFFIX}.{FAMILIES[model_type]}ForProbedGeneration"
    return {"AutoModel": name, "AutoModelForCausalLM": name}


def _check_family(model_type: str | None) -> None:
    if model_type is not None and model_type not in FAMILIES:  # it may not be known before the backbone is loaded
        raise ProbeError(f"model_type={model_type!r} cannot be exported; allowed: {', '.join(FAMILIES)}")


def _row(name: str, head: ProbeModel) -> dict[str, Any]:
    """Return the values of a head for the card of the repository."""
    alone = not (head.config.reads_reply or head.config.token_scope == "tool")
    return {"name": name, "config": head.config, "facts": (head.results or {}).get("card", {}), "alone": alone}
