"""Write the tables of README.md and docs/ that come from measurements or from the code.

python docs/tables.py           # names the pages whose tables are stale
python docs/tables.py --write   # writes all tables anew

A table stands between two comments: `<!-- NAME: written by docs/tables.py -->` and `<!-- end of NAME -->`. The figures of bundled
heads come from hub_cards/*/results.json. Those of long texts come from docs/long-texts.json, which examples/long_texts.py writes. Options come from the parsers of the commands; docs/settings.py writes the settings of recipes.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llama_probe.backbone.families import FAMILIES
from llama_probe.cli import COMMANDS, load_command
from llama_probe.cli.console import with_spread
from llama_probe.files import JSON
from llama_probe.heads.configuration import ProbeConfig, read_config
from llama_probe.hub.card import kept_share, plain
from llama_probe.hub.folder import read_results, training_results
from llama_probe.hub.resolve import ALIASES, bundled_heads
from llama_probe.serving.export import FAMILIES as EXPORTED
from llama_probe.vllm.__main__ import _parser as server_parser
from llama_probe.vllm.compatibility import ARCHITECTURES


DOCS = Path(__file__).parent
LONG_TEXTS = DOCS / "long-texts.json"
MARKED = re.compile(r"(<!-- ([\w-]+): written by docs/tables.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

# What a set of rows holds, where its name in a recipe does not say so: by the name, then by label.
SETS = {
    "advbench": "AdvBench",
    "aegis": "Aegis",
    "agentdojo": "AgentDojo",
    "atlas": "Atlas, pairs of look-alikes",
    "beavertails": "BeaverTails",
    "bipia": "BIPIA",
    "dangerousqa": "DangerousQA",
    "do_not_answer": "Do-Not-Answer",
    "forbidden_questions": "forbidden questions of Do Anything Now",
    "gptfuzz": "GPTFuzzer",
    "injecagent": "InjecAgent",
    "moderation": "OpenAI's moderation set",
    "multilingual_harmful": "MultiJail, PolyRefuse",
    "multilingual_rest": "other languages",
    "orbench_more": "OR-Bench, look-alikes",
    "requests": "AART and forbidden questions",
    "saferlhf_mini": "SafeRLHF, JailbreakEval's sample",
    "saferlhf_test": "SafeRLHF, GuardReasoner's sample",
    "tdc2023": "TDC 2023",
    "toxicchat": "ToxicChat",
    "xsafety": "XSafety, 10 languages",
    "xstest": "XSTest, look-alikes",
}
# Rows of the README: name of the set, label, and what they are in words. Hard rows come first.
HARD_TO_EASY = (
    ("xstest", "harmless", "XSTest: harmless, made to look harmful"),
    ("atlas", "harmless", "Atlas: the harmless one of two look-alikes"),
    ("aegis", "harmless", "Aegis: harmless prompts of users"),
    ("toxicchat", "harmless", "ToxicChat: harmless prompts of users"),
    ("aegis", "harmful", "Aegis: harmful prompts of users"),
    ("xstest", "harmful", "XSTest: harmful"),
    ("toxicchat", "harmful", "ToxicChat: harmful prompts of users"),
    ("advbench", "harmful", "AdvBench: direct requests"),
)
# AUROC of guard models on Aegis and ToxicChat: arXiv 2412.07724, table 7.
PUBLISHED = (
    ("Llama Guard 3", "1B", 0.780, 0.810),
    ("Llama Guard 3", "8B", 0.816, 0.865),
    ("ShieldGemma", "9B", 0.826, 0.851),
    ("Granite Guardian 3.0", "2B", 0.844, 0.865),
    ("Granite Guardian 3.0", "8B", 0.924, 0.940),
)
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "de": "German", "el": "Greek", "es": "Spanish", "fr": "French", "hi": "Hindi", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sw": "Swahili", "th": "Thai", "tr": "Turkish", "vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese",
}  # fmt: skip
# Licences that allow commercial use of what was learned, as far as the rows of a head state one.
NON_COMMERCIAL = {"cc-by-nc-4.0", "cc-by-nc-sa-4.0", "other"}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]], aligned: str) -> str:
    """Return a table in Markdown; `aligned` has `l` or `r` for each column."""
    rules = "|".join("---" if side == "l" else "---:" for side in aligned)
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows))
    return "\n".join([first, f"|{rules}|", *others])


# The bundled heads.


def configs() -> dict[str, ProbeConfig]:
    """Return the configs of the bundled heads by alias."""
    return {alias: read_config(folder) for alias, folder in bundled_heads().items()}


def backbone_of(config: ProbeConfig) -> str:
    """Return the name of a head's backbone, without its owner."""
    return config.base_model_name_or_path.rpartition("/")[2]


