"""Pipelines of transformers with heads: "probed-text-generation" and "probed-text-classification", registered on import."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextClassificationPipeline,
    TextGenerationPipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.text_classification import ClassificationFunction

from ..errors import ProbeError
from ..heads.decision import Label
from .auto import AutoModelForProbedGeneration
from .host import ProbeSpec
from .texts import as_texts


TASK = "probed-text-generation"


class ProbedTextGenerationPipeline(TextGenerationPipeline):
    """`TextGenerationPipeline` with heads that read the prompt in the pass that starts the text.

    It takes and returns what `TextGenerationPipeline` does. Its records have one more key, `"probes"`: by head name what
    `describe_predictions` returns. With `halt_on=` there is `"halted"` as well: the fields of a `Halt`, or `None`. A text as `halt_reply=` needs no `tokenizer=` here.

    Heads that read replies alone (`token_scope="response"`) give their score of the sequence as far as the LM has read it,
    or `None` if no token of it was read. The scores of other heads are the same for every sequence of a prompt. With
    `return_dict_in_generate=False` no head runs, and `"probes"` is empty.

    Args:
        model: a loaded causal LM, which gets the heads in place. `pipeline(...)` takes a path or a Hub id.
        tokenizer: not changed; the pipeline uses a copy that pads on the left.
        probe, probe_strict: see `LlamaForProbedGeneration.from_pretrained`. Heads that the model already has run as well.
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
        probe_strict: bool = False,
        **kwargs,
    ):
        model = AutoModelForProbedGeneration.from_causal_lm(model, probe, probe_strict)
        if tokenizer is not None and (tokenizer.padding_side != "left" or tokenizer.pad_token_id is None):
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.padding_side = "left"
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)

    def check_model_type(self, supported_models) -> None:
        """Accept the probed classes, which transformers does not list."""

    def _forward(self, model_inputs, **generate_kwargs):
        if generate_kwargs.keys() & {"halt_on", "halt_reply"}:
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        # Copies of pipeline and model for this call alone, so that two threads can share the pipeline.
        model: Any = self.model
        twin, listening, generated = copy.copy(self), copy.copy(model), []

        def generate(*args: Any, **kwargs: Any) -> Any:
            generated.append(output := model.generate(*args, **kwargs))
            for name in [name for name, value in getattr(output, "items", dict)() if value == ()]:
                output[name] = None  # no token was written, and the pipeline looks at the first
            return output

        twin.model, listening.generate = listening, generate
        outputs = super(ProbedTextGenerationPipeline, twin)._forward(model_inputs, **generate_kwargs)
        prompts, copies = outputs["generated_sequence"].shape[:2]
        (output,) = generated
        rows = prompts * copies
        keys = output.describe(rows) if hasattr(output, "probe_logits") else [{"probes": {}}] * rows
        outputs["probed"] = [tuple(keys[row : row + copies]) for row in range(0, len(keys), copies)]
        return outputs

    def postprocess(self, model_outputs, *args, **kwargs):
        probed = model_outputs.pop("probed")
        # A batch of several prompts was split before; a batch of one was not.
        keys = probed[0] if isinstance(probed, list) else probed
        records = super().postprocess(model_outputs, *args, **kwargs)
        return [record | more for record, more in zip(records, keys, strict=True)]


class ProbedTextClassificationPipeline(TextClassificationPipeline):
    """`TextClassificationPipeline` of a model with heads: `pipeline("probed-text-classification", model=...)`.

    `model` is the folder or Hub id of a head, or a loaded model with heads; `probe` names one of several. Takes texts and chats,
    which `classify` renders in the head's own format and batches by length, and `top_k` as usual. The first label is the one that
    the head gives with its threshold; its score is its probability, with `function_to_apply="none"` its logit. Regression heads
    give their value as the score. With `abstain_at=0.99` a text of a larger novelty gets the label and the score `None` first.

    Raises:
        ProbeError: it is not clear which head is meant.
    """

    def __init__(self, model: PreTrainedModel, tokenizer=None, *, probe: str | None = None, **kwargs):
        probed = AutoModelForProbedGeneration.from_causal_lm(model)
        heads = probed._active_heads(probe)
        if len(heads) != 1:
            raise ProbeError(f"name one head, probe=NAME: {', '.join(heads) or 'none is active'}")
        self.probe, head = next(iter(heads.items()))
        self.head_config = head.config
        super().__init__(model=probed, tokenizer=tokenizer, **kwargs)

    check_model_type = ProbedTextGenerationPipeline.check_model_type

    # pyrefly: ignore[bad-override]
    def _sanitize_parameters(self, abstain_at: float | dict[str, float] | None = None, **kwargs: Any):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, forward, postprocess | ({} if abstain_at is None else {"abstain_at": abstain_at})

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Classify a text, a chat, or a list of them. A text may be in a dict: `{"text": ...}`."""
        inputs = _text_of(inputs)
        if isinstance(inputs, (Iterator, Dataset, list)):
            inputs = list(map(_text_of, inputs))  # pyrefly: ignore[bad-argument-type]  # a Dataset is read item by item
        if (texts := as_texts(inputs)) is None:
            raise ProbeError(f"the pipeline takes texts or chats, not {str(inputs)[:60]!r}")
        model: Any = self.model
        options = self._postprocess_params | self._sanitize_parameters(**kwargs)[2]
        call = {"tokenizer": self.tokenizer, "probes": self.probe, "abstain_at": options.get("abstain_at")}
        output = model.classify(texts, **call)[self.probe]
        is_plain = options.get("function_to_apply") == ClassificationFunction.NONE
        scores = output.logits if is_plain else output.probabilities
        ranked = [self._records(*row) for row in zip(output.labels, scores.tolist(), strict=True)]
        results = [records[: options["top_k"]] if "top_k" in options else records[0] for records in ranked]
        is_alone = isinstance(inputs, str) or isinstance(inputs[0], Mapping)
        return results[0] if is_alone and "top_k" in kwargs else results

    def _records(self, label: Label, values: list[float]) -> list[dict[str, Any]]:
        scores = dict(zip(self.head_config.id2label.values(), values, strict=True))
        # The label of the head comes first, whatever its threshold is.
        ranked = sorted(scores, key=lambda name: (name != label, -scores[name]))
        abstains = [{"label": None, "score": None}] if label is None else []
        return [*abstains, *({"label": name, "score": scores[name]} for name in ranked)]


def _text_of(row: Any) -> Any:
    return row["text"] if isinstance(row, Mapping) and "text" in row and "text_pair" not in row else row


for _task, _pipeline in {
    TASK: ProbedTextGenerationPipeline,
    "probed-text-classification": ProbedTextClassificationPipeline,
}.items():
    PIPELINE_REGISTRY.register_pipeline(_task, _pipeline, pt_model=AutoModelForCausalLM, type="text")
    # With it, Pipeline.save_pretrained would copy this file beside the model, without the modules that it needs.
    del _pipeline._registered_impl
