"""Digests of an LM's weights; tests/cli/test_demo.py loads the demo backbone."""

import torch
from conftest import make_lm

from llama_probe.backbone.loading import weights_digest


class Packed(torch.Tensor):
    """A weight of integers and their scales, as torchao's, with hardly any operation of its own."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(func)


def test_quantized_weights_are_told_apart():
    def digest(number, scale):
        lm = make_lm()
        packed = Packed(torch.full((4, 4), number, dtype=torch.int8), torch.full((4,), scale))
        lm.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
        return weights_digest(lm)

    assert digest(3, 0.5) == digest(3, 0.5)
    assert len({digest(3, 0.5), digest(4, 0.5), digest(3, 0.25)}) == 3


def test_the_lm_head_is_a_part_unless_it_is_tied():
    def digest(factor):
        lm = make_lm()
        lm.lm_head.weight.data.mul_(factor)
        return weights_digest(lm)

    assert digest(1) == digest(1) != digest(2)
    tied = make_lm(tie_word_embeddings=True)
    before = weights_digest(tied)
    tied.lm_head = None
    assert weights_digest(tied) == before
