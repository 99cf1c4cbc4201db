"""Causal LMs that score their prompts with probe heads in the pass that starts generation."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..backbone.decoder import find_decoder, target_of, without_peft
from ..backbone.kv_cache import cached_tokens, copy_cache
from ..backbone.loading import model_of, record_commit
from ..backbone.passes import split_pass
from ..data.prompts import Text
from ..errors import ProbeError
from ..heads.decision import ProbeOutput, abstaining
from ..heads.novelty import abstain_levels
from ..heads.probe import ProbeModel
from ..progress_bar import ProgressBar
from .cache import ProbeCache, asks_for_state, refuse_without_heads
from .host import ProbeHostMixin, change_class, fitting_heads
from .loading import ProbeSpec, load_with_heads, read_heads
from .outputs import ProbedOutputMixin, with_results
from .reader import PromptReader
from .session import (
    HEAD_ARGUMENTS,
    PAGED,
    PlainSession,
    ProbedSession,
    end_stream,
    generate_session,
    session_of,
)
from .texts import as_texts, classify_texts


logger = logging.get_logger(__name__)

_NOT_SCORED = (
    "A pass that continues from a cache was not scored (probe_logits is None): pass the probe_state= of the call that filled it, or the "
    "whole prompt without a cache. PEFT's prefix tuning makes such a cache: score with get_base_model().classify(...)."
)


class ProbedGenerationMixin(ProbeHostMixin):
    """Probe heads for a causal LM class: `class X(ProbedGenerationMixin, SomeForCausalLM)`.

    `generate`, `forward` and `classify` score the prompt with every active head. Without active heads the model is the
    plain LM.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        models = (each for each in cls.__mro__ if issubclass(each, PreTrainedModel))
        base: Any = next(each for each in models if not issubclass(each, ProbedGenerationMixin))
        cls._causal_lm_class = base
        names = tuple(inspect.signature(base.forward).parameters)[1:]

        # transformers reads the signatures of these two to learn what a model accepts: they must be the plain class's.
        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            return self._probed_forward(kwargs | dict(zip(names, args, strict=False)))

        @functools.wraps(base.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self, *args, **kwargs):
            inputs = base.prepare_inputs_for_generation(self, *args, **kwargs)
            session = session_of(self)
            if session is not None:
                # forward() gets its session as an argument, or False for a decoding step that no head follows. It then looks
                # nothing up, and compiles as that of the plain class does.
                inputs["probe_session"] = session.reads_next and session
            return inputs

        cls.forward = forward
        cls.prepare_inputs_for_generation = prepare_inputs_for_generation

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_type = "ForCausalLM"  # transformers reads it off the name of the class
        self._install_probes({})

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        # accelerate's hook around forward() builds the output anew from its fields, and so forgets the heads.
        if not torch.compiler.is_dynamo_compiling() and isinstance(output, ProbedOutputMixin):
            output.remember(self._heads)
        return output

    @classmethod
    def from_causal_lm(
        cls, lm: nn.Module, probe: ProbeSpec | None = None, strict: bool = False
    ) -> ProbedGenerationMixin:
        """Turn a loaded causal LM into this class, in place, attach heads and return it.

        Weights, device placement, quantisation and injected LoRA layers stay as they are.

        Args:
            lm: a model of the plain class that this one is made from. A PEFT model is unwrapped.
            probe: heads; see `from_pretrained`.
            strict: raise if a head was trained on another backbone. Defaults to a warning.

        Raises:
            ProbeError: `lm` is of another class, or a head cannot be read or does not fit; `lm` is then unchanged.
        """
        model: Any = without_peft(lm)
        target = target_of(model)
        heads = read_heads(probe, target) if probe is not None else {}
        if isinstance(model, ProbedGenerationMixin):
            model._attach(heads, strict)
            return model
        plain = type(model)
        if plain is not cls._causal_lm_class:
            made = f"{cls.__name__} is made from a {cls._causal_lm_class.__name__}, not from a {plain.__name__}"
            raise ProbeError(f"{made}; AutoModelForProbedGeneration.from_causal_lm takes any causal LM")
        heads = fitting_heads(model, heads, strict)
        change_class(model, cls)
        model._install_probes(heads)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        probe: ProbeSpec | None = None,
        probe_strict: bool = False,
        **kwargs,
    ):
        """Load a model as `PreTrainedModel.from_pretrained` does, with heads.

        Args:
            pretrained_model_name_or_path: a model, or `"demo"`. Without `probe` it may be a head, whose backbone is then
                loaded.
            probe: a head folder, a Hub id (`user/repo`, optionally with `@revision` and `:subfolder`), an alias, a
                `ProbeModel`, a list of these, or a dict name -> one of these; see `resolve_head`. Defaults to the heads
                that `save_pretrained` has kept beside the model; `[]` for none.
            probe_strict: raise if a head was trained on another backbone. Defaults to a warning.
            kwargs: as in the plain class. Those that say how to fetch files are used for the heads too.

        Raises:
            ProbeError: a head cannot be read (before the backbone is loaded) or does not fit it.
        """
        place = pretrained_model_name_or_path
        loaded, heads = load_with_heads(super().from_pretrained, place, model_args, kwargs, probe)
        model = model_of(loaded)
        record_commit(model, kwargs)
        model._attach(heads, probe_strict)
        return loaded

    def _probed_forward(self, kwargs: dict[str, Any]) -> Any:
        session = kwargs.pop("probe_session", None)
        if session is None and not torch.compiler.is_dynamo_compiling() and (running := session_of(self)) is not None:
            # The decoding method has called the model itself: first over the prompt, later for its own purposes.
            session = running if running.reads_prompt else False
        if session is None:
            heads = self._active_heads(kwargs.pop("probes", None))
            probe_mask = kwargs.pop("probe_mask", None)
            probe_state = kwargs.pop("probe_state", None)
            if heads:
                return self._forward_with_heads(heads, kwargs, probe_mask, probe_state)
            refuse_without_heads(probe_state)
        return self._forward_in_session(session, kwargs) if session else super().forward(**kwargs)

    # torch.compile breaks its graph at the next two methods, because hooks come and go and heads look at values.

    @torch.compiler.disable
    def _forward_in_session(self, session: ProbedSession, kwargs: dict[str, Any]) -> Any:
        return session.forward(super().forward, kwargs)

    @torch.compiler.disable
    def _forward_with_heads(
        self,
        heads: dict[str, ProbeModel],
        kwargs: dict[str, Any],
        probe_mask: torch.Tensor | None,
        probe_state: ProbeCache | bool | None,
    ) -> Any:
        """Run a forward pass that the user has called, over the new tokens in `kwargs`, and score the prompts so far.

        The heads return a state if `probe_state` or `use_cache=True` asks for one.
        """
        past = cached_tokens(kwargs)
        ids: Any = kwargs.get("input_ids")
        in_training = self.training and torch.is_grad_enabled() and not past and not probe_state
        keep = asks_for_state(probe_state, ids, kwargs.get("use_cache"))
        earlier = probe_state if isinstance(probe_state, ProbeCache) else None
        inputs = kwargs
        if earlier is not None:
            inputs = earlier.followed_by(ids, kwargs.get("attention_mask"))
        elif past and keep:
            raise ProbeError(f"probe_state=True: the cache already holds {past} tokens that the heads have not seen")
        elif past:  # a later step of a decoding loop of the user
            if ids is not None and ids.shape[1] > 1:
                logger.warning_once(_NOT_SCORED)
            return with_results(super().forward(**kwargs), None, heads)
        keep = not in_training and (keep or (ids is not None and bool(kwargs.get("use_cache"))))
        prompt = PromptReader(
            heads,
            find_decoder(self),
            inputs,
            probe_mask,
            past=past,
            earlier=earlier,
            return_state=keep,
            partial_prompt=keep,
            differentiable=in_training,
        )
        if not past:
            self._warn_of_padding(prompt.input_ids, kwargs.get("attention_mask"), probe_mask)
        with prompt.reading(kwargs) as inputs:
            output = super().forward(**inputs)
        state = {"probe_state": prompt.probe_cache()} if keep else {}
        return with_results(output, prompt.results, heads, **state)

    def classify(
        self,
        input_ids: torch.LongTensor | str | Sequence[Text] | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        probe_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        cache: Cache | None = None,
        probe_state: ProbeCache | None = None,
        probes: str | Iterable[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        abstain_at: float | dict[str, float] | None = None,
        max_length: int | None = None,
        passages: bool = False,
        **kwargs,
    ) -> dict[str, ProbeOutput]:
        """Score prompts without generating. The backbone runs once, without its LM head.

        Example:
            >>> model.classify(["Well done!", "I hate it."], tokenizer=tokenizer)["mood"].labels
            ['good', 'bad']

        Args:
            input_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*): or a text, a chat, or a list of these.
                They are rendered as each head was trained, and batched by length. The only other arguments are then
                `probes`, `output_attentions`, `tokenizer`, `abstain_at`, `max_length` and `passages`.
            attention_mask (`[batch, tokens]`, *optional*): 0 for padding on either side.
            inputs_embeds (`[batch, tokens, hidden_size]`, *optional*): instead of `input_ids`.
            probe_mask (`[batch, tokens]`, *optional*): true for the tokens that count, in place of the heads' own
                `token_scope`.
            output_attentions: return `token_weights` and `layer_weights` of each head too.
            cache: KV cache of the first tokens of each prompt. The backbone runs over the other tokens, on a copy of it.
            probe_state: the state that was returned with the cache.
            probes: names of the heads that run in this call. Defaults to the active heads.
            tokenizer: the backbone's tokenizer or processor, for texts.
            abstain_at: novelty from 0 to 1, such as 0.99, above which a row's label is `None`; or a dict of these by head.
            max_length: number of tokens to which texts are cut, with a warning. By default a head with windows reads a text
                whole, and any other head reads as many tokens as its training rows have (`ProbeConfig.max_length`).
            passages: also find the passages of a text in which a head with windows found flagged labels: `describe()` of the
                outputs returns them as `passages`. Needs a fast tokenizer.
            kwargs: passed to the backbone, with `pixel_values` and the like for models that read images. Image tokens do
                not count unless `probe_mask` says so.

        Returns:
            `ProbeOutput` by head name.

        Raises:
            ProbeError: no head is active, or a prompt cannot be scored.
        """
        heads = self._active_heads(probes)
        if not heads:
            raise ProbeError("no head is active: load_probe(...) or set_active_probes([...]) first")
        configs = {name: head.config for name, head in heads.items()}
        levels = abstain_levels(abstain_at, configs)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
        texts = as_texts(input_ids)
        if texts is not None:
            others = {**inputs, "probe_mask": probe_mask, "cache": cache, "probe_state": probe_state}
            refused = [name for name, value in others.items() if value is not None]
            if refused:
                raise ProbeError(f"classify(texts) makes its own inputs and takes no {refused[0]}")
            return classify_texts(
                self, configs, texts, tokenizer, output_attentions, max_length, levels=levels, passages=passages
            )
        if max_length is not None or passages:
            given = "passages" if max_length is None else f"max_length={max_length}"
            raise ProbeError(f"{given} is for texts, and these are input_ids or inputs_embeds")
        if probe_state is True:
            raise ProbeError("classify returns no probe_state; generate() and model(..., use_cache=True) do")
        inputs["input_ids"] = input_ids
        cache = inputs.pop("past_key_values", None) if cache is None else cache
        past = cached_tokens({"cache": cache})
        decoder = find_decoder(self)
        prompt = PromptReader(
            heads,
            decoder,
            inputs,
            probe_mask,
            past=past,
            earlier=probe_state or None,
            output_attentions=output_attentions,
        )
        self._warn_of_padding(prompt.input_ids, attention_mask, probe_mask)
        inputs = {key: value for key, value in inputs.items() if value is not None} | {"use_cache": False}
        if past:
            if "position_ids" not in inputs and attention_mask is not None and not attention_mask[:, :past].all():
                raise ProbeError("the cached part of the prompts has padding: pass position_ids, [batch, new_tokens]")
            inputs |= {name: inputs[name][:, past:] for name in ("input_ids", "inputs_embeds") if name in inputs}
            inputs |= {"cache": copy_cache(cache), "use_cache": True}
        passes = [inputs] if output_attentions else split_pass(decoder, inputs, past)
        bar = ProgressBar(prompt.length - past, "reading", "tokens", delay=3, is_hidden=len(passes) == 1)
        with torch.no_grad(), bar:
            for arguments in passes:
                seen = prompt.seen
                with prompt.reading(arguments, whole=False) as arguments:
                    decoder.run(**arguments)
                bar.update(prompt.seen - seen)
        return abstaining(prompt.results, levels)

    def _warn_of_padding(self, input_ids: torch.Tensor | None, *masks: torch.Tensor | None) -> None:
        """Warn once if rows seem to be padded and there is no mask, because heads score the padding as text."""
        pad = self.config.get_text_config(decoder=True).pad_token_id
        if pad is None or input_ids is None or any(mask is not None for mask in masks):
            return
        is_pad = input_ids == pad
        at_edge = is_pad[:, 0] | is_pad[:, -1]
        is_long = is_pad[:, :2].all(dim=1) | is_pad[:, -2:].all(dim=1)
        # If all rows have a single pad token, it may come from the template.
        if bool(is_long.any()) or (bool(at_edge.any()) and not bool(at_edge.all())):
            logger.warning_once(
                "Rows are padded and there is no attention_mask: heads score the padding as text. Pass the tokenizer's "
                "attention_mask."
            )

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, *args, **kwargs) -> Any:
        """Generate as `GenerationMixin.generate` does. Every active head scores the prompt in the same pass.

        It takes these arguments beside those of the plain `generate`:

        - `probes`: names of the heads that run in this call. Defaults to the active heads.
        - `abstain_at`: a novelty from 0 to 1, such as 0.99, or a dict of these by head. `probe_labels` are `None` for
          prompts above it. Logits and halts stay the same.
        - `probe_mask` (`[batch, tokens]`): true for the tokens that count. Defaults to the heads' `token_scope`, without the
          tokens of images, films and sounds.
        - `halt_on`: which prompts get no reply: a head's name, a list of names, a dict name -> options, or a function of the
          outputs; see `Halter`. The decision comes at the end of the prefill. If all prompts are halted, no token is decoded. A
          head that reads replies halts a reply at the token that it flags, or with `patience` n at the n-th flagged token in a
          row. With `window` n it judges a token by the mean probabilities of the last n tokens. The token that halts is the last
          one of the sequence. With `token_scope="all"` the prompt counts as the first token of the patience.
        - `halt_reply`: a text (needs `tokenizer=`) or token ids, in place of the reply or of its rest. Defaults to nothing.
        - `on_probe_token`: called with a `TokenScores` after each reply token that the LM has read. It may return a list
          with an entry per row: true or a `Halt` ends the reply. If it raises, no further token is written.
        - `probe_state`: `True` returns the heads' state as `out.probe_state`. Pass it to the next call with `cache=`: the
          heads then score the whole conversation, and only its new tokens run. See `ProbeCache`.

        Heads that follow replies, for themselves or for `probe_state`, need greedy search or sampling, and decode without
        `torch.compile`.

        `return_dict_in_generate` defaults to `True`. With `False` the plain tensor is returned, and heads run only if they
        may halt. Decode `out.sequences`, not `out`; with `tokenizer=` the new texts are in `out.texts`.

        Returns:
            The plain output with `probe_logits`, a dict of `[prompts, num_labels]` by head name, and the other fields of
            `ProbedOutputMixin`. Beams and return sequences share the row of their prompt. Heads with
            `token_scope="response"` are only in `probe_token_logits`.

        Raises:
            ProbeError: the prompt cannot be scored as a whole, the replies cannot be followed, or `halt_on` is not allowed.
        """
        plain = super().generate
        names = list(inspect.signature(plain).parameters)[2:]
        kwargs |= dict(zip(names, args, strict=False))
        arguments = {name: kwargs.pop(name, None) for name in HEAD_ARGUMENTS}
        call = PlainSession(plain, self, inputs, generation_config, kwargs)
        # A decoding method may call generate() again, of this model or of its assistant, and passes no argument of heads. Code of
        # the user, such as a streamer, may call it with such an argument.
        is_inner = session_of(self) is not None or getattr(generation_config, "is_assistant", False)
        is_inner = is_inner and all(value is None for value in arguments.values())
        probes = arguments.pop("probes")
        try:
            heads = {} if is_inner else self._active_heads(probes)
            return generate_session(call, heads, **arguments).run()
        except BaseException:
            if not is_inner:
                end_stream(kwargs.get("streamer"))
            raise

    def init_continuous_batching(self, *args, **kwargs):
        """Start continuous batching, without heads: they cannot read its paged passes."""
        if self._active_probes:
            raise ProbeError(PAGED)
        return super().init_continuous_batching(*args, **kwargs)


class LlamaForProbedGeneration(ProbedGenerationMixin, LlamaForCausalLM):
    """`LlamaForCausalLM` with probe heads."""
