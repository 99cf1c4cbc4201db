"""Scores any number of rows with several heads in one pass of the backbone: `llama-probe classify --input`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..backbone.cache import repeat_cache
from ..backbone.loading import backbone_target, load_backbone
from ..backbone.passes import plan_passes
from ..data.files import Chunk, InputFile
from ..data.prompts import PromptFormat, Text, check_alike, exchange, is_text, pad_prompts
from ..distributed import barrier, check_shared, claimed, is_main, on_main, process_group, rank, world_size
from ..errors import ProbeError
from ..files import write_atomically
from ..heads.decision import NO_NUMBER_BECAUSE, ProbeOutput
from ..heads.probe import ProbeModel
from ..heads.scope import prompt_masks, read_masks
from ..serving.auto import AutoModelForProbedGeneration
from ..serving.sources import read_heads


logger = logging.get_logger(__name__)

# Readers of a folder of parquet files leave out what begins with an underscore.
MANIFEST_NAME = "_manifest.json"
_FORMAT = 1


class TextScorer:
    """A backbone with heads, as a function from texts to columns.

    Args:
        probes: heads, as for `probe=`; all must read prompts that are rendered alike.
        backbone: `"demo"`, a folder or a Hub id. dtype: of its weights.
        batch_tokens: tokens of a forward pass, padding included.

    Raises:
        ProbeError: a head is not found, or the heads cannot share a pass.
    """

    def __init__(self, probes: Any, backbone: str = "demo", dtype: str = "auto", batch_tokens: int = 4096):
        self.heads = read_heads(probes, backbone_target(backbone))
        check_alike({name: head.config for name, head in self.heads.items()}, replies=True)
        self.batch_tokens = batch_tokens
        lm, self.tokenizer = load_backbone(backbone, dtype)
        self.model = AutoModelForProbedGeneration.from_causal_lm(lm, self.heads)
        self.config = next(iter(self.heads.values())).config
        self.prompt_format = PromptFormat.from_config(self.config, self.tokenizer)

    def __call__(self, texts: Sequence[Text | None]) -> dict[str, list[Any]]:
        """Scores texts.

        Args:
            texts: texts or lists of chat messages, as for `PromptFormat.encode_for`; `None` and blank ones are not scored.

        Returns:
            For each head `NAME_label` - a label, a list of labels (multi-label) or `None` - and `NAME_probabilities`, by
            label; for regression `NAME_values`, by label. `None` where a text was not scored, or where what the head gives is
            no number: one such text among millions is no reason to score none.
        """
        rows = [row for row, text in enumerate(texts) if not _is_blank(text)]
        encoded = self.prompt_format.encode_for(self.config, [texts[row] for row in rows])
        columns: dict[str, list[Any]] = {name: [None] * len(texts) for name in output_fields(self.heads)}
        if not rows:
            return columns
        inputs = pad_prompts(encoded.ids, self.tokenizer)
        if encoded.masks is not None:
            inputs["probe_mask"] = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
            for i, mask in enumerate(encoded.masks):
                inputs["probe_mask"][i, : len(mask)] = torch.tensor(mask)
        for each in plan_passes(self.model, encoded.ids, self._unread(**inputs), self.batch_tokens):
            batch, width = each.rows, max(len(encoded.ids[i]) for i in each.rows)
            part = {name: tensor[batch, :width].to(self.model.device) for name, tensor in inputs.items()}
            cache = None if each.prefix is None else repeat_cache(each.prefix, len(batch))
            outputs = self.model.classify(**part, cache=cache)
            for name, output in outputs.items():
                config = self.heads[name].config
                sound = output.logits.isfinite().all(dim=-1)
                output = ProbeOutput.from_logits(output.logits[sound], config)
                for i, label, values in zip(
                    itertools.compress(batch, sound.tolist()),
                    output.labels,
                    output.probabilities.tolist(),
                    strict=True,
                ):
                    by_label = dict(zip(config.id2label.values(), values, strict=True))
                    if config.problem_type == "regression":
                        columns[f"{name}_values"][rows[i]] = by_label
                    else:
                        columns[f"{name}_label"][rows[i]] = label
                        columns[f"{name}_probabilities"][rows[i]] = by_label
        return columns

    def _unread(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, probe_mask: torch.Tensor | None = None
    ) -> list[int]:
        """How many of each prompt's first tokens no head reads."""
        configs = {name: head.config for name, head in self.heads.items()}
        masks = read_masks(configs, prompt_masks(configs, input_ids, None, attention_mask, probe_mask))
        return torch.stack(list(masks.values())).any(dim=0).int().argmax(dim=1).tolist()