def heads_table() -> str:
    """Return a table of the bundled heads: mean and standard deviation of their test results over the seeds."""
    rows = []
    for alias, folder in bundled_heads().items():
        config = read_config(folder)
        results = training_results(read_results(folder))
        test = results["summary"].get("test", {})
        scores = [with_spread(test[metric]) if metric in test else "-" for metric in ("accuracy", "f1", "auprc")]
        labels = plain(", ".join(config.id2label.values()))
        counts = [f"{results['num_parameters']:,}", labels, test.get("rows") or "-", len(results["runs"])]
        rows.append([f"`{alias}`", config.probe_type, *counts, *scores])
    columns = "head", "type", "parameters", "labels", "test rows", "seeds", "accuracy", "F1", "AUPRC"
    return markdown_table(columns, rows, "llrlrrrrr")


def licences_table() -> str:
    """Return a table of what each bundled head reads, and of the licence of the rows that it learned from."""
    rows = []
    for alias, folder in bundled_heads().items():
        config = read_config(folder)
        card = (read_results(folder) or {}).get("card", {})
        licence = card.get("license") or "unknown"
        commercial = "no" if licence in NON_COMMERCIAL else "not stated" if licence == "unknown" else "yes"
        windows = config.window or "-"
        language = card.get("language") or "en"
        rows.append([f"`{alias}`", backbone_of(config), config.token_scope, windows, language, licence, commercial])
    columns = "head", "backbone", "reads", "window", "language", "licence of the rows", "commercial use"
    return markdown_table(columns, rows, "lllrlll")


def aliases_table() -> str:
    """Return a table of the shorter aliases."""
    return markdown_table(("alias", "head"), [(f"`{alias}`", f"`{name}`") for alias, name in ALIASES.items()], "ll")


def thresholds_table() -> str:
    """Return the saved thresholds of the heads that have named ones."""
    named = {alias: config for alias, config in configs().items() if config.thresholds}
    names = sorted({name for config in named.values() for name in config.thresholds}, key=_rate, reverse=True)
    rows = []
    for alias, config in named.items():
        saved = [f"{config.thresholds[name]:.2f}" if name in config.thresholds else "-" for name in names]
        rows.append([f"`{alias}`", f"{config.threshold:.2f}", *saved])
    return markdown_table(
        ("head", "saved threshold", *(f"`{name}`" for name in names)), rows, "l" + "r" * (len(names) + 1)
    )


def _rate(name: str) -> float:
    found = re.search(r"[\d.]+", name)
    return float(found[0]) if found else 0.0


def models_table() -> str:
    """Return a table of the families of models: what is tested, exported, served by vLLM, and measured with bundled heads."""
    served = {re.sub(r"ForCausalLM$", "", name).lower() for name in ARCHITECTURES}
    measured = {config.base_model_type for config in configs().values()}
    rows = []
    for family in sorted(FAMILIES):
        marks = (family in EXPORTED, family.replace("_", "") in served, family in measured)
        rows.append([f"`{family}`", "random weights", *("yes" if mark else "-" for mark in marks)])
    columns = "`model_type`", "tested with", "`export`", "vLLM", "bundled heads"
    return markdown_table(columns, rows, "lllll")


# What recipes have measured.


def measured_of(alias: str) -> dict[str, JSON]:
    """Return what its recipe has measured of a bundled head on each backbone, by the backbone's name."""
    measured = {}
    for folder in bundled_heads().values():
        results = read_results(folder) or {}
        if folder.name == ALIASES.get(alias, alias) and "measured" in results:
            measured[backbone_of(read_config(folder))] = results["measured"]
    return measured


