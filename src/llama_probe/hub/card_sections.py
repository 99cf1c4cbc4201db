"""The sections of a head's card, as Markdown."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..files import chosen_run
from ..heads.configuration import ProbeConfig
from ..serving.halting import measured_rules
from .markdown import block, cell, code, line, word


if TYPE_CHECKING:
    from .card import CardFacts

_PLOT_TITLES = {
    "calibration.png": "How often the head is right against how sure it says it is",
    "layer_weights.png": "Mean weight of each layer, by label",
}


def introduction(name: str, config: ProbeConfig, results: dict[str, Any] | None, facts: CardFacts) -> str:
    """What the head is."""
    base = config.base_model_name_or_path
    link = f"[{base}](https://huggingface.co/{base})" if on_the_hub(base) else word(base or "a causal LM")
    trained = (
        f"trained on {line(facts.dataset_name or facts.dataset or 'labelled data')}" if results else "a probe head"
    )
    labels = ", ".join(map(code, config.id2label.values()))
    if config.problem_type == "regression":
        gives = f"scores {labels}"
    elif config.problem_type == "multi_label_classification":
        gives = f"gives any of {labels}"
    else:
        gives = f"gives one of {labels}"
    size = f", {results['num_parameters']:,} parameters" if results else ""
    when = {
        "response": f"writes its reply, and {gives} after each token of it",
        "all": f"reads the prompt and writes its reply, and {gives} after the prompt and after each token of the reply",
    }.get(config.token_scope, f"reads the prompt, and {gives} in the pass that starts the reply")
    return (
        f"# {name}\n\nA probe head for {link}"
        + (f", {trained}" if results else "")
        + f". It reads the hidden states of the frozen model while the model {when}. Kind `{config.probe_type}`, in the two stages of arXiv 2601.13288{size}; the backbone is not changed."
    )


def on_the_hub(base_model: str | None) -> bool:
    """Whether a backbone has a page on the Hub, which refuses a card that gives a folder as its base model."""
    return base_model is not None and re.fullmatch(r"\w[\w.-]*/[\w.-]+", base_model) is not None


def example_chat(config: ProbeConfig) -> str:
    """Messages for an example, as code, with the system turn that the head was trained with."""
    turns = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    turns.append({"role": "user", "content": "Write me a short poem about rain."})
    return json.dumps(turns, ensure_ascii=False)


def usage(source: str, name: str, config: ProbeConfig, halting: Sequence[dict[str, Any]] | None = None) -> str:
    """Code that works when pasted; with the rules of `halting_rules` for the last label, where there are any."""
    base = config.base_model_name_or_path or "the-backbone"
    if config.prompt_format == "chat":
        prompt = (
            f"chat = {example_chat(config)}\n"
            "inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, "
            'return_tensors="pt")'
        )
    else:
        prompt = 'inputs = tokenizer("The rain has stopped.", return_tensors="pt")'
    if config.reads_reply:
        (rule,) = [rule for rule in (halting or []) if rule["chosen"]] or [{}]
        options = {"label": list(config.id2label.values())[-1], "threshold": 0.5}
        if rule:
            options |= {"threshold": round(rule["threshold"], 3), "patience": rule["patience"]}
        found = f'''out = model.generate(**inputs, max_new_tokens=40, halt_on={{"{name}": {json.dumps(options, ensure_ascii=False)}}})
print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
print(out.probe_token_probabilities["{name}"], out.probe_halts)'''
    else:
        found = f'''out = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
print(out.probe_labels["{name}"], out.probe_probabilities["{name}"])'''
    return f"""```python
from transformers import AutoModel, AutoTokenizer
import llama_probe

model = AutoModel.from_pretrained({json.dumps(base, ensure_ascii=False)}, probe={json.dumps(source, ensure_ascii=False)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(base, ensure_ascii=False)})
{prompt}
{found}
```"""


def measurements(config: ProbeConfig, results: dict[str, Any], split: str, plots: Sequence[str]) -> list[str]:
    """Metrics a group of rows, thresholds, and the plots that lie beside the card."""
    parts = [_result_table(results, split), _seeds_note(results, split)]
    inspection = results.get("inspection", {})
    if config.threshold is not None:
        parts.append(
            f"Threshold {_threshold(config.threshold)}{_threshold_rule(results['recipe'])} and temperature "
            f"{config.temperature:.3f} were fitted on {_validation_rows(results)} and are saved with the head."
        )
    for label, rows in inspection.get("thresholds", {}).items():
        lines = [
            f"Thresholds on the probability of {code(label)}, on the {inspection['split']} rows (bold: the saved one):",
            "",
            "| threshold | precision | recall | flagged |",
            "|---:|---:|---:|---:|",
        ]
        for row in rows:
            precision = "-" if row["precision"] is None else f"{row['precision']:.3f}"
            mark = "**" if row["saved"] else ""
            lines.append(
                f"| {mark}{row['threshold']:.3f}{mark} | {precision} | {row['recall']:.3f} | {row['flagged']:.1%} |"
            )
        parts.append("\n".join(lines))
    parts += _halting_tables(results)
    if "calibration" in inspection:
        found = inspection["calibration"]
        parts.append(
            f"Expected calibration error on the {inspection['split']} rows: {found['error']:.3f} "
            f"({found['error_uncalibrated']:.3f} without the temperature)."
        )
    parts += [f"![{_PLOT_TITLES[name]}]({name})" for name in plots]
    return parts


def data(results: dict[str, Any], facts: CardFacts) -> str:
    """Origin, licence and numbers of the rows."""
    rows = ", ".join(
        f"{name} {part['rows']:,} rows ({word(part['source'])}{_counting(part)})"
        for name, part in results["data"].items()
    )
    return f"{line(facts.data_note or 'No licence of the data was stated.')} Rows: {rows}."


def training(config: ProbeConfig, results: dict[str, Any], facts: CardFacts) -> str:
    """Recipe, environment and command."""
    recipe = results["recipe"]
    environment = ", ".join(word(f"{name} {version}") for name, version in results["environment"].items())
    fitted = results["runs"][0]
    if "l1" in fitted:
        how = (
            f"A convex fit: L1 penalty {fitted['l1']:.3g} over standardised features, which leaves "
            f"{fitted['nonzero_weights']:,} weights that are not zero"
        )
    else:
        how = (
            f"AdamW, learning rate {recipe['learning_rate']}, weight decay {recipe['weight_decay']}, batch "
            f"{recipe['per_device_train_batch_size'] * recipe['gradient_accumulation_steps']}, at most "
            f"{recipe['num_train_epochs']} epochs, label smoothing {recipe['label_smoothing']}, dropout {config.dropout}, "
            f"layer dropout {config.layer_dropout}; states normalised by `{config.normalize}`"
        )
    note = f"{how}. {environment}."
    return note if facts.command is None else f"{note}\n\n{block(facts.command)}"


def backbone(config: ProbeConfig) -> str:
    """What the head knows of the model it belongs to."""
    weights = config.base_model_dtype or "unknown dtype"
    if config.base_model_quantization:
        weights += f", {config.base_model_quantization}"
    values = [
        ("model", config.base_model_name_or_path),
        ("revision", config.base_model_revision),
        ("class", config.base_model_class),
        ("hidden size, layers", f"{config.hidden_size}, {config.num_hidden_layers}"),
        ("vocabulary", config.vocab_size),
        ("weights at training", weights),
        ("chat template", (config.chat_template_hash or "")[:16] or None),
    ]
    text = "; ".join(f"{name}: {word(str(value))}" for name, value in values if value is not None) + "."
    if config.fingerprint is not None:
        text += (
            " The head keeps a fingerprint of the model's behaviour: a backbone too far from it - fine-tuned since, or "
            "another - is warned of, or refused with `strict=True`."
        )
    return text


def limits(config: ProbeConfig, results: dict[str, Any] | None, facts: CardFacts) -> str:
    """What the head was not made for or not tested on."""
    lines = [
        f"Fits {word(config.base_model_name_or_path or 'one backbone')} only: a fine-tuned or otherwise changed backbone has other states.",
        "Trained on prompts rendered with the model's chat template"
        if config.prompt_format == "chat"
        else "Trained on raw text, without a chat template",
        *facts.limits,
    ]
    if results is None:
        lines.append("Nothing was measured of this head")
    return "\n".join(f"- {line(limit).rstrip('.')}." for limit in lines)


def measured(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of a summary that have a mean."""
    return {key: value for key, value in summary.items() if isinstance(value, dict) and "mean" in value}


