"""`pipeline("probed-text-generation")` of transformers, registered on import."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import ModelOutput

from ..data.prompts import PromptFormat
from ..errors import ProbeError
from ..files import JSON
from .auto import AutoModelForProbedGeneration
from .loading import ProbeSpec
from .passages import locate


TASK = "probed-text-generation"


class ProbedTextGenerationPipeline(TextGenerationPipeline):
    """`TextGenerationPipeline` with heads that read the prompt in the pass that starts the text.

    It takes and returns what `TextGenerationPipeline` does. Each record has one more key, `"probes"`: what `describe_predictions`
    returns, by head name; a head with windows also gives the `passages` of `classify(passages=True)`, in characters of the prompt
    or of a message. With `halt_on=` a record has `"halted"` as well: the fields of a `Halt`, or `None`. A text as
    `halt_reply=` needs no `tokenizer=` here.

    A head that reads replies alone (`token_scope="response"`) scores each sequence as far as the LM has read it. It gives `None`
    if the LM has read no token of the reply. All sequences of a prompt have the same scores from other heads. With
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
        model: Any = self.model
        generated = []

        def generate(*args: Any, **kwargs: Any) -> Any:
            output = model.generate(*args, **kwargs)
            generated.append(output)
            if isinstance(output, ModelOutput):
                for name, value in list(output.items()):
                    if value == ():  # no token was written, and the pipeline looks at the first
                        output[name] = None
            return output

        texts, ids, mask = (model_inputs.get(name) for name in ("prompt_text", "input_ids", "attention_mask"))
        # Copies of pipeline and model for this call alone, so that two threads can share the pipeline.
        pipeline = copy.copy(self)
        listening = copy.copy(model)
        listening.generate = generate
        pipeline.model = listening
        outputs = super(ProbedTextGenerationPipeline, pipeline)._forward(model_inputs, **generate_kwargs)
        prompts, copies = outputs["generated_sequence"].shape[:2]
        (output,) = generated
        rows = prompts * copies
        keys = output.describe(rows) if hasattr(output, "probe_logits") else [{"probes": {}}] * rows
        if self.tokenizer is not None and self.tokenizer.is_fast and ids.shape[1]:
            for prompt, text in enumerate([texts] if prompts == 1 and not isinstance(texts, list) else texts):
                kept = slice(None) if mask is None else mask[prompt].bool()
                for record in keys[prompt * copies : (prompt + 1) * copies]:
                    self._add_passages(record["probes"], text, ids[prompt][kept].tolist(), ids.shape[1])
        outputs["probed"] = [tuple(keys[row : row + copies]) for row in range(0, len(keys), copies)]
        return outputs

    def _add_passages(self, probes: JSON, text: Any, ids: list[int], columns: int) -> None:
        """Add the passages of a prompt that was padded on the left to a number of columns; none if it is more than its text."""
        padding = columns - len(ids)
        text = getattr(text, "messages", text)  # of the Chat of transformers
        tokenizer: Any = self.tokenizer
        prompts = PromptFormat(tokenizer, "raw" if isinstance(text, str) else "chat")
        for prediction in probes.values():
            if prediction is not None and "span" in prediction:
                spans = {label: [first - padding, end - padding] for label, (first, end) in prediction["span"].items()}
                with suppress(ProbeError):
                    prediction["passages"] = locate(prompts, text, ids, spans)

    def postprocess(self, model_outputs, *args, **kwargs):
        probed = model_outputs.pop("probed")
        # A batch of several prompts was split before; a batch of one was not.
        keys = probed[0] if isinstance(probed, list) else probed
        records = super().postprocess(model_outputs, *args, **kwargs)
        return [record | more for record, more in zip(records, keys, strict=True)]


PIPELINE_REGISTRY.register_pipeline(
    TASK, ProbedTextGenerationPipeline, pt_model=AutoModelForProbedGeneration, type="text"
)
# With it, Pipeline.save_pretrained would copy this file beside the model, without the modules that it needs.
del ProbedTextGenerationPipeline._registered_impl
