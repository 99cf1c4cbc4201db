"""A Hub repository that runs without the package: backbone, tokenizer, heads, and the code that reads them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard, ModelCardData
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..backbone.decoder import target_of
from ..backbone.loading import backbone_target, load_backbone, model_id, resolve_backbone
from ..errors import ProbeError
from ..files import check_new_folder, new_folder, package_version, write_atomically
from ..heads import get_probe_type, probe_types
from ..heads.configuration import read_config
from ..heads.match import check_backbone
from ..heads.probe import ProbeModel
from ..hub.card import cell, code, example_chat, word, write_card
from ..hub.folder import CARD_NAME, HEAD_FILES, is_head_folder, read_results
from ..hub.publish import check_links
from ..hub.transport import HubReference, commit_files
from .pipeline import TASK
from .remote_code import AUTO_MAP, CUSTOM_PIPELINES, SUFFIX, flat_files, write_flat_files
from .sources import ProbeSpec, read_heads


logger = logging.get_logger(__name__)

_CONFIG_NAME = "config.json"
_TEXT = '"Write me a short poem about rain."'
# Files of an earlier export that would be loaded beside, or in place of, the new ones.
_OWN_FILES = re.compile(
    rf"\w+{SUFFIX}\.py|"
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|chat_template\.jinja"
    r"|additional_chat_templates/.*"
)


def export_repository(
    backbone: PreTrainedModel | str | os.PathLike,
    folder: str | os.PathLike,
    probe: ProbeSpec | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    base_model: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Writes a repository that `AutoModel.from_pretrained(folder, probe="name", trust_remote_code=True)` loads.

    Whoever loads it needs transformers, torch and safetensors. Without `probe=` and `trust_remote_code=True` it is the
    plain backbone.

    Args:
        backbone: `"demo"`, a folder, a Hub id, or a loaded `LlamaForCausalLM`, with heads or without.
        folder: must not exist, or be empty.
        probe: heads; see `read_heads`. Those that are attached to a loaded backbone are exported as well.
        tokenizer: that of the backbone where left out.
        dtype: in which a backbone is loaded that is not loaded yet; `"auto"` takes the checkpoint's.
        base_model: Hub id of the backbone, for the card; told from the backbone or its heads where left out.
        license: of the whole, for the card: the strictest of the backbone's and the heads'.
        repo_id: where it will be pushed, for the cards.

    Returns:
        The folder.

    Raises:
        ProbeError: the folder holds something, the backbone is no plain Llama or cannot be saved, there is no head, a
            head does not fit or is of a kind from outside the package, or its name is taken by a file. Nothing is then left
            behind.
    """
    folder = Path(folder).absolute()
    check_new_folder(folder)
    code = flat_files()
    if isinstance(backbone, (str, os.PathLike)):
        heads = read_heads(probe, backbone_target(str(backbone)))
        _check_names(heads, code)
        _check_kinds(heads)
        path = resolve_backbone(str(backbone))
        _check_family(path)
        lm, own_tokenizer = load_backbone(path, dtype, device="cpu")
        tokenizer = tokenizer or own_tokenizer
    else:
        lm = backbone
        _check_class(lm)
        heads = _with_attached(lm, read_heads(probe, target_of(lm)))
        _check_names(heads, code)
        _check_kinds(heads)
        tokenizer = tokenizer or _tokenizer_of(lm)
    _check_class(lm)
    for name, head in heads.items():
        check_backbone(name, head.config, lm)
    if license is None:
        logger.warning("the card states no licence: pass license=, the strictest of the backbone's and the heads'")
    base_model = base_model or _base_model(backbone, lm, heads)
    with new_folder(folder) as repository:
        try:
            lm.save_pretrained(repository)
        except ValueError as error:  # a quantiser that cannot write its weights, a generation config of another use
            raise ProbeError(f"the backbone cannot be saved: {' '.join(str(error).split())}") from error
        tokenizer.save_pretrained(repository)
        write_flat_files(repository)
        _complete_config(repository / _CONFIG_NAME, base_model)
        for name, head in heads.items():
            _write_head(head, repository / name, repo_id)
        card = _card(
            repository, list(heads), repo_id or folder.name, base_model, license, bool(tokenizer.chat_template)
        )
        write_atomically({repository / CARD_NAME: lambda path: path.write_text(str(card), encoding="utf-8")})
    return folder


