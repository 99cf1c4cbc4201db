"""Tokens with the padding id: of a reply, and behind one."""

import pytest
import torch
from conftest import make_probe
from test_reply import flag, probed
from transformers import LogitsProcessor

from llama_probe import Halt


class Say(LogitsProcessor):
    """Makes the model write these tokens behind the prompts, which have nine."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e9)
        scores[:, self.tokens[input_ids.shape[1] - 9]] = 0
        return scores


class TestPadTokens:
    """One that the model writes is a token as any other; behind the end of a reply it is none."""

    @pytest.fixture
    def model(self):
        return probed({"both": make_probe(probe_type="gate", token_scope="all")})

    @pytest.mark.parametrize("stops", [None, [lambda ids, scores, **_: ids[:, -1] == 96]])
    def test_written_by_the_model(self, model, prompts, stops):
        call = {"max_new_tokens": 6, "logits_processor": [Say([10, 0, 0, 0, 11, 12])], "stopping_criteria": stops}
        out = model.generate(prompts[:1], probe_state=True, **call)
        assert out.sequences[0, 9:].tolist() == [10, 0, 0, 0, 11, 12]
        whole = [model.classify(out.sequences[:, :stop])["both"].logits for stop in range(10, 15)]
        torch.testing.assert_close(out.probe_token_logits["both"], torch.stack(whole, 1), atol=1e-5, rtol=1e-5)
        assert out.probe_state.attention_mask.all()
        out = model.generate(prompts[:1], on_probe_token=flag(2), **call)
        assert out.probe_halts == [Halt(token=2)] and out.sequences[0, 9:12].tolist() == [10, 0, 0]

    def test_behind_a_reply_that_ends_without_a_token_of_its_own(self, model, prompts):
        def stop(ids, scores, **_):
            return torch.tensor([ids.shape[1] >= 11, False])

        call = {"max_new_tokens": 6, "logits_processor": [Say([10, 0, 13, 14, 11, 12])], "stopping_criteria": [stop]}
        out = model.generate(prompts[:2], probe_state=True, **call)
        assert out.sequences[:, 9:].tolist() == [[10, 0, 0, 0, 0, 0], [10, 0, 13, 14, 11, 12]]
        unread = [
            [False] + [True] * 4,
            [False, True] + [False] * 3,
        ]  # of the other reply as well: nothing tells it apart
        assert out.probe_token_logits["both"][..., 0].isnan().tolist() == unread
        assert (~out.probe_state.attention_mask[:, 9:]).tolist() == unread

    def test_behind_a_reply_that_was_halted(self, model, prompts):
        """Also where there is no token that ends one."""
        call = {"max_new_tokens": 5, "eos_token_id": None, "logits_processor": [Say([10, 0, 13, 14, 11])]}
        out = model.generate(prompts[:2], probe_state=True, on_probe_token=flag(1), **call)
        assert out.sequences[:, 9:].tolist() == [[10, 0, 0, 0, 0], [10, 0, 13, 14, 11]]
        unread = [[False, False, True, True], [False] * 4]
        assert out.probe_token_logits["both"][..., 0].isnan().tolist() == unread
        assert (~out.probe_state.attention_mask[:, 9:]).tolist() == unread