@dataclass
class ScoringJob:
    """Scores the rows of files, chunk by chunk, into a folder of parquet files: one for each chunk.

    Only one chunk is in memory at a time. A chunk's file appears under its name when it is complete; what is there when a
    job goes on is not done again, and nothing is in two files. Processes that `torchrun` has started divide the chunks, and
    a job may go on with another number of them. All must see the same `output`.

    Columns of the output: `file` and `row`, which say where a row comes from (rows count from 0 in each file),
    `keep_columns`, and those of `TextScorer`. Beside the parquet files lies `_manifest.json`.

    Attributes:
        inputs: paths or patterns of parquet, jsonl, json (an object a line), csv or tsv files; but for parquet also `.gz`.
        output: folder.
        probes, backbone, dtype, batch_tokens: see `TextScorer`.
        text_column: of the texts, or of chat messages.
        prompt_column: for heads that read replies, the column of what the texts reply to.
        keep_columns: of the input, to be found in the output again.
        chunk_rows: rows of a chunk.
        resume: go on with a job that was stopped.
    """

    inputs: Sequence[str]
    output: Path
    probes: Any
    backbone: str = "demo"
    text_column: str = "text"
    prompt_column: str | None = None
    keep_columns: Sequence[str] = field(default_factory=list)
    chunk_rows: int = 2048
    dtype: str = "auto"
    batch_tokens: int = 4096
    resume: bool = False

    def execute(self) -> dict[str, Any]:
        """Runs it.

        Returns:
            What `_manifest.json` says of a complete job: `inputs`, `settings`, `rows`, `parts` and `complete`.

        Raises:
            ProbeError: anything the user can mend: before a row is scored, but for rows that turn out to be damaged. A job
                goes on only with the inputs, heads and settings that it was begun with.
        """
        with process_group(), claimed(Path(self.output)):
            return self._execute()

    def _execute(self) -> dict[str, Any]:
        if self.chunk_rows < 1:
            raise ProbeError(f"chunk_rows={self.chunk_rows} must be at least 1")
        self.output = Path(self.output)
        check_shared(self.output)
        files, kept = on_main(self._survey)
        heads = read_heads(self.probes, backbone_target(self.backbone))
        check_alike({name: head.config for name, head in heads.items()}, replies=True)
        plan, done = on_main(lambda: self._begin(files, heads))
        fields = {"file": pa.string(), "row": pa.int64(), **kept, **output_fields(heads)}
        if not plan["complete"]:
            scorer = TextScorer(heads, self.backbone, self.dtype, self.batch_tokens)
            self._score(files, scorer, kept, pa.schema(list(fields.items())), done)
            barrier()
            plan = on_main(lambda: self._complete(plan))
        return plan

    def _score(
        self,
        files: list[InputFile],
        scorer: TextScorer,
        kept: dict[str, pa.DataType],
        schema: pa.Schema,
        done: set[str],
    ) -> None:
        needed = [self.text_column, *([] if self.prompt_column is None else [self.prompt_column]), *kept]
        counts = [file.rows() for file in files]
        total = None if None in counts else sum(counts) // world_size()
        with tqdm(total=total, desc="scoring", unit=" rows a process", disable=not is_main()) as bar:
            for index, file in enumerate(files):

                def wanted(number: int, index: int = index) -> bool:
                    return (index + number) % world_size() == rank() and _part_name(index, number) not in done

                for chunk in file.chunks(list(dict.fromkeys(needed)), self.chunk_rows, wanted):
                    given = self._texts(file, chunk)
                    columns = scorer(given)
                    _warn_of_gaps(file, chunk, given, columns)
                    columns |= {
                        "file": [str(file.path)] * len(chunk),
                        "row": list(range(chunk.first_row, chunk.first_row + len(chunk))),
                        **{name: chunk.columns[name] for name in kept},
                    }
                    table = pa.table(
                        [_array(file, chunk, name, columns[name], schema) for name in schema.names], schema
                    )
                    path = self.output / _part_name(index, chunk.number)
                    write_atomically({path: lambda target, table=table: _write(table, target)})
                    bar.update(len(chunk))

    def _texts(self, file: InputFile, chunk: Chunk) -> list[Text | None]:
        def check(name: str, allowed: Callable[[Any], bool], words: str) -> list[Any]:
            for place, value in enumerate(chunk.columns[name]):
                if value is not None and not allowed(value):
                    raise ProbeError(
                        f"{file.path}: row {chunk.first_row + place}: {name} must be {words}, not {str(value)[:60]!r}"
                    )
            return chunk.columns[name]

        if self.prompt_column is None:
            return check(self.text_column, is_text, "a text or chat messages")
        replies = check(self.text_column, lambda value: isinstance(value, str), "a text, as the reply to a prompt")
        prompts = check(self.prompt_column, lambda value: value == [] or is_text(value), "a text or chat messages")
        pairs = zip(prompts, replies, strict=True)
        return [exchange(prompt, reply) if prompt and reply and reply.strip() else None for prompt, reply in pairs]

    def _survey(self) -> tuple[list[InputFile], dict[str, pa.DataType]]:
        """The files, and the types of the columns that are kept: those of the first file."""
        files = InputFile.find(self.inputs)
        kept: dict[str, pa.DataType] = {}
        needed = [
            self.text_column,
            *([] if self.prompt_column is None else [self.prompt_column]),
            *self.keep_columns,
        ]
        for file in files:
            fields = file.fields(needed)
            for name in needed:
                if name not in fields and (fields or file.kind != "json"):
                    raise ProbeError(f"{file.path} has no column {name!r}; it has: {', '.join(fields) or 'none'}")
            for name in self.keep_columns:
                if name in ("file", "row"):
                    raise ProbeError(f"the output has a column {name!r} of its own: it cannot be kept")
                if name in fields:
                    kept.setdefault(name, fields[name])
        return files, {name: kept.get(name, pa.string()) for name in self.keep_columns}

    def _begin(self, files: list[InputFile], heads: dict[str, ProbeModel]) -> tuple[dict[str, Any], set[str]]:
        """The manifest, written where the job is new, and the names of the parts that are done."""
        clash = set(output_fields(heads)) & {*self.keep_columns, "file", "row"}
        if clash:
            raise ProbeError(f"{', '.join(sorted(clash))}: the output has columns of that name from two sources")
        settings = {
            "heads": {name: _digest(head) for name, head in heads.items()},
            "backbone": self.backbone,
            "dtype": self.dtype,
            "text_column": self.text_column,
            "prompt_column": self.prompt_column,
            "keep_columns": list(self.keep_columns),
            "chunk_rows": self.chunk_rows,
        }
        wanted = {"format": _FORMAT, "inputs": [file.identity() for file in files], "settings": settings}
        path = self.output / MANIFEST_NAME
        parts = sorted(self.output.glob("part-*.parquet"))
        if not path.is_file():
            if parts:
                raise ProbeError(f"{self.output} holds {parts[0].name} of something else: give another folder")
            plan = {**wanted, "complete": False}
            _write_manifest(path, plan)
            return plan, set()
        if not self.resume:
            raise ProbeError(f"{self.output} holds a scoring job already: go on with --resume, or give another folder")
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            told = _differences(plan, wanted)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProbeError(f"{path} is damaged: {error}; give another folder") from None
        if told:
            raise ProbeError(
                f"{self.output} was begun otherwise: {'; '.join(told)}. Give the same again, or another folder"
            )
        for scratch in self.output.glob(".part-*.tmp"):  # of processes that were killed
            scratch.unlink(missing_ok=True)
        return plan, {part.name for part in parts}

    def _complete(self, plan: dict[str, Any]) -> dict[str, Any]:
        parts = [
            {"name": path.name, "rows": pq.read_metadata(path).num_rows}
            for path in sorted(self.output.glob("part-*.parquet"))
        ]
        plan = {**plan, "complete": True, "rows": sum(part["rows"] for part in parts), "parts": parts}
        _write_manifest(self.output / MANIFEST_NAME, plan)
        return plan


