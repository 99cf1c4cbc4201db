"""States of heads that do not fit the prompt, its mask, the cache or the heads are refused before anything is run."""

import copy
import gc

import pytest
import torch
from conftest import VOCAB, make_probe, make_prompts
from observers import passes_of
from test_cache import assert_same, probed

from llama_probe import ProbeError


@pytest.fixture
def model():
    return probed("gate", "mha")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class TestRefusals:
    """Nothing is run, and nothing is scored in part or by what does not belong to it."""

    @pytest.fixture
    def first(self, model, prompts):
        return model.generate(prompts, max_new_tokens=4, probe_state=True, eos_token_id=None)

    @pytest.fixture
    def ids(self, first):
        return torch.cat([first.sequences, make_prompts(3, 4, seed=1)], 1)

    def check(self, model, first, ids, words, **kwargs):
        widths = passes_of(model)
        call = {"cache": first.cache, "probe_state": first.probe_state, "max_new_tokens": 2, **kwargs}
        with pytest.raises(ProbeError, match=words):
            model.generate(ids, **call)
        assert not widths

    def test_other_tokens(self, model, first, ids):
        ids[1, 4] = (ids[1, 4] + 1) % VOCAB
        self.check(model, first, ids, "does not begin with the 12 tokens .* number 4")
        ids = torch.cat([first.sequences[:, :9], ids[:, -4:]], 1)
        self.check(model, first, ids, "does not begin with the 12 tokens .* number 9")

    def test_nothing_new(self, model, first):
        self.check(model, first, first.sequences[:, :-1], "prompt has 12 tokens, and probe_state has seen 12")
        self.check(model, first, make_prompts(3, 4), "with at least one new token")

    def test_a_cache_that_was_cropped_or_grew(self, model, first, ids):
        cache = copy.deepcopy(first.cache)
        cache.crop(-2)
        self.check(model, first, ids, "is of 12 tokens, and the cache beside it holds 10", cache=cache)
        self.check(model, first, ids, "is of 12 tokens, and the cache beside it holds 0", cache=None)
        model(ids[:, 12:14], cache=first.cache)
        self.check(model, first, ids, "is of 12 tokens, and the cache beside it holds 14")

    def test_a_cache_without_its_state(self, model, first, ids):
        self.check(model, first, ids, "has not read them: pass probe_state=", probe_state=None)
        self.check(model, first, ids, "has not read them: pass probe_state=", probe_state=True)
        with pytest.raises(ProbeError, match="holds 12 tokens"):
            model(ids[:, 12:], cache=first.cache, probe_state=True)

    def test_other_rows(self, model, first, ids):
        self.check(model, first, ids[:2], "probe_state has 3 rows, and 2 prompts")
        with pytest.raises(ProbeError, match="probe_state has 3 rows, and 2 prompts"):
            model(ids[:2, 12:], cache=first.cache, probe_state=first.probe_state)

    def test_another_mask(self, model, first, ids):
        mask = torch.ones_like(ids)
        mask[0, 2] = 0
        self.check(model, first, ids, "attention_mask: of the 12 tokens .* first is number 2", attention_mask=mask)
        self.check(model, first, ids, "the tokens that 'gate' reads: .* first is number 2", probe_mask=mask)

    def test_another_head_of_the_same_name(self, model, first, ids):
        model.delete_probe("gate")
        model.add_probe("gate", make_probe(seed=5, probe_type="gate"))
        self.check(model, first, ids, "made by another head called 'gate'")
        gc.collect()
        self.check(model, first, ids, "made by another head called 'gate'")

    def test_other_weights_of_the_same_head(self, model, first, ids):
        head, call = model.probes["mha"], {"cache": first.cache, "probe_state": copy.deepcopy(first.probe_state)}
        head.to(torch.float64).to(torch.float32).requires_grad_(False)  # which changes nothing
        second = model.generate(ids, max_new_tokens=2, eos_token_id=None, **call)
        optimizer = torch.optim.SGD(head.requires_grad_().parameters(), lr=1.0)
        head.classifier.bias.grad = torch.ones_like(head.classifier.bias)
        optimizer.step()
        ids = torch.cat([second.sequences, ids[:, -2:]], 1)
        self.check(model, second, ids, "made by another head called 'mha', or by other weights of it")
        head.load_state_dict(make_probe(seed=5).state_dict())
        with pytest.raises(ProbeError, match="or by other weights of it"):
            model(ids[:, -2:], cache=second.cache, probe_state=second.probe_state)

    @pytest.mark.parametrize(
        "kwargs, words",
        [
            ({"num_beams": 2}, "num_beams cannot be used with probe_state"),
            ({"use_cache": False}, "use_cache=False keeps none"),
            ({"return_dict_in_generate": False}, "leave return_dict_in_generate=False out"),
            ({"probe_state": "yes"}, "probe_state is a str"),
        ],
    )
    def test_settings(self, model, prompts, kwargs, words):
        widths = passes_of(model)
        with pytest.raises(ProbeError, match=words):
            model.generate(prompts, max_new_tokens=2, **{"probe_state": True, **kwargs})
        assert not widths

    def test_no_active_head(self, model, first, ids):
        model.set_active_probes([])
        self.check(model, first, ids, "none is active")
        self.check(model, first, ids, "none is active", probe_state=True, cache=None)
        with pytest.raises(ProbeError, match="none is active"):
            model(ids, probe_state=True)
        assert isinstance(model.generate(ids, max_new_tokens=2, probe_state=False), torch.Tensor)

    def test_embeddings(self, model, prompts):
        embeds = model.get_input_embeddings()(prompts)
        with pytest.raises(ProbeError, match="probe_state needs input_ids"):
            model.generate(inputs_embeds=embeds, probe_state=True)

    def test_classify(self, model, first, ids):
        with pytest.raises(ProbeError, match="classify returns no probe_state"):
            model.classify(ids, probe_state=True)
        with pytest.raises(ProbeError, match="output_attentions"):
            model.classify(ids, cache=first.cache, probe_state=first.probe_state, output_attentions=True)
        with pytest.raises(ProbeError, match="holds 0"):
            model.classify(ids, probe_state=first.probe_state)

    def test_classify_where_positions_are_not_known(self, model):
        ids, mask = make_prompts(1, 6), torch.ones(1, 6, dtype=torch.long)
        ids[0, :2], mask[0, :2] = 0, 0
        first = model.generate(ids, attention_mask=mask, max_new_tokens=3, probe_state=True, eos_token_id=None)
        ids = torch.cat([first.sequences, make_prompts(1, 2, seed=1)], 1)
        mask = torch.cat([mask, torch.ones(1, 5, dtype=torch.long)], 1)
        call = {"attention_mask": mask, "cache": first.cache, "probe_state": first.probe_state}
        with pytest.raises(ProbeError, match="pass position_ids"):
            model.classify(ids, **call)
        found = model.classify(ids, position_ids=torch.tensor([[6, 7, 8]]), **call)
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=1).probe_logits
        assert_same({name: output.logits for name, output in found.items()}, expected)