def _parts(heads: Iterable[JSON]) -> dict[str, list[JSON]]:
    """Return the same set of rows of each head, by its name; {} where a head was not measured on it."""
    heads = [{part["name"]: part for part in head["parts"]} for head in heads]
    names = dict.fromkeys(name for head in heads for name in head)
    return {name: [head.get(name, {}) for head in heads] for name in names}


def _common_rate(heads: Iterable[JSON]) -> str | None:
    """Return the first threshold that all heads were measured at; None for heads without thresholds."""
    first, *others = (head["rates"] for head in heads)
    return next((rate for rate in first if all(rate in rates for rates in others)), None)


def _tfidf(parts: Sequence[JSON]) -> JSON:
    return next((part["tfidf"] for part in parts if part.get("tfidf")), {})


def _set_name(name: str) -> str:
    base = name.removesuffix("_clean")
    return SETS.get(base, plain(base)) + (", clean" if base != name else "")


def _judge(parts: Sequence[JSON]) -> str:
    """Return who judged a set of rows: the bundled heads, or ablations that have not learned from it."""
    ablations = {part["ablation"] for part in parts if part}
    return "the head" if ablations == {None} else "held-out ablation"


def _share(flagged: JSON | None) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(flagged["share"], *flagged["interval"]) if flagged else "-"


def _score(part: JSON, metric: str) -> str:
    if part.get(metric) is None:
        return "-"
    return "{:.3f} [{:.3f}, {:.3f}]".format(part[metric], *part["intervals"][metric])


def _flagged(part: JSON, label: str, rate: str) -> str:
    return _share(part.get("labels", {}).get(label, {}).get(rate))


def _rows_of(parts: Sequence[JSON], label: str | None = None) -> str:
    """Return the number of rows of a set, or of its rows with a label. Two numbers if heads were measured on different draws."""
    counts = [part.get("labels", {}).get(label, {}).get("rows") if label else part.get("rows") for part in parts]
    return " / ".join(f"{count:,}" for count in dict.fromkeys(filter(None, counts))) or "-"


def _header(heads: Iterable[str], *before: str) -> list[str]:
    return [*before, *map(plain, heads), "TF-IDF"]


def readme_table() -> str:
    """Return the shares that `safety` flags of hard rows and of easy ones."""
    heads = measured_of("safety")
    rate = _common_rate(heads.values())
    parts = _parts(heads.values())
    rows = []
    for name, label, words in HARD_TO_EASY:
        if name in parts:
            same = parts[name]
            wanted = "low" if label == "harmless" else "high"
            star = "" if _judge(same) == "the head" else "\\*"
            cells = [_flagged(part, label, rate) for part in (*same, _tfidf(same))]
            rows.append([f"{words}{star}", _rows_of(same, label), wanted, *cells])
    return markdown_table(_header(heads, "flagged", "rows", "wanted"), rows, "lrl" + "r" * (len(heads) + 1))


def flagged_table(alias: str) -> Callable[[], str]:
    """Return a function that gives AUROC, AUPRC and the flagged shares of each set of rows, the hardest set first."""

    def table() -> str:
        heads = measured_of(alias)
        rate = _common_rate(heads.values())
        parts = {name: same for name, same in _parts(heads.values()).items() if "copy of the backbone" not in name}
        rows = []
        for name in sorted(parts, key=lambda name: _hardness(parts[name])):
            same = parts[name]
            for figure, label, count, cells in _figures(same, rate):
                rows.append([_set_name(name) + (f": {label}" if label else ""), count, figure, _judge(same), *cells])
        return markdown_table(
            _header(heads, "rows", "number", "figure", "judged by"), rows, "lrll" + "r" * (len(heads) + 1)
        )

    return table


def _hardness(parts: Sequence[JSON]) -> tuple[bool, float]:
    scores = [part["auroc"] for part in parts if part.get("auroc") is not None]
    return not scores, sum(scores) / len(scores) if scores else 0.0