def _warn_of_gaps(file: InputFile, chunk: Chunk, texts: list[Text | None], columns: dict[str, list[Any]]) -> None:
    """Says which rows have a text and no score: in the output they look like those without a text."""
    scored = [i for i, text in enumerate(texts) if not _is_blank(text)]
    gaps = [i for i in scored if any(values[i] is None for values in columns.values())]
    if gaps:
        shown = ", ".join(str(chunk.first_row + i) for i in gaps[:10]) + (" ..." if len(gaps) > 10 else "")
        empty = sorted(name for name, values in columns.items() if any(values[i] is None for i in gaps))
        logger.warning(
            f"{file.path}: {', '.join(empty)} left empty for {len(gaps)} rows ({shown}): the head gives no number there: "
            f"{NO_NUMBER_BECAUSE}"
        )


def _is_blank(text: Text | None) -> bool:
    return not (text.strip() if isinstance(text, str) else text)


def output_fields(heads: dict[str, ProbeModel]) -> dict[str, pa.DataType]:
    """Names and types of the columns of `TextScorer`."""
    fields: dict[str, pa.DataType] = {}
    for name, head in heads.items():
        by_label = pa.struct([(label, pa.float32()) for label in head.config.id2label.values()])
        if head.config.problem_type == "regression":
            fields[f"{name}_values"] = by_label
            continue
        several = head.config.problem_type == "multi_label_classification"
        fields[f"{name}_label"] = pa.list_(pa.string()) if several else pa.string()
        fields[f"{name}_probabilities"] = by_label
    return fields