def push_repository(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> CommitInfo:
    """Uploads an exported folder in one commit, creating repository and branch where they are missing.

    A push that fails at any point leaves the branch where it was, and where somebody else pushed in the meantime it is
    refused rather than merged. Weights and code of an earlier export are replaced; other files stay.

    Args:
        folder: from `export_repository`.
        repo_id: `user/name`, or a name for the own user.
        private, token, revision, create_pr, commit_message: as in `PreTrainedModel.push_to_hub`.

    Raises:
        ProbeError: the folder is not an exported repository, or has links to files elsewhere, or the Hub refused, with its
            reason.
    """
    folder = Path(folder)
    _check_exported(folder)
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    check_links(folder, files)
    return commit_files(
        repo_id,
        {file: folder / file for file in files},
        lambda path: _is_stale(path, folder),
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload a model with probe heads with llama_probe",
    )


def _check_family(path: str) -> None:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError):  # loading the backbone will tell what is wrong
        return
    if type(config) is not LlamaConfig:
        raise ProbeError(_only_llama(f"{path} is of the type {config.model_type!r}"))


def _check_class(lm: PreTrainedModel) -> None:
    plain = getattr(type(lm), "_causal_lm_class", type(lm))
    if any(type(module).__module__.startswith("peft.") for module in lm.modules()):
        raise ProbeError("the backbone carries a PEFT adapter: merge it first (model.merge_and_unload())")
    if plain is not LlamaForCausalLM:
        raise ProbeError(_only_llama(f"this is a {plain.__name__}"))


def _only_llama(found: str) -> str:
    return (
        f"only LlamaForCausalLM can be exported with its code, and {found}; push heads of other families by themselves "
        "(push_probe_to_hub) and use them with the package"
    )


def _with_attached(lm: PreTrainedModel, heads: Mapping[str, ProbeModel]) -> dict[str, ProbeModel]:
    attached = dict(lm.probes.items()) if hasattr(lm, "probes") else {}
    if twice := attached.keys() & heads.keys():
        raise ProbeError(f"heads {sorted(twice)} are attached already; pass a dict name -> head to rename the others")
    return attached | heads


def _check_names(heads: Iterable[str], code: Iterable[str]) -> None:
    """Raises `ProbeError` where there is no head, or where one cannot have a folder of its name in the repository."""
    names = list(heads)
    if not names:
        raise ProbeError("there is no head to export: pass probe=")
    # Names have no dots, and so cannot meet files; but Python takes a folder for a module of the same name.
    taken = {Path(file).stem for file in code} | {"additional_chat_templates"}
    for name in names:
        if name.casefold() in taken:
            raise ProbeError(f"a head cannot be called {name!r} in a repository: a file or folder there has that name")
    if len({name.casefold() for name in names}) < len(names):
        raise ProbeError(
            f"heads {sorted(names)} differ in upper and lower case only; some file systems take them for one"
        )


def _check_kinds(heads: Mapping[str, ProbeModel]) -> None:
    """Raises `ProbeError` where the code that goes along does not know the kind of a head."""
    own = [
        kind
        for kind in probe_types()
        if get_probe_type(kind).__module__.startswith(f"{__package__.partition('.')[0]}.")
    ]
    for name, head in heads.items():
        if head.config.probe_type not in own:
            raise ProbeError(
                f"head {name!r} is of the kind {head.config.probe_type!r}, which the code in the repository would not know; it "
                f"has {', '.join(own)}. Push the head by itself (push_probe_to_hub), for where its kind is registered"
            )


def _tokenizer_of(lm: PreTrainedModel) -> PreTrainedTokenizerBase:
    name = getattr(lm.config, "_name_or_path", None)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError):
        raise ProbeError(
            f"the backbone's tokenizer was not found in {name or 'its config'}: pass tokenizer="
        ) from None


def _base_model(backbone, lm: PreTrainedModel, heads: Mapping[str, ProbeModel]) -> str | None:
    given = [model_id(str(backbone))] if isinstance(backbone, (str, os.PathLike)) else []
    recorded = [head.config.base_model_name_or_path for head in heads.values()]
    for name in (*given, getattr(lm.config, "_name_or_path", None), *recorded):
        reference = HubReference.parse(name) if name and not Path(name).exists() else None
        if reference is not None:
            return reference.repo_id
    return None


