"""`pipeline("probed-text-generation", model=..., probe=...)`: text generation, with what each head says of the prompt."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextGenerationPipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import ModelOutput

from ..backbone.decoder import target_of, without_peft
from ..heads.decision import reply_outputs, verdict
from ..hub.transport import HubOptions
from .auto_class import AutoModelForProbedGeneration
from .modeling import ProbedGenerationMixin
from .outputs import PROBED_FIELDS
from .sources import ProbeSpec, read_heads


TASK = "probed-text-generation"


class ProbedTextGenerationPipeline(TextGenerationPipeline):
    """`TextGenerationPipeline` with heads that read the prompt in the pass that starts the text.

    Takes what `TextGenerationPipeline` takes - texts, which go to the model as they are, or chats, which go through the
    chat template; one or a list of them; `batch_size` and parameters of `generate` - and returns the same dicts with one
    more key, `"probes"`: for each head by name

    - `{"label": name, "score": its probability, "scores": {label: probability}}`,
    - for multi-label heads the same, with a list of labels and a list of their probabilities,
    - for regression heads `{"score": value}`, or `{"scores": {label: value}}` where there are several outputs.

    With `halt_on=`, which `generate` takes, there is `"halted"` as well: a dict of why the prompt got no reply, or `None`. A text
    as `halt_reply=` needs no `tokenizer=` here.

    Heads that read replies alone (`token_scope="response"`) are there too, with what they say of the sequence as far as it was
    read, or `None` where no token of it was; what the others say is the same for every sequence of a prompt. With
    `return_dict_in_generate=False` heads do not run, and `"probes"` is empty.

    Args:
        model: a causal LM that is loaded already; it gets the heads in place. `pipeline(...)` takes a path or a Hub id.
        tokenizer: left as it is; the pipeline works on a copy that pads on the left.
        probe: heads; see `LlamaForProbedGeneration.from_pretrained`. Those that the model has already run as well.
        probe_revision, probe_namespace: see `LlamaForProbedGeneration.from_pretrained`.
        probe_strict: raise, rather than warn, where a head was trained on another backbone.
        kwargs: those of `TextGenerationPipeline`.

    Raises:
        ProbeError: a head cannot be read or does not fit, or the model is no causal LM.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        probe: ProbeSpec | None = None,
        probe_revision: str | None = None,
        probe_namespace: str | None = None,
        probe_strict: bool = False,
        **kwargs,
    ):
        model = _with_heads(model, probe, probe_revision, probe_namespace, probe_strict)
        _name_classes(model.config)
        super().__init__(model=model, tokenizer=_padding_left(tokenizer), **kwargs)

    def check_model_type(self, supported_models) -> None:
        """Accepts every probed class; the plain ones have been turned into them."""

    def _forward(self, model_inputs, **generate_kwargs):
        # A copy of the pipeline for this call alone, so that two threads can share the pipeline.
        listener = _Listener(self.model, getattr(self, "generation_config", None))
        if isinstance(generate_kwargs.get("halt_reply"), str):
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        twin = copy.copy(self)
        twin.model = listener
        outputs = super(ProbedTextGenerationPipeline, twin)._forward(model_inputs, **generate_kwargs)
        prompts = len(outputs["generated_sequence"])
        outputs["probes"] = _verdicts(listener, prompts)
        outputs["further"] = _of_sequences(listener, prompts)
        return outputs

    def postprocess(self, model_outputs, *args, **kwargs):
        # A batch of several prompts has been taken apart by now; one of a single prompt has not.
        probes, further = (
            part[0] if isinstance(part, list) else part for part in map(model_outputs.pop, ("probes", "further"))
        )
        records = super().postprocess(model_outputs, *args, **kwargs)
        for record, more in zip(records, itertools.cycle(further)):
            found = copy.deepcopy(more)
            record["probes"] = copy.deepcopy(probes) | found.pop("probes", {})
            record.update(found)
        return records


def install() -> None:
    """Makes the task known to `transformers.pipeline`. Calling this twice changes nothing; `uninstall` undoes it."""
    known = PIPELINE_REGISTRY.supported_tasks.get(TASK)
    if known is not None and known["impl"] is ProbedTextGenerationPipeline:
        return
    PIPELINE_REGISTRY.register_pipeline(TASK, ProbedTextGenerationPipeline, pt_model=AutoModelForCausalLM, type="text")
    # With it, Pipeline.save_pretrained would copy this file beside the model, without the modules that it needs.
    del ProbedTextGenerationPipeline._registered_impl