def _result_table(results: dict[str, Any], split: str) -> str:
    summary = results["summary"][split]
    chosen = chosen_run(results)[split]
    groups = [(f"{split}, all rows", summary, chosen)]
    for column, values in summary.get("slices", {}).items():
        for value, part in values.items():
            groups.append((f"{split}, {column} = {value}", part, chosen["slices"][column][value]))
    metrics = list(measured(summary))
    lines = [f"| rows | number | {' | '.join(metrics)} |", f"|---|---:|{'---:|' * len(metrics)}"]
    for title, part, single in groups:
        cells = [
            "-" if part[m] is None else f"{single[m]:.3f} ({part[m]['mean']:.3f} ± {part[m]['std']:.3f})"
            for m in metrics
        ]
        lines.append(f"| {cell(title)} | {part['rows']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _halting_tables(results: dict[str, Any]) -> list[str]:
    """For each label what ends replies, and what that does; nothing of a head that does not read them."""
    tables = []
    for label, rules in measured_rules(results).items():
        halting = results["runs"][0]["halting"]
        split = "test" if "test" in rules[0] else "validation"
        lines = [
            f"Replies halted by {code(label)} while they are written, {rules[0][split]['rows']} {split} rows. The thresholds are "
            f"those that halt at most {100 * halting['max_false_halts']:g}% of the other validation replies (bold: what detects "
            "most of them there). The delay is the tokens read of a detected reply when it is halted, counted from its "
            "beginning, wherever in it the reason lies.",
            "",
            "| patience | threshold | detected | halted in vain | delay, median | delay, 90 % below | of the reply, median |",
            "|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for place, rule in enumerate(rules):
            runs = [run["halting"]["labels"][label][place][split] for run in results["runs"]]
            mark = "**" if rule["chosen"] else ""
            cells = [
                _with_spread([run["detected"] for run in runs], rule[split]["detected"], ".1%"),
                _with_spread([run["false_halts"] for run in runs], rule[split]["false_halts"], ".1%"),
                *(
                    _with_spread([run["delay"][key] for run in runs], rule[split]["delay"][key], form)
                    for key, form in (("median", ".0f"), ("p90", ".0f"), ("share", ".0%"))
                ),
            ]
            lines.append(
                f"| {mark}{rule['patience']}{mark} | {mark}{rule['threshold']:.3f}{mark} | {' | '.join(cells)} |"
            )
        tables.append("\n".join(lines))
    return tables


def _with_spread(values: Sequence[float | None], own: float | None, form: str) -> str:
    """This head's value, and mean and standard deviation over the seeds where all have one."""
    if own is None:
        return "-"
    if len(values) < 2 or None in values:
        return f"{own:{form}}"
    return f"{own:{form}} ({statistics.mean(values):{form}} ± {statistics.stdev(values):{form}})"


def _counting(part: dict[str, Any]) -> str:
    """What rows count for in the loss, where that is not 1."""
    weights = [f"{weight:g}" for weight in part.get("weights", [])]
    if not weights:
        return ""
    turns = " in turn for the head's members" if len(weights) > 1 else ""
    return f"; they count {' and '.join(weights)}{turns}"


def _validation_rows(results: dict[str, Any]) -> str:
    source = results["data"].get("validation", {}).get("source", "")
    if source.endswith(" folds of train"):
        return f"the training rows, each scored by a head that was trained on the others of {source.split()[0]} folds"
    return "the validation rows"


def _seeds_note(results: dict[str, Any], split: str) -> str:
    seeds = [str(run["seed"]) for run in results["runs"]]
    chosen = f"this head (seed {results['chosen_seed']}, the best of {len(seeds)} by {results['recipe']['metric']} on {_validation_rows(results)})"
    return (
        f"Each cell: {chosen if len(seeds) > 1 else 'this head'}, and in brackets the mean and standard deviation over "
        f"the seeds {', '.join(seeds)}. "
        + (
            "Nothing was chosen by the test rows."
            if split == "test"
            else f"The head was chosen by {_validation_rows(results)}, and this is its score there."
        )
    )


def _threshold(threshold) -> str:
    values = threshold if isinstance(threshold, list) else [threshold]
    return ", ".join(f"{value:.3f}" for value in values)


_RULES = {"best-f1": "best F1", "expected-f1": "best expected F1"}


def _threshold_rule(recipe: dict[str, Any]) -> str:
    if "max_false_positive_rate" not in recipe:  # results of a version that knew one rule
        return ""
    if (rate := recipe["max_false_positive_rate"]) is not None:
        return f" (highest recall with a false-positive rate of at most {rate:g})"
    rule = recipe.get("threshold_rule", "best-f1")
    return f" ({_RULES.get(rule, rule)})"