def _complete_config(path: Path, base_model: str | None) -> None:
    """Writes into `config.json` which classes the repository's code has, which others take, and whose weights it holds."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically({path: lambda target: target.write_text(text, encoding="utf-8")})


def _write_head(head: ProbeModel, folder: Path, repo_id: str | None) -> None:
    head.save_pretrained(folder)
    write_card(folder, source=f"{repo_id}:{folder.name}" if repo_id else None)


def _card(
    repository: Path, heads: list[str], name: str, base_model: str | None, license: str | None, chat: bool
) -> ModelCard:
    """The card at the root: what the repository holds, and how it is used with its own code, with the package, and plainly."""
    metadata = ModelCardData(
        library_name="llama_probe",
        license=license,
        base_model=base_model,
        pipeline_tag="text-generation",
        tags=["llama_probe", "probe", "custom_code"],
    )
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "A Llama model"
    lines = ["| head | kind | gives | trained on | licence |", "|---|---|---|---|---|"]
    for head in heads:
        config, facts = read_config(repository / head), (read_results(repository / head) or {}).get("card", {})
        data = facts.get("dataset_name") or facts.get("dataset") or "not stated"
        labels = ", ".join(map(code, config.id2label.values()))
        row = [f"[`{head}`]({head}/README.md)", config.probe_type, labels, data, facts.get("license") or "not stated"]
        lines.append(f"| {' | '.join(map(cell, row))} |")
    first = read_config(repository / heads[0])
    plain = code(f"AutoModelForCausalLM.from_pretrained({_quoted(name)})")
    prompt = example_chat(first.system_prompt) if chat and first.prompt_format == "chat" else None
    body = [
        f"# {word(name.split('/')[-1])}",
        f"{base} with probe heads. They read the hidden states of the frozen model while it reads the prompt, and label the "
        "prompt in the pass that starts the reply; the model's text is what it is without them (arXiv 2601.13288).",
        "\n".join(lines),
        "## Use",
        "With transformers, torch and safetensors alone. `trust_remote_code=True` runs the Python files of this repository, "
        f"which are those of the package llama_probe {package_version()}:",
        _example(name, heads[0], first.token_scope, prompt, package=False),
        "With the package llama_probe installed, no code of the repository runs:",
        _example(name, heads[0], first.token_scope, prompt, package=True),
        "`probe=` takes a list as well. As a pipeline, whose results have a key `probes`:",
        _code(
            "from transformers import pipeline",
            "",
            f'pipe = pipeline("{TASK}", model={_quoted(name)}, probe="{heads[0]}", trust_remote_code=True)',
            f"print(pipe({prompt or _TEXT}, max_new_tokens=40))",
        ),
        f"Without `probe=` and `trust_remote_code=True`, {plain} is the plain model.",
        "## Licences",
        "Each head's card has its licence and that of its data; the weights of the model are under the model's licence, and "
        "the Python files under Apache-2.0.",
    ]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def _example(name: str, head: str, scope: str, chat: str | None, package: bool) -> str:
    """Code that works when pasted; `scope` is the token scope of the head, and `chat` what it is shown, where not raw text."""
    trust = "" if package else ", trust_remote_code=True"
    found = f'out.probe_labels["{head}"], out.probe_probabilities["{head}"]'
    if scope == "response":  # it says nothing of the prompt
        found = f'out.probe_token_probabilities["{head}"]'
    encode = "apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, " if chat else "(prompt, "
    return _code(
        "from transformers import AutoModel, AutoTokenizer",
        *(["import llama_probe"] if package else []),
        "",
        f'model = AutoModel.from_pretrained({_quoted(name)}, probe="{head}"{trust})',
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})",
        f"prompt = {chat or _TEXT}",
        f'inputs = tokenizer{"." if chat else ""}{encode}return_tensors="pt")',
        "out = model.generate(**inputs, max_new_tokens=40)",
        "print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))",
        f"print({found})",
    )


def _quoted(name: str) -> str:
    """A repository or folder as a string in code."""
    return json.dumps(name, ensure_ascii=False)


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _check_exported(folder: Path) -> None:
    path = folder / _CONFIG_NAME
    try:
        exported = json.loads(path.read_text(encoding="utf-8")).get("auto_map") == AUTO_MAP
    except (OSError, ValueError, AttributeError):
        exported = False
    if not exported or not any(is_head_folder(item) for item in folder.iterdir()):
        raise ProbeError(
            f"{folder} is not an exported repository: make one with export_repository or llama-probe export"
        )


def _is_stale(file: str, folder: Path) -> bool:
    """Whether a file on the Hub is a rest of an earlier export, of the whole or of one of the folder's heads."""
    head, _, name = file.rpartition("/")
    return _OWN_FILES.fullmatch(file) is not None or (name in HEAD_FILES and head != "" and (folder / head).is_dir())