def uninstall() -> None:
    """Takes the task out of transformers' list again."""
    PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)


class _Listener:
    """Stands in for the model during one call, and keeps what `generate` returned."""

    def __init__(self, model: PreTrainedModel, defaults: GenerationConfig | None):
        self.model = model
        self.defaults = defaults
        self.output: Any = None

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def generate(self, *args, **kwargs):
        # Older versions of transformers pass a config of the pipeline's, full of defaults that nobody asked for.
        if self.defaults is not None and kwargs.get("generation_config") is self.defaults:
            kwargs.setdefault("return_dict_in_generate", True)
        self.output = output = self.model.generate(*args, **kwargs)
        if not isinstance(output, ModelOutput):
            return output
        # Some versions take every output apart by rows, which a dict has not.
        return ModelOutput({name: value for name, value in output.items() if name not in PROBED_FIELDS})


def _verdicts(listener: _Listener, prompts: int) -> list[dict[str, dict[str, Any]]]:
    """What each head says, by name, of each prompt."""
    output = listener.output
    if getattr(output, "probe_logits", None) is None:
        return [{} for _ in range(prompts)]
    labels, probabilities = output.probe_labels, output.probe_probabilities
    verdicts: list[dict[str, dict[str, Any]]] = [{} for _ in range(prompts)]
    for name, rows in probabilities.items():
        config = output.config_of(name)
        for found, label, row in zip(verdicts, labels[name], rows.tolist(), strict=True):
            found[name] = verdict(label, row, config)
    return verdicts


def _of_sequences(listener: _Listener, prompts: int) -> list[tuple[dict[str, Any], ...]]:
    """For each prompt what is said of its sequences: why they were halted, and by heads that read replies alone.

    One entry is for all sequences of the prompt.
    """
    output = listener.output
    halts = getattr(output, "probe_halts", None) or []
    parts: list[list[dict[str, Any]]] = [[{"halted": halt and asdict(halt)} for halt in halts]]
    replies: list[dict[str, Any]] = []
    for name, logits in (getattr(output, "probe_token_logits", None) or {}).items():
        if name in output.probe_logits:
            continue
        config = output.config_of(name)
        replies = replies or [{} for _ in logits]
        for found, said in zip(replies, reply_outputs(logits, config), strict=True):
            found[name] = None if said is None else verdict(said.labels[0], said.probabilities[0].tolist(), config)
    parts.append([{"probes": found} for found in replies])
    each = max(1, *(len(part) // prompts for part in parts))
    rows: list[dict[str, Any]] = [{} for _ in range(prompts * each)]
    for part in filter(None, parts):
        for i, row in enumerate(rows):
            row.update(part[i * len(part) // len(rows)])
    return [tuple(rows[i * each : (i + 1) * each]) for i in range(prompts)]


def _with_heads(model, probe, revision, namespace, strict) -> PreTrainedModel:
    if hasattr(type(model), "_causal_lm_class") and not isinstance(model, ProbedGenerationMixin):
        # The class comes from a repository that carries its own copy of this code (trust_remote_code=True), and may
        # have heads already. It keeps both, and reads further heads itself.
        sources = probe if isinstance(probe, (Mapping, list, tuple)) else [] if probe is None else [probe]
        pairs = sources.items() if isinstance(sources, Mapping) else [(None, source) for source in sources]
        for name, source in pairs:
            model.load_probe(source, name, revision=revision, namespace=namespace, strict=strict)
        return model
    heads = None
    if probe is not None:
        base = without_peft(model)
        # One repository may hold both: a head is then taken from the commit that the backbone was taken from.
        target = replace(target_of(base), revision=getattr(base.config, "_commit_hash", None))
        heads = read_heads(probe, target, HubOptions(revision), namespace)
    return AutoModelForProbedGeneration.from_causal_lm(model, heads, strict)


def _padding_left(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or a copy where something has to be changed for batches: the side, or a missing pad token."""
    if tokenizer is None:
        return None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.padding_side != "left":
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "left"
    return tokenizer


def _name_classes(config) -> None:
    """Undoes what `pipeline()` does to a config with custom pipelines: with classes in it, it could not be saved."""
    for task in (getattr(config, "custom_pipelines", None) or {}).values():
        if isinstance(task.get("pt"), (list, tuple)):
            task["pt"] = [item if isinstance(item, str) else item.__name__ for item in task["pt"]]
