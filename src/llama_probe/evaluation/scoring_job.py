"""Score files of any size with several heads in one pass of the backbone: `llama-probe classify --input`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

from ..backbone.loading import backbone_target, load_backbone
from ..data.prompts import Text, exchange, has_reply, is_text
from ..data.row_files import MAX_TEXT, Columns, InputFile
from ..distributed import barrier, check_shared, claimed, is_main, on_main, rank, undivided, world_size
from ..errors import ProbeError, first_line
from ..files import JSON, remove_leftovers, write_atomically
from ..heads.decision import NO_NUMBER_BECAUSE, ProbeOutput
from ..heads.probe import ProbeModel
from ..progress_bar import ProgressBar
from ..serving.auto import AutoModelForProbedGeneration
from ..serving.loading import ProbeSpec, read_heads
from ..serving.passages import check_finds_passages
from ..serving.texts import classify_texts, format_to_score, heads_by_format, join_outputs
from .prediction import predict_together
from .resume import same_settings


logger = logging.get_logger(__name__)

# Readers of parquet folders ignore names that begin with an underscore.
MANIFEST_NAME = "_manifest.json"
_FORMAT = 1
_PASSAGE = {"label": pa.string(), "start": pa.int64(), "end": pa.int64(), "message": pa.int64(), "text": pa.string()}
_PASSAGES = pa.list_(pa.struct(list(_PASSAGE.items())))


class TextScorer:
    """A backbone with heads, as a function from texts to columns.

    Args:
        probes: heads, as for `probe=`. All read prompts, or all read replies. Heads of one prompt format share the passes. A reply
            counts by its largest score, as in `evaluate`; see `strongest`.
        max_length: number of tokens to which texts are cut; see `length_limit`.
        passages: also find the passages of flagged labels. All heads must have windows.
    """

    def __init__(
        self,
        probes: ProbeSpec,
        backbone: str = "demo",
        dtype: str = "auto",
        max_length: int | None = None,
        passages: bool = False,
    ):
        self.max_length = max_length
        self.passages = passages
        self.heads = _read_heads(probes, backbone, passages)
        self.reads_replies = any(head.config.reads_reply for head in self.heads.values())
        lm, self.tokenizer = load_backbone(backbone, dtype)
        self.model = AutoModelForProbedGeneration.from_causal_lm(lm, self.heads)

    def __call__(self, texts: Sequence[Text | None]) -> Columns:
        """Score texts.

        Args:
            texts: texts or lists of chat messages, as for `PromptFormat.encode_for`. Only `scored_rows` are scored.

        Returns:
            For each head `NAME_label` - a label, or a list of labels (multi-label) - and `NAME_probabilities`, by label;
            for regression `NAME_values`, by label. `NAME_novelty` if the head tells it, and `NAME_passages` if they are asked for,
            as `serving.passages.locate` returns them. A value is None if the text is not
            scored, or if the head gives no number: one text must not stop a job over millions of texts.
        """
        rows = self.scored_rows(texts)
        columns: Columns = {name: [None] * len(texts) for name in output_fields(self.heads, self.passages)}
        outputs = self._score([texts[row] for row in rows]) if rows else {}
        for name, output in outputs.items():
            head = self.heads[name]
            numbers = output.logits.isfinite().all(dim=-1).nonzero().flatten()
            predictions = join_outputs([output], numbers, head.config).describe()
            for place, prediction in zip(numbers.tolist(), predictions, strict=True):
                for kind, (_, key) in _columns(head, self.passages).items():
                    columns[f"{name}_{kind}"][rows[place]] = prediction[key]
        return columns

    def scored_rows(self, texts: Sequence[Text | None]) -> list[int]:
        """Return the rows with a text that is not blank; for heads that read replies, the rows with a reply."""
        rows = [row for row, text in enumerate(texts) if (text.strip() if isinstance(text, str) else text)]
        if not self.reads_replies:
            return rows
        # A plain text has no prompt: encoding it raises, because the column of prompts was forgotten.
        return [row for row in rows if isinstance(texts[row], str) or has_reply(texts[row])]

    def _score(self, texts: list[Text]) -> dict[str, ProbeOutput]:
        configs = {name: head.config for name, head in self.heads.items()}
        if not self.reads_replies:
            return classify_texts(
                self.model, configs, texts, self.tokenizer, max_length=self.max_length, passages=self.passages
            )
        outputs: dict[str, ProbeOutput] = {}
        for names in heads_by_format(configs, self.max_length):
            config = configs[names[0]]
            heads = [self.heads[name] for name in names]
            heads[0].set_backbone(self.model)
            dataset = format_to_score(config, self.tokenizer, self.max_length).encode_for(config, texts)
            with undivided():  # ranks divide the chunks
                logits_by_head = predict_together(heads, dataset)
            for name, logits in zip(names, logits_by_head, strict=True):
                outputs[name] = ProbeOutput.from_logits(logits, configs[name])
        return outputs


@dataclass
class ScoringJob:
    """A job that scores the rows of files, chunk by chunk, into a folder with a parquet file for each chunk.

    Only one chunk is in memory at a time. A chunk's file gets its name when it is complete, and a job that resumes keeps the file.
    The processes of `torchrun` divide the chunks and must see the same `output`; a job may resume with another number of processes.

    Columns of the output: `file` and `row`, the place of a row (rows count from 0 in each file), `keep_columns`, and the columns
    of `TextScorer`. `_manifest.json` is beside the parquet files.

    Attributes:
        inputs: paths or patterns of files; see `InputFile`.
        text_column: column of the texts, or of chat messages.
        prompt_column: for heads that read replies, the column of the prompts that the texts reply to.
        chunk_rows, max_text: rows in memory, and characters of the longest text; see `InputFile`.
        max_length, passages: as of `TextScorer`.
    """

    inputs: Sequence[str]
    output: Path
    probes: ProbeSpec
    backbone: str = "demo"
    text_column: str = "text"
    prompt_column: str | None = None
    keep_columns: Sequence[str] = ()
    chunk_rows: int = 2048
    dtype: str = "auto"
    resume: bool = False
    max_text: int = MAX_TEXT
    max_length: int | None = None
    passages: bool = False

    def execute(self) -> JSON:
        """Run the job.

        Returns:
            The contents of `_manifest.json`: `format`, `inputs`, `settings`, `complete`, `rows` and `parts`.

        Raises:
            ProbeError: an argument, an input or a head is wrong, or the job was begun with other inputs, heads or settings. Only
                damaged rows raise after others were scored.
        """
        with claimed(self.output):
            check_shared(self.output)
            files, kept = on_main(self._survey)
            heads = _read_heads(self.probes, self.backbone, self.passages)
            if clash := {"file", "row", *output_fields(heads, self.passages)} & set(self.keep_columns):
                raise ProbeError(f"keep_columns: the output has its own {', '.join(sorted(clash))}")
            manifest = on_main(lambda: self._begin(files, heads))
            if not manifest.get("complete"):
                schema = pa.schema(
                    {"file": pa.string(), "row": pa.int64(), **kept, **output_fields(heads, self.passages)}
                )
                self._score(files, heads, schema)
                barrier()
                manifest = on_main(lambda: self._complete(manifest))
            return manifest

    @property
    def _needed(self) -> list[str]:
        columns = [self.text_column, self.prompt_column, *self.keep_columns]
        return list(dict.fromkeys(name for name in columns if name is not None))

    def _survey(self) -> tuple[list[InputFile], dict[str, pa.DataType]]:
        """Return the files, and the type of each column to keep, from the first file in which the column has a type."""
        files = InputFile.find(self.inputs, self.max_text)
        types: dict[str, pa.DataType] = {}
        for file in files:
            fields = file.fields(self._needed).items()
            types = {name: type_ for name, type_ in fields if not pa.types.is_null(type_)} | types
        return files, {name: types.get(name, pa.string()) for name in self.keep_columns}

    def _begin(self, files: list[InputFile], heads: dict[str, ProbeModel]) -> JSON:
        """Return the manifest. Write it if the job is new."""
        names = ("backbone", "dtype", "text_column", "prompt_column", "chunk_rows", "max_length", "passages")
        settings: JSON = {name: getattr(self, name) for name in names}
        settings["keep_columns"] = list(self.keep_columns)
        settings["heads"] = [[name, _digest(head)] for name, head in heads.items()]
        begun = {"format": _FORMAT, "inputs": [file.identity() for file in files], "settings": settings}
        path = self.output / MANIFEST_NAME
        remove_leftovers(self.output)
        if path.is_file() and not self.resume:
            raise ProbeError(f"{self.output} holds a scoring job: continue with --resume, or give another folder")
        parts = sorted(self.output.glob("part-*.parquet"))
        if parts and not path.is_file():
            raise ProbeError(f"{self.output} holds {parts[0].name} of something else: give another folder")
        return same_settings(path, begun, {"complete": False})

    def _score(self, files: list[InputFile], heads: dict[str, ProbeModel], schema: pa.Schema) -> None:
        scorer = TextScorer(heads, self.backbone, self.dtype, self.max_length, self.passages)
        countable = all(file.kind == "parquet" for file in files)
        total = sum(pq.read_metadata(file.path).num_rows for file in files) // world_size() if countable else None
        with ProgressBar(total, "scoring", "rows a process", is_hidden=not is_main()) as bar:
            for index, file in enumerate(files):
                for number, (rows, cells) in enumerate(file.chunks(self._needed, self.chunk_rows)):
                    part = self.output / f"part-{index:05d}-{number:07d}.parquet"
                    if (index + number) % world_size() != rank() or part.is_file():
                        continue
                    texts = self._texts(file, rows, cells)
                    scores = scorer(texts)
                    _warn_of_gaps(file, rows, scorer.scored_rows(texts), scores)
                    columns = {**cells, **scores, "file": [str(file.path)] * len(rows), "row": rows}
                    table = pa.table([_array(file, rows, column, columns[column.name]) for column in schema], schema)
                    write_atomically(part, partial(_write, table))
                    bar.update(len(rows))

    def _texts(self, file: InputFile, rows: range, cells: Columns) -> list[Text | None]:
        """Return the texts of a chunk, with their prompts as chat messages if there is a column of prompts."""

        def check(name: str, kind: type = object, allowed: str = "a text or chat messages") -> list[Any]:
            for row, value in zip(rows, cells[name], strict=True):
                is_allowed = isinstance(value, kind) and (value == [] or is_text(value))
                if value is not None and not is_allowed:
                    raise ProbeError(f"{file.path}: row {row}: {name} must be {allowed}, not {str(value)[:60]!r}")
            return cells[name]

        if self.prompt_column is None:
            return check(self.text_column)
        pairs = zip(check(self.prompt_column), check(self.text_column, str, "a text"), strict=True)
        return [exchange(prompt, reply) if prompt and reply and reply.strip() else None for prompt, reply in pairs]

    def _complete(self, manifest: JSON) -> JSON:
        paths = sorted(self.output.glob("part-*.parquet"))
        parts = [{"name": path.name, "rows": pq.read_metadata(path).num_rows} for path in paths]
        manifest |= {"complete": True, "rows": sum(part["rows"] for part in parts), "parts": parts}
        write_atomically(self.output / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
        return manifest


def _read_heads(probes: ProbeSpec, backbone: str, passages: bool) -> dict[str, ProbeModel]:
    heads = read_heads(probes, backbone_target(backbone))
    if passages:
        check_finds_passages({name: head.config for name, head in heads.items()})
    by_reads = {head.config.reads_reply: name for name, head in heads.items()}
    if len(by_reads) == 2:
        raise ProbeError(f"{by_reads[True]!r} reads replies and {by_reads[False]!r} prompts: score them apart")
    return heads


def output_fields(heads: dict[str, ProbeModel], passages: bool = False) -> dict[str, pa.DataType]:
    """Return names and types of the columns of `TextScorer`."""
    fields = {}
    for name, head in heads.items():
        for kind, (type_, _) in _columns(head, passages).items():
            fields[f"{name}_{kind}"] = type_
    return fields


def _columns(head: ProbeModel, passages: bool) -> dict[str, tuple[pa.DataType, str]]:
    """Return the columns of a head, each with its type and its key in what `ProbeOutput.describe` returns."""
    problem = head.config.problem_type
    columns = {} if head.novelty is None else {"novelty": (pa.float32(), "novelty")}
    if passages:
        columns["passages"] = (_PASSAGES, "passages")
    by_label = pa.struct([(name, pa.float32()) for name in head.config.id2label.values()])
    if problem == "regression":
        return columns | {"values": (by_label, "scores")}
    label = pa.list_(pa.string()) if problem == "multi_label_classification" else pa.string()
    return columns | {"label": (label, "label"), "probabilities": (by_label, "scores")}


def _warn_of_gaps(file: InputFile, rows: range, scored: list[int], scores: Columns) -> None:
    """Warn of rows that have a text and no score: in the output they look like rows without a text."""
    empty = {name: [place for place in scored if values[place] is None] for name, values in scores.items()}
    names = [name for name, places in empty.items() if places]
    if not names:
        return
    gaps = sorted(set().union(*empty.values()))
    shown = ", ".join(str(rows[place]) for place in gaps[:10])
    more = " ..." if len(gaps) > 10 else ""
    logger.warning(
        f"{file.path}: {', '.join(names)} left empty for {len(gaps)} rows ({shown}{more}): {NO_NUMBER_BECAUSE}"
    )


def _array(file: InputFile, rows: range, column: pa.Field, values: Sequence[object]) -> pa.Array:
    try:
        if column.type == pa.string():
            # Columns of JSON lines that begin with nothing, or that have large whole numbers, are kept as texts.
            values = [json.dumps(value) if type(value) in (int, float, dict, list) else value for value in values]
        array = pa.array(values, column.type)
        if not all(map(_is_kept, values, array.to_pylist())):
            raise ValueError("a fraction or a field would be cut off")
        return array
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = f"must be {column.type} as in the first file: {first_line(error)}"
        raise ProbeError(f"{file.path}: from row {rows.start} on, column {column.name!r} {reason}") from None


def _is_kept(value: object, kept: object) -> bool:
    """Return True if pyarrow has cut no fraction off a whole number, and no new field off an object."""
    if isinstance(value, dict) and isinstance(kept, dict):
        return all(item is None or _is_kept(item, kept.get(name)) for name, item in value.items())
    if isinstance(value, list) and isinstance(kept, list):
        return all(map(_is_kept, value, kept))
    return isinstance(kept, float) or value == kept


def _write(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())  # a part with its name must be complete, even after a power cut


def _digest(head: ProbeModel) -> str:
    """Return a digest of a head's weights and config (threshold and temperature are in the config)."""
    digest = hashlib.sha256(head.config.to_json_string().encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
