"""An engine of each family that heads read on vLLM: the scores and texts are those of transformers."""

import conftest
import pytest
import torch
from tiny_engine import PREFIX, SIZES, generate, make_serving, running
from tiny_families import TINY
from transformers import AutoConfig, AutoModelForCausalLM

from llama_probe.vllm.compatibility import ARCHITECTURES


FAMILIES = {made: family for family, (_, made, _) in TINY.items() if made in ARCHITECTURES}
BLOCK = 32


def make_backbone(family: str):
    experts = TINY[family][2] if family.endswith("_moe") else {}
    window = {"sliding_window": 16}  # shorter than the prompts, where a family has one
    sizes = {**conftest.SIZES, **experts, **SIZES, "head_dim": 32, **window}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"LlamaForCausalLM"}))
def test_scores_and_texts_are_those_of_transformers(architecture, tmp_path):
    serving = make_serving(tmp_path, make_backbone(FAMILIES[architecture]))
    assert serving.model.config.architectures == [architecture]
    prompts = [PREFIX + torch.randint(4, 260, (length,)).tolist() for length in (5, 40, 77)]
    with running(serving, threshold=1.0, block_size=BLOCK) as llm:
        for again in (False, True):
            outputs = generate(llm, prompts, 8)
            serving.check_replies(outputs, prompts, 1.0, 8)
            assert bool(outputs[-1].num_cached_tokens) == again