def _part_name(index: int, number: int) -> str:
    return f"part-{index:05d}-{number:07d}.parquet"


def _array(file: InputFile, chunk: Chunk, name: str, values: list[Any], schema: pa.Schema) -> pa.Array:
    kind = schema.field(name).type
    if kind == pa.string():  # of json lines: whole numbers of more than 64 bits, which are kept as texts
        values = [str(value) if type(value) is int else value for value in values]
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ProbeError(
            f"{file.path}: rows {chunk.first_row} to {chunk.first_row + len(chunk) - 1}: the column {name!r} holds what is no "
            f"{kind}, as in the first file ({str(error).splitlines()[0]}): mend it, or do not keep it"
        ) from None


def _write(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())  # the name that it gets says that all of it is there


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically({path: lambda target: target.write_text(text, encoding="utf-8")})


def _digest(head: ProbeModel) -> str:
    """Of weights and config, the threshold and temperature in it included."""
    digest = hashlib.sha256(head.config.to_json_string().encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _differences(plan: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What a job was begun with and is not the same now, in words."""
    if plan["format"] != wanted["format"]:
        return [f"format {plan['format']}, now {wanted['format']}"]
    before = {item["path"]: item for item in plan["inputs"]}
    now = {item["path"]: item for item in wanted["inputs"]}
    told = [f"input {path} was not there" for path in now if path not in before]
    told += [f"input {path} is missing" for path in before if path not in now]
    told += [f"input {path} has changed" for path in now if path in before and now[path] != before[path]]
    if not told and list(before) != list(now):
        told.append("the inputs come in another order")
    old, new = plan["settings"], json.loads(json.dumps(wanted["settings"]))
    for name in new:
        if old[name] == new[name]:
            continue
        if name == "heads":
            changed = sorted(head for head in {*old[name], *new[name]} if old[name].get(head) != new[name].get(head))
            told.append(f"other heads ({', '.join(changed)})" if changed else "the heads come in another order")
        else:
            told.append(f"{name}={old[name]!r}, now {new[name]!r}")
    return told
