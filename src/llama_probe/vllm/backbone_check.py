"""The check that heads were trained on the backbone that an engine is about to load."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging

from ..backbone.fingerprint import fingerprint
from ..backbone.loading import load_causal_lm
from ..errors import ProbeError, first_line
from ..heads.configuration import ProbeConfig
from ..heads.match import check_backbone


logger = logging.get_logger(__name__)

# The embeddings lie in memory. The layers are read from their files one after another, and the LM head is not read.
_PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "model.layers": "disk",
    "lm_head": "disk",
}


def check_heads(
    configs: Mapping[str, ProbeConfig],
    model: str,
    revision: str | None,
    strict: bool,
    cache_dir: str | None,
    aliases: Mapping[str, str | None],
) -> None:
    """Warn of heads that were trained on another backbone, or raise `ProbeError` with `strict`; see `check_backbone`.

    For the fingerprints the backbone runs over 32 tokens, on the CPU, with one layer in memory at a time. Quantised, damaged
    or missing weights are not compared, and a warning or the error says so.

    Args:
        cache_dir: vLLM's `download_dir`, so that the weights are fetched once.
        aliases: by head its alias, if it is a bundled one. Such a head always raises on an unrelated model.
    """
    with tempfile.TemporaryDirectory() as scratch, _one_thread():
        try:
            config = AutoConfig.from_pretrained(model, revision=revision)
            if getattr(config, "quantization_config", None) is not None:
                raise ValueError("they are quantised")
            lm = load_causal_lm(
                model,
                config=config,
                revision=revision,
                dtype="auto",
                device_map=_PLACES,
                offload_folder=scratch,  # stays empty, because layers are read from their safetensors
                cache_dir=cache_dir,
                use_safetensors=True,
            )
        except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            reason = first_line(error)
            problem = f"the weights of {model} cannot be compared with those that the heads were trained on: {reason}."
            if strict:  # a guard for another backbone would let everything through
                anyway = "--skip-fingerprints or --no-probe-strict (compare_fingerprints=False or probe_strict=False)"
                raise ProbeError(f"{problem} To serve all the same: {anyway}") from None
            logger.warning(f"{problem} llama-probe inspect HEAD --backbone MODEL does it")
            return
        take = functools.cache(functools.partial(fingerprint, lm))
        for name, config in configs.items():
            check_backbone(name, config, lm, strict, take, aliases[name])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread. vLLM may fork its processes from this one, and OpenMP's threads would be dead in them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
