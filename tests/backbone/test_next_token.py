"""Next-token logits from the final state alone, for families that do more than multiply by their output embeddings."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCAB, make_lm, make_prompts
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from llama_probe import AutoModelForProbedGeneration, ProbeError
from llama_probe.backbone.decoder import find_decoder
from llama_probe.backbone.next_token import NextToken


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: make_lm(),
    "tied": lambda: make_lm(tie_word_embeddings=True),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_logits_of_the_lm(family, dtype):
    torch.manual_seed(0)
    lm, prompts = FAMILIES[family]().to(dtype).eval(), make_prompts()
    with torch.no_grad():
        out = lm(prompts, output_hidden_states=True)
        found = NextToken.of(lm)(out.hidden_states[-1][:, -1].float())
    assert found.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, out.logits[:, -1].float(), atol=tolerance, rtol=tolerance)


def test_what_is_not_known_is_refused():
    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    with pytest.raises(ProbeError, match="Shifted are not what its output embeddings make of its final state"):
        NextToken.of(Shifted(make_lm().config))
    with pytest.raises(ProbeError, match="LlamaModel has no output embeddings"):
        NextToken.of(make_lm().model)


def test_heads_that_are_attached_do_not_run(monkeypatch):
    from conftest import make_probe

    model = AutoModelForProbedGeneration.from_causal_lm(make_lm(), {"a": make_probe()})
    monkeypatch.setattr(type(model.probes["a"]), "step", lambda *args: pytest.fail("a head runs"))
    NextToken.of(model)
    assert not find_decoder(model).norm._forward_hooks, "no hook is left behind"
