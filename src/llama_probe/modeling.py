"""Causal LMs that score their prompts with probe heads in the pass that starts generation."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput, logging

from .capture import without_peft
from .decision import ProbeOutput
from .errors import ProbeError
from .generation import PrefillSession, is_inner_call, open_session, prompt_masks, session_of, with_probe_logits
from .halting import Halter
from .halting_run import HaltingRun, generation_setting, token_ids
from .host import ProbeHostMixin
from .probe import ProbeModel
from .reply import ReplySession, refuse_not_followed
from .resolve import ProbeSpec, Target, read_heads, read_heads_beside
from .streaming import HoldBackStreamer


logger = logging.get_logger(__name__)


class ProbedGenerationMixin(ProbeHostMixin):
    """Adds probe heads to a causal LM class: `class X(ProbedGenerationMixin, SomeForCausalLM)`.

    `generate`, `forward` and `classify` score the prompt with every active head. Without active heads the model is the
    plain LM.
    """

    # Filled in for each subclass: the plain class, and the names of its forward's positional arguments.
    _causal_lm_class: type[PreTrainedModel]
    _forward_names: tuple[str, ...]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        base = next(
            (c for c in cls.__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, ProbedGenerationMixin)),
            None,
        )
        if base is None:
            return
        cls._causal_lm_class = base
        cls._forward_names = tuple(inspect.signature(base.forward).parameters)[1:]

        # transformers reads the signatures of these two to learn what a model accepts: they must be the plain class's.
        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            return self._probed_forward(*args, **kwargs)

        @functools.wraps(base.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self, *args, **kwargs):
            inputs = base.prepare_inputs_for_generation(self, *args, **kwargs)
            session = session_of(self)
            if session is not None:
                # The pass learns of its session by argument, and decoding steps that no head follows get a constant, so
                # that forward() looks nothing up and compiles as the plain one does.
                inputs["probe_session"] = session.next_reader
            return inputs

        cls.forward = forward
        cls.prepare_inputs_for_generation = prepare_inputs_for_generation

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._install_probes()

    @classmethod
    def from_causal_lm(
        cls, lm: PreTrainedModel, probe: ProbeSpec | None = None, strict: bool = False
    ) -> PreTrainedModel:
        """Turns a loaded causal LM into this class, in place, and attaches heads.

        Nothing is copied: weights, device placement, quantisation and injected LoRA layers stay as they are.

        Args:
            lm: the model; of the plain class that this one is made from. A PEFT model is unwrapped.
            probe: heads; see `read_heads`.
            strict: raise, rather than warn, where a head was trained on another backbone; see `check_backbone`.

        Returns:
            `lm` itself.

        Raises:
            ProbeError: `lm` is of another class, or a head cannot be read or does not fit; `lm` is then unchanged.
        """
        lm = without_peft(lm)
        heads = read_heads(probe, Target.of(lm)) if probe is not None else {}
        if not isinstance(lm, ProbedGenerationMixin):
            if type(lm) is not cls._causal_lm_class:
                raise ProbeError(
                    f"{cls.__name__} is made from a {cls._causal_lm_class.__name__}, not from a {type(lm).__name__}; "
                    "AutoModelForProbedGeneration.from_causal_lm takes any causal LM"
                )
            plain = type(lm)
            change_class(lm, cls)
            lm._install_probes()
            try:
                lm._attach(heads, strict)
            except BaseException:
                del lm.probes, lm._active_probes
                change_class(lm, plain)
                raise
        else:
            lm._attach(heads, strict)
        return lm

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        probe: ProbeSpec | None = None,
        probe_revision: str | None = None,
        probe_namespace: str | None = None,
        probe_strict: bool = False,
        **kwargs,
    ):
        """`PreTrainedModel.from_pretrained` with heads.

        Args:
            probe: a head folder, a Hub id (`user/repo`, with `@revision` and `:subfolder` where wanted), an alias, a
                list of these, or a dict name -> one of these; see `resolve_head`.
            probe_revision: of heads on the Hub that name none. `revision` is that of the backbone alone.
            probe_namespace: user or organisation whose heads aliases stand for; see `probe_namespace`.
            probe_strict: raise, rather than warn, where a head was trained on another backbone.
            kwargs: those of the plain class. `token`, `cache_dir`, `local_files_only` and `force_download` count for
                the heads as well.

        Raises:
            ProbeError: a head cannot be read (before the backbone is loaded) or does not fit it.
        """
        heads = read_heads_beside(probe, pretrained_model_name_or_path, kwargs, probe_revision, probe_namespace)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        model._attach(heads, probe_strict)
        return loaded

    def _probed_forward(self, *args, **kwargs):
        kwargs.update(zip(self._forward_names, args, strict=False))
        session = kwargs.pop("probe_session", None)
        probe_mask = kwargs.pop("probe_mask", None)
        if session is False or (session is None and not self._active_probes):
            return super().forward(**kwargs)
        if session is None and (running := session_of(self)) is not None:
            # A decoding method that calls the model by itself: first over the prompt, then for its own ends.
            if running.complete:
                return super().forward(**kwargs)
            session = running
        if session is not None:
            with session.reading(self._decoder, kwargs):
                return super().forward(**kwargs)
        heads = self._active_heads()
        configs = {name: head.config for name, head in heads.items()}
        probe_logits = None
        if _cached_tokens(kwargs):
            # A later step of somebody's own decoding loop: the prompt is behind it.
            output = super().forward(**kwargs)
        else:
            session = self._session(heads, kwargs, probe_mask)
            with session.reading(self._decoder, kwargs):
                output = super().forward(**kwargs)
            probe_logits = {name: result.logits for name, result in session.results().items()}
        return (
            with_probe_logits(output, probe_logits, configs)
            if isinstance(output, ModelOutput)
            else (*output, probe_logits)
        )

    def classify(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        probe_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> dict[str, ProbeOutput]:
        """Scores prompts without generating: the backbone runs once, without its LM head and without a cache.

        Args:
            input_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*).
            attention_mask (`[batch, tokens]`, *optional*): 0 for padding on either side.
            inputs_embeds (`[batch, tokens, hidden_size]`, *optional*): instead of `input_ids`.
            probe_mask (`[batch, tokens]`, *optional*): true for the tokens that count, in place of the heads' own
                `token_scope`.
            output_attentions: also returns `token_weights` and `layer_weights` of each head.
            kwargs: passed to the backbone.

        Returns:
            `ProbeOutput` by head name.

        Raises:
            ProbeError: no head is active, or a prompt cannot be scored.
        """
        heads = self._active_heads()
        if not heads:
            raise ProbeError("no head is active: load_probe(...) or set_active_probes([...]) first")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
        session = self._session(heads, inputs, probe_mask, output_attentions)
        decoder = self._decoder
        with torch.no_grad(), session.reading(decoder, inputs):
            decoder.model(**{key: value for key, value in inputs.items() if value is not None}, use_cache=False)
        return session.results()

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, *args, **kwargs) -> Any:
        """`GenerationMixin.generate`, with the prompt scored by every active head in the same pass.

        Takes what the plain `generate` takes, and

        - `probe_mask` (`[batch, tokens]`): true for the tokens that count;
        - `halt_on`: prompts that get no reply from the model: a head's name, several, a dict of names with `label` and
          `threshold`, or a function of the outputs; see `Halter`. It is decided at the end of the prefill. Where every
          prompt is halted, no token is decoded; else the others go on as they would. A head that reads replies halts
          these at the token that it flags, or at the n-th in a row with `patience` n; the token stays, and the end of the
          sequence follows. With `token_scope="all"` the score of the prompt comes first, and may halt before the reply.
        - `halt_reply`: what halted prompts get in place of a reply, or of the rest of one: token ids, a text (then pass
          `tokenizer=` as well), or a `Reprompt`. Nothing where left out.
        - `on_probe_token`: called with a `TokenScores` after each token of the replies that the LM has read. It may
          return a list with one entry a row, true or a `Halt` where the reply is to end. Where it raises, no further
          token is written.

        Heads that read replies score them token by token: see `ProbedOutputMixin`. They need greedy search or sampling,
        and decode without `torch.compile`.

        `return_dict_in_generate` is `True` unless it is given; with `False` the plain tensor is returned, and heads run
        only where they may halt.

        Returns:
            `ProbedGenerateDecoderOnlyOutput` or `ProbedGenerateBeamDecoderOnlyOutput`: the plain output with
            `probe_logits`, a dict of `[prompts, num_labels]` by head name - one row a prompt, however many beams or
            return sequences it has - with `probe_probabilities` and `probe_labels`, with `halt_on` `probe_halts`, and with
            heads that read replies `probe_token_logits` and `probe_token_probabilities`. Heads with
            `token_scope="response"` say nothing of the prompt, and are in the latter two only.

        Raises:
            ProbeError: the prompt cannot be scored as a whole, the replies cannot be followed, or `halt_on` is not
                allowed; see the message.
        """
        probe_mask, halt_on = kwargs.pop("probe_mask", None), kwargs.pop("halt_on", None)
        halt_reply, on_token = kwargs.pop("halt_reply", None), kwargs.pop("on_probe_token", None)
        inner = is_inner_call(self)
        heads = {} if inner else self._active_heads()
        halter = None
        if not inner and (halt_on is not None or on_token is not None):
            halter = Halter(halt_on, {name: head.config for name, head in heads.items()}, on_token)
        if isinstance(kwargs.get("streamer"), HoldBackStreamer) and not (halter is not None and halter.follows):
            raise ProbeError(
                "a HoldBackStreamer waits for scores of the reply, and nothing here decides by any: pass halt_on= with a head "
                "that reads replies (token_scope 'response' or 'all'), or on_probe_token=, or another streamer"
            )
        as_dict = True
        if heads:
            asked = kwargs.get("return_dict_in_generate", getattr(generation_config, "return_dict_in_generate", None))
            as_dict = asked is None or asked
            if as_dict or halter is not None:
                kwargs["return_dict_in_generate"] = True
            else:
                heads = {}
        session = self._generation_session(heads, inputs, generation_config, kwargs, probe_mask)
        reply = session.reply
        with open_session(self, kwargs.get("assistant_model"), session):
            if halter is None:
                output = super().generate(inputs, generation_config, *args, **kwargs)
            else:
                run = HaltingRun(self, halter, session, halt_reply, generation_config, kwargs)
                output = run.generate(super().generate, inputs, *args)
        if not heads:
            return output
        results = session.results()
        if not isinstance(output, ModelOutput):
            raise ProbeError(
                f"custom_generate returned a {type(output).__name__}, which cannot carry probe logits; let it return a "
                "generate output (return_dict_in_generate), or pass return_dict_in_generate=False to go without heads"
            )
        if not as_dict:
            return output.sequences
        logits = {name: result.logits for name, result in results.items()}
        configs = {name: head.config for name, head in heads.items()}
        ids = inputs if inputs is not None and inputs.dim() == 2 else kwargs.get("input_ids")
        new_tokens = output.sequences.shape[1] - (0 if ids is None else ids.shape[1])  # embeddings are not returned
        token_logits = None if reply is None else reply.logits(len(output.sequences), new_tokens)
        return with_probe_logits(output, logits, configs, None if halter is None else halter.halts, token_logits)

    def generate_batch(self, *args, **kwargs):
        """Continuous batching, without active heads: its paged passes return nothing that a head could read."""
        self._refuse_paged()
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """See `generate_batch`."""
        self._refuse_paged()
        return super().init_continuous_batching(*args, **kwargs)

    def _refuse_paged(self) -> None:
        if self._active_probes:
            raise ProbeError(
                "continuous batching (paged cache, generate_batch) mixes the tokens of many requests in one row, so heads "
                "cannot read a prompt there; use generate(), or set_active_probes([]) to go without heads"
            )

    def _session(
        self,
        heads: dict[str, ProbeModel],
        inputs: dict[str, Any],
        probe_mask,
        output_attentions: bool = False,
        past: int = 0,
    ) -> PrefillSession:
        ids = inputs.get("input_ids")
        embeds = inputs.get("inputs_embeds")
        masks = prompt_masks(heads, ids, embeds, inputs.get("attention_mask"), probe_mask)
        return PrefillSession(heads, masks, ids, past, output_attentions, (embeds if ids is None else ids).shape[:2])

    def _generation_session(self, heads, inputs, generation_config, kwargs, probe_mask) -> PrefillSession:
        if not heads:
            return PrefillSession({}, {})

        def setting(name: str):
            return generation_setting(self, generation_config, kwargs, name)

        if setting("cache_implementation") == "paged":
            self._refuse_paged()
        if setting("token_healing"):
            raise ProbeError(
                "token_healing rewrites the end of the prompt after heads have been set up; switch one of them off"
            )
        embeds = kwargs.get("inputs_embeds")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if embeds is not None:
            ids = None  # generate() ignores ids beside embeddings, but for bookkeeping
        elif inputs is not None and inputs.dim() == 3:
            ids, embeds = None, inputs
        mask = kwargs.get("attention_mask")
        if mask is None and ids is not None:
            mask = _mask_from_padding(ids, setting("pad_token_id"), setting("eos_token_id"))
        prompt = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask}
        readers = {name: head for name, head in heads.items() if head.config.token_scope != "response"}
        session = self._session(readers, prompt, probe_mask, past=_cached_tokens(kwargs))
        followers = {name: head for name, head in heads.items() if head.config.reads_reply}
        if followers:
            refuse_not_followed(followers, setting)
            kwargs.setdefault("disable_compile", True)  # hooks and a state that grows would only break its graphs
            ends, pad = token_ids(setting("eos_token_id")), token_ids(setting("pad_token_id"))
            session.reply = ReplySession(followers, session, ends, pad[0] if pad else None)
        return session


class LlamaForProbedGeneration(ProbedGenerationMixin, LlamaForCausalLM):
    """`LlamaForCausalLM` with probe heads."""


def _cached_tokens(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    return int(cache.get_seq_length()) if cache is not None else 0


def _mask_from_padding(input_ids: torch.Tensor, pad_token_id, eos_token_id) -> torch.Tensor | None:
    """The mask that generate() infers where none is given: padding is told from the pad id, unless that is an eos id."""
    eos_ids = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    if pad_token_id is None or pad_token_id in eos_ids or not bool((input_ids == pad_token_id).any()):
        return None
    return input_ids != pad_token_id


def change_class(model: nn.Module, cls: type) -> None:
    """Gives a loaded model another class. accelerate keeps the old class's forward in the instance; it is put there anew."""
    hook = model.__dict__.get("_hf_hook")
    if hook is None:
        model.__class__ = cls
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(model)
    del model.forward  # what accelerate leaves behind: the old class's method, bound to the instance
    model.__class__ = cls
    add_hook_to_module(model, hook)
