"""The card of a head folder, written from its config and its measured results and from nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .errors import ProbeError
from .files import read_config, write_atomically


@dataclass
class CardFacts:
    """What a card says beyond what was measured.

    Attributes:
        license: of the head; the stricter of the backbone's and the data's. An SPDX id as the Hub has them.
        dataset: Hub id of the training data. dataset_name: its name in a sentence.
        data_note: licence and origin of the data, in a sentence.
        language: of the data.
        limits: what the head was not tested on, a line each.
        command: the command that made the head.
    """

    license: str | None = None
    dataset: str | None = None
    dataset_name: str | None = None
    data_note: str | None = None
    language: str | None = None
    limits: list[str] = field(default_factory=list)
    command: str | None = None


def write_card(folder: str | os.PathLike) -> Path:
    """Writes `README.md` into a head folder that holds `probe_config.json` and `results.json`.

    Raises:
        ProbeError: one of them is missing.
    """
    folder = Path(folder)
    card = create_card(folder)
    write_atomically({folder / "README.md": lambda path: path.write_text(str(card), encoding="utf-8")})
    return folder / "README.md"


def create_card(folder: str | os.PathLike) -> ModelCard:
    """The card of a head folder; the same folder gives the same card."""
    folder = Path(folder)
    config = read_config(folder)
    results = _read_results(folder)
    facts = CardFacts(**results["card"])
    name = folder.resolve().name
    split = "test" if "test" in results["summary"] else "validation"
    data = ModelCardData(
        library_name="llama_probe",
        license=facts.license,
        base_model=config.base_model_name_or_path,
        base_model_relation="adapter",
        pipeline_tag="text-classification",
        language=facts.language,
        datasets=[facts.dataset] if facts.dataset else None,
        metrics=sorted(_measured(results["summary"][split])),
        tags=["llama_probe", "probe", f"probe-{config.probe_type}"],
        model_name=name,
        eval_results=_eval_results(results, facts, split),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(name, config, results, facts, split)}")


def results_table(folders: Iterable[str | os.PathLike]) -> str:
    """A Markdown table of heads with their test results: mean and standard deviation over the seeds of each."""
    metrics = ("accuracy", "f1", "auprc")
    lines = [
        "| head | kind | parameters | labels | test rows | seeds | accuracy | F1 | AUPRC |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for folder in folders:
        config, results = read_config(folder), _read_results(Path(folder))
        summary = results["summary"].get("test")
        cells = ["-"] * len(metrics)
        if summary:
            cells = [f"{summary[m]['mean']:.3f} ± {summary[m]['std']:.3f}" if summary[m] else "-" for m in metrics]
        values = [
            f"`{Path(folder).resolve().name}`",
            config.probe_type,
            f"{results['num_parameters']:,}",
            ", ".join(config.id2label.values()),
            summary["rows"] if summary else "-",
            len(results["runs"]),
            *cells,
        ]
        lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines)


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise ProbeError(f"{folder} has no results.json: a card is written from measured results")
    return json.loads(path.read_text(encoding="utf-8"))


def _measured(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {key: value for key, value in summary.items() if isinstance(value, dict) and "mean" in value}


def _eval_results(results: dict[str, Any], facts: CardFacts, split: str) -> list[EvalResult]:
    chosen = next(run for run in results["runs"] if run["seed"] == results["chosen_seed"])[split]
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=facts.dataset or "own",
            dataset_name=facts.dataset_name or facts.dataset or "own data",
            dataset_split=split,
            metric_type=metric,
            metric_value=round(chosen[metric], 4),
        )
        for metric in sorted(_measured(results["summary"][split]))
    ]


def _body(name: str, config, results: dict[str, Any], facts: CardFacts, split: str) -> str:
    data_name = facts.dataset_name or facts.dataset or "labelled data"
    labels = ", ".join(f"`{label}`" for label in config.id2label.values())
    parts = [
        f"# {name}",
        f"A probe head for [{config.base_model_name_or_path}](https://huggingface.co/{config.base_model_name_or_path}), "
        f"trained on {data_name}. It reads the hidden states of the frozen model while the model reads the prompt, and "
        f"gives one of {labels} in the pass that starts the reply. Kind `{config.probe_type}` of arXiv 2601.13288, "
        f"{results['num_parameters']:,} parameters; the backbone is not changed.",
        "## Use",
        _usage(name, config),
        "## Results",
        _result_table(results, split),
        _seeds_note(results, split),
    ]
    if config.threshold is not None:
        chosen = next(run for run in results["runs"] if run["seed"] == results["chosen_seed"])
        found = chosen[split]
        parts.append(
            f"Threshold {_threshold(config.threshold)} and temperature {config.temperature:.3f} were fitted on the "
            f"validation rows and are saved with the head; at that threshold the head has precision {found['precision']:.3f} and recall "
            f"{found['recall']:.3f} on the {split} rows."
        )
    parts += ["## Data", _data_note(results, facts), "## Training", _training_note(config, results, facts)]
    limits = [
        f"Fits {config.base_model_name_or_path} only: a fine-tuned or otherwise changed backbone has other states.",
        "Trained on prompts rendered with the model's chat template"
        if config.prompt_format == "chat"
        else "Trained on raw text, without a chat template",
        *facts.limits,
    ]
    parts += ["## Limits", "\n".join(f"- {limit.rstrip('.')}." for limit in limits)]
    return "\n\n".join(parts) + "\n"


def _usage(name: str, config) -> str:
    return f"""```python
from transformers import AutoModel, AutoTokenizer
import llama_probe

model = AutoModel.from_pretrained("{config.base_model_name_or_path}", probe="{name}")
tokenizer = AutoTokenizer.from_pretrained("{config.base_model_name_or_path}")
chat = [{{"role": "user", "content": "Write me a short poem about rain."}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
print(out.probe_labels["{name}"], out.probe_probabilities["{name}"])
```"""


def _result_table(results: dict[str, Any], split: str) -> str:
    summary = results["summary"][split]
    chosen = next(run for run in results["runs"] if run["seed"] == results["chosen_seed"])[split]
    groups = [(f"{split}, all rows", summary, chosen)]
    for column, values in summary.get("slices", {}).items():
        for value, part in values.items():
            groups.append((f"{split}, {column} = {value}", part, chosen["slices"][column][value]))
    metrics = list(_measured(summary))
    lines = [f"| rows | number | {' | '.join(metrics)} |", f"|---|---:|{'---:|' * len(metrics)}"]
    for title, part, single in groups:
        cells = [
            "-" if part[m] is None else f"{single[m]:.3f} ({part[m]['mean']:.3f} ± {part[m]['std']:.3f})"
            for m in metrics
        ]
        lines.append(f"| {title} | {part['rows']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seeds_note(results: dict[str, Any], split: str) -> str:
    seeds = [str(run["seed"]) for run in results["runs"]]
    chosen = f"this head (seed {results['chosen_seed']}, the best of {len(seeds)} by {results['recipe']['metric']} on validation rows)"
    return (
        f"Each cell: {chosen if len(seeds) > 1 else 'this head'}, and in brackets the mean and standard deviation over "
        f"the seeds {', '.join(seeds)}. "
        + (
            "Nothing was chosen by the test rows."
            if split == "test"
            else "These are the validation rows that the head was chosen by."
        )
    )


def _threshold(threshold) -> str:
    values = threshold if isinstance(threshold, list) else [threshold]
    return ", ".join(f"{value:.3f}" for value in values)


def _data_note(results: dict[str, Any], facts: CardFacts) -> str:
    rows = ", ".join(f"{name} {part['rows']:,} rows ({part['source']})" for name, part in results["data"].items())
    return f"{facts.data_note or 'No licence of the data was stated.'} Rows: {rows}."


def _training_note(config, results: dict[str, Any], facts: CardFacts) -> str:
    recipe = results["recipe"]
    environment = ", ".join(f"{name} {version}" for name, version in results["environment"].items())
    note = (
        f"AdamW, learning rate {recipe['learning_rate']}, weight decay {recipe['weight_decay']}, batch "
        f"{recipe['per_device_train_batch_size'] * recipe['gradient_accumulation_steps']}, at most "
        f"{recipe['num_train_epochs']} epochs, label smoothing {recipe['label_smoothing']}, dropout {config.dropout}, "
        f"layer dropout {config.layer_dropout}; states normalised by `{config.normalize}`. {environment}."
    )
    return note if facts.command is None else f"{note}\n\n```\n{facts.command}\n```"