def _figures(parts: Sequence[JSON], rate: str | None) -> Iterable[tuple[str, str, str, list[str]]]:
    """Yield the figures of a set of rows: its name, the label, the number of rows, and a cell for each head and for TF-IDF."""
    every = [*parts, _tfidf(parts)]
    for metric in ("auroc", "auprc"):
        if any(part.get(metric) is not None for part in parts):
            yield metric.upper(), "", _rows_of(parts), [_score(part, metric) for part in every]
    for label in dict.fromkeys(label for part in parts for label in part.get("labels", {})):
        shares = [part.get("labels", {}).get(label, {}) for part in every]
        if rate and any(rate in share for share in shares):
            yield f"flagged at `{rate}`", label, _rows_of(parts, label), [_share(share.get(rate)) for share in shares]
        elif not rate and any(share.get("auroc") is not None for share in shares):  # one of several labels to find
            yield "AUROC", label, _rows_of(parts, label), [_score(share, "auroc") for share in shares]


def copies_table() -> str:
    """Return the AUROC of `safety` on a quantised copy of its backbone, beside the backbone itself."""
    heads = measured_of("safety")
    parts = _parts(heads.values())
    rows = []
    for name, same in parts.items():
        base, found, copy = name.partition(", ")
        if found and "copy of the backbone" in copy:
            rows.append([f"{_set_name(base)}, the backbone itself", *(_score(part, "auroc") for part in parts[base])])
            rows.append([f"{_set_name(base)}, {copy}", *(_score(part, "auroc") for part in same)])
    rows = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    return markdown_table(["AUROC", *map(plain, heads)], rows, "l" + "r" * len(heads))


def kept_table(alias: str) -> Callable[[], str]:
    """Return a function that gives the share of transformed rows that stay flagged, by transformation."""

    def table() -> str:
        heads = measured_of(alias)
        rows = []
        for group in ("wrappings", "attacks", "documents", "long"):
            groups = [head.get(group, {}) for head in heads.values()]
            for name in dict.fromkeys(name for each in groups for name in each.get("kept", {})):
                count = " / ".join(str(n) for n in dict.fromkeys(each["rows"] for each in groups if "rows" in each))
                tfidf = next((each["tfidf"] for each in groups if "tfidf" in each), {})
                rows.append([plain(name), group, count, *(kept_share(each, name) for each in (*groups, tfidf))])
        if not rows:
            return "Not measured for the heads of this version."
        columns = _header(heads, "change", "kind", "rows")
        return markdown_table(columns, rows, "llr" + "r" * (len(heads) + 1))

    return table


def languages_table() -> str:
    """Return AUROC and flagged shares of `safety` by language, for each set of rows that was measured so."""
    heads = measured_of("safety")
    rate = _common_rate(heads.values())
    rows = []
    for name, same in _parts(heads.values()).items():
        slices = [part.get("slices", {}).get("language", {}) for part in same]
        for code in sorted({code for each in slices for code in each}, key=lambda code: LANGUAGES.get(code, code)):
            each = [languages.get(code, {}) for languages in slices]
            if not any(part.get("auroc") is not None for part in each):
                continue
            counts = [_rows_of(each, label) for label in ("harmless", "harmful")]
            cells = []
            for part in each:
                cells.append(f"{part['auroc']:.2f}" if part.get("auroc") is not None else "-")
                cells += [_short(part, label, rate) for label in ("harmful", "harmless")]
            rows.append([LANGUAGES.get(code, code), _set_name(name), _judge(same), ", ".join(counts), *cells])
    columns = ["language", "rows", "judged by", "harmless, harmful"]
    for head in heads:
        columns += [f"{plain(head)}: AUROC", "found", "flagged"]
    return markdown_table(columns, rows, "lllr" + "rrr" * len(heads))


def _short(part: JSON, label: str, rate: str) -> str:
    flagged = part.get("labels", {}).get(label, {}).get(rate)
    return f"{flagged['share']:.2f}" if flagged else "-"


def published_table() -> str:
    """Return the published AUROC of guard models, and that of `safety` on the rows that this project has of the same sets."""
    rows = [
        [name, size, "its authors' paper", f"{aegis:.3f}", f"{toxic:.3f}"] for name, size, aegis, toxic in PUBLISHED
    ]
    for folder in bundled_heads().values():
        if folder.name == ALIASES["safety"]:
            results = read_results(folder)
            parts = {part["name"]: part for part in results["measured"]["parts"]}
            scores = [_score(parts.get(name, {}), "auroc") for name in ("aegis", "toxicchat")]
            where = f"`safety` on {backbone_of(read_config(folder))}"
            rows.append([where, f"{results['num_parameters'] / 1e6:.1f}M", "this page", *scores])
    return markdown_table(("guard", "parameters", "figures of", "Aegis", "ToxicChat"), rows, "lrlrr")


