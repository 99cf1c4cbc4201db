"""Next-token logits from the last hidden state alone, for families that do more than multiply by their output embeddings."""

import pytest
import torch
import transformers
from conftest import SIZES, make_lm, make_probe, make_prompts
from transformers import LlamaForCausalLM

from llama_probe import AutoModelForProbedGeneration, ProbeError
from llama_probe.backbone.decoder import find_decoder
from llama_probe.backbone.next_token import NextToken


FAMILIES = {
    "llama": {},
    "tied llama": {"tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_gives_the_logits_of_the_lm(family, dtype):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.split()[-1], **SIZES, **FAMILIES[family])
    lm, prompts = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval(), make_prompts()
    out, next_token = lm(prompts, output_hidden_states=True), NextToken(lm)
    next_token.check()
    found = next_token(out.hidden_states[-1][:, -1].float())
    assert found.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, out.logits[:, -1].float(), atol=tolerance, rtol=tolerance)


def test_other_logits_are_refused():
    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    lm = Shifted(make_lm().config)
    with pytest.raises(ProbeError, match="Shifted"):
        NextToken(lm).check()
    with pytest.raises(ProbeError, match="LlamaModel has no output embeddings"):
        NextToken(make_lm().model)


def test_the_check_runs_no_heads(monkeypatch):
    model = AutoModelForProbedGeneration.from_causal_lm(make_lm(), {"a": make_probe()})
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("heads run"))
    NextToken(model).check()
    assert not find_decoder(model).norm._forward_hooks, "no hook is left behind"