# Long texts.


def long_texts_table() -> str:
    """Return the shares of docs/long-texts.json by guard and length: found at each place, and flagged without a request."""
    if not LONG_TEXTS.exists():
        return "`python examples/long_texts.py` measures it. It was not run for the heads of this version."
    report = json.loads(LONG_TEXTS.read_text(encoding="utf-8"))
    places = ("first", "in the middle", "last", None)
    rows = []
    for guard, cells in report["cells"].items():
        found = {(cell["kind"], cell["words"], cell["place"]): cell for cell in cells}
        rows.append([plain(guard), "the request alone", _share(report["alone"][guard]), "", "", "-"])
        for words in sorted({cell["words"] for cell in cells}):
            shares = [_share(found.get(("all", words, place))) for place in places]
            rows.append([plain(guard), f"{words:,} words", *shares])
    columns = "guard", "length", "found: request first", "in the middle", "last", "flagged without a request"
    tokens = f"{report['tokens']:,} tokens; seconds: " + ", ".join(
        f"{name} {s:,.0f}" for name, s in report["seconds"].items()
    )
    picture = DOCS / "long-texts.png"
    shown = "![Requests found, and texts flagged without one, by words of harmless text](long-texts.png)\n\n"
    return (shown if picture.exists() else "") + markdown_table(columns, rows, "llrrrr") + f"\n\n{tokens}."


# Options.


def commands_table() -> str:
    """Return a section for each command: what it does, examples, and its options."""
    sections = []
    for name, entry in COMMANDS.items():
        examples = "\n".join(f"    {line}" for line in entry.examples)
        rows = []
        for option in load_command(name).params:
            if option.name == "help":
                continue
            is_argument = option.param_type_name == "argument"
            shown = option.name.upper() if is_argument else ", ".join(option.opts)
            default = (
                "" if option.default in (None, False, (), []) or callable(option.default) else _default(option.default)
            )
            rows.append([f"`{shown}`", default, plain(option.help or "")])
        table = markdown_table(("option", "default", "meaning"), rows, "lll")
        sections.append(f"## llama-probe {name}\n\n{entry.summary}\n\n{examples}\n\n{table}\n")
    return "\n".join(sections)


def _default(value: object) -> str:
    values = value if isinstance(value, (list, tuple)) else [value]
    return "`" + " ".join(str(each) for each in values) + "`"


def server_table() -> str:
    """Return the options of the server with heads, without those of vLLM."""
    rows = []
    for action in server_parser()._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        shown = ", ".join(action.option_strings) or action.dest.upper()
        value = f" {action.metavar}" if action.metavar else ""
        rows.append([f"`{shown}{value}`", plain(action.help or "")])
    return markdown_table(("option", "meaning"), rows, "ll")


TABLES: dict[str, Callable[[], str]] = {
    "aliases": aliases_table,
    "categories": flagged_table("safety-categories"),
    "categories-kept": kept_table("safety-categories"),
    "commands": commands_table,
    "copies": copies_table,
    "guard": flagged_table("safety"),
    "guard-kept": kept_table("safety"),
    "hard-to-easy": readme_table,
    "heads": heads_table,
    "injections": flagged_table("injection"),
    "injections-kept": kept_table("injection"),
    "languages": languages_table,
    "licences": licences_table,
    "long-texts": long_texts_table,
    "models": models_table,
    "published": published_table,
    "replies": flagged_table("safety-reply"),
    "server": server_table,
    "thresholds": thresholds_table,
}


def written(page: str) -> str:
    """Return a page with all its tables in their places."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def main() -> None:
    """Name the stale pages, or write them with `--write`."""
    stale = 0
    for path in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        page = path.read_text(encoding="utf-8")
        if (new := written(page)) != page:
            stale += 1
            print(path)
            if "--write" in sys.argv[1:]:
                path.write_text(new, encoding="utf-8")
    sys.exit(stale > 0 and "--write" not in sys.argv[1:])


if __name__ == "__main__":
    main()
