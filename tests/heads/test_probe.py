"""A head: its size, its ways in, its attention weights, and what it refuses."""

from itertools import cycle, islice, takewhile
from unittest.mock import patch

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm, make_probe, make_prompts, probed, with_novelty
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.heads import probe_types, repeat_rows
from llama_probe.heads.registry import get_probe_type
from llama_probe.heads.split import split_head


HEAD_TYPES = probe_types()


@st.composite
def cases(draw):
    """Heads of any type and shape, states, a mask with padding on both sides and holes, and a way to cut the prompt."""
    heads = draw(st.sampled_from([1, 2, 3]))
    inner = heads * draw(st.integers(1, 3))
    downcast = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 5))
    batch, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    picked = draw(st.one_of(st.just("all"), st.lists(st.integers(0, layers), min_size=1, unique=True)))
    head_type = draw(st.sampled_from(HEAD_TYPES))
    options = {"num_maxima": draw(st.integers(1, 3)), "num_members": draw(st.integers(1, 3))}
    config = {
        "probe_type": head_type,
        "options": options if head_type == "multimax" else {},
        "pool": draw(st.sampled_from(["mean", "max"])),
        "causal": draw(st.booleans()),
        "normalize": draw(st.sampled_from(["none", "layernorm", "rms"])),
        "hidden_size": inner * downcast,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "downcast": downcast,
        "num_labels": draw(st.integers(1, 4)),
        "layers": picked,
    }
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for row in range(batch):
        low = draw(st.integers(0, tokens - 1))
        mask[row, low : draw(st.integers(low + 1, tokens))] = True
    cuts = sorted(draw(st.sets(st.integers(1, tokens), max_size=3)) | {tokens})
    return config, mask, cuts, draw(st.integers(0, 10_000))


def states_for(config, mask, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (*mask.shape, config["hidden_size"])
    # States grow with the layer, which a normalised head must bear. One that reads them as they are gets them all alike: the
    # rounding of an exponential of scores in the thousands is no matter of padding.
    growth = 3 if config["normalize"] in ("layernorm", "rms") else 1
    return tuple(torch.randn(shape, generator=generator) * growth**i for i in range(config["num_hidden_layers"] + 1))


def made(case, novelty=False):
    """The head of a case, with a novelty if it can have one, its states, its mask and its cuts."""
    config, mask, cuts, seed = case
    probe = make_probe(seed, **config)
    if novelty and probe.config.supports_novelty and probe.config.hidden_size > 1:
        with_novelty(probe)
    return probe, states_for(config, mask, seed), mask, cuts


def assert_alike(found, expected):
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    if expected.novelty is not None:
        torch.testing.assert_close(found.novelty, expected.novelty, atol=1e-5, rtol=1e-5)


def groups_of(layers, sizes):
    """Cut `layers` into consecutive groups; sizes are used in turn."""
    layers = iter(layers)
    return takewhile(bool, (list(islice(layers, size)) for size in cycle(sizes)))


def read(probe, state, states, columns, mask, sizes=(1,), last=True):
    """Have a head read some columns of all states, in groups of layers."""
    for layers in groups_of(range(len(states)), sizes):
        x = probe.prepare(torch.stack([states[layer][:, columns] for layer in layers]))
        probe.step(state, layers, x, None if mask is None else mask[:, columns], last)


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(cases(), SIZES, st.booleans(), st.booleans(), st.booleans())
def test_streamed_and_resumed_equal_whole(case, sizes, keep, resume, novelty):
    probe, states, mask, cuts = made(case, novelty)
    state = probe.init_state(keep=keep or resume)
    with torch.no_grad():
        whole = probe(hidden_states=states, attention_mask=mask)
        for turn, (low, high) in enumerate(zip([0, *cuts], cuts, strict=False)):
            last = high == cuts[-1]
            read(probe, state, states, slice(low, high), mask, sizes[turn:] + sizes[:turn], last)
            if resume and not last:
                state = probe.init_state(state.joined(), keep=True)
        assert_alike(probe.finish(state), whole)
    if (found := whole.novelty) is not None:
        assert found.shape == (len(mask),) and ((found >= 0) & (found <= 1)).all()


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans())
def test_a_head_of_projected_states_scores_as_the_head_does(case, novelty):
    probe, states, mask, cuts = made(case, novelty)
    split = split_head(probe)
    if probe.config.probe_type in ("pooling", "last") or probe.config.normalize == "none":
        assert split is None
        return
    maps, reader = split
    assert not maps.requires_grad, "else no plan with them can be copied"
    x = probe.normalize(torch.stack([states[layer] for layer in probe.layer_indices]))
    features = torch.einsum("sbnd,srd->sbnr", x, maps)
    state = reader.init_state()
    with torch.no_grad():
        for low, high in zip([0, *cuts], cuts, strict=False):
            part = reader.prepare(features[:, :, low:high])
            reader.step(state, reader.layer_indices, part, mask[:, low:high], last=high == cuts[-1])
        whole = probe(hidden_states=states, attention_mask=mask).logits
    torch.testing.assert_close(reader.finish(state).logits, whole, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 2), SIZES)
def test_what_follows_a_prompt_is_scored_as_the_whole_is(case, repeats, sizes):
    """Token by token from the first cut on, each score is that of all tokens so far, read at once."""
    probe, states, mask, cuts = made((case[0] | {"token_scope": "all", "causal": True}, *case[1:]))
    cut, length = cuts[0], mask.shape[1]
    mask[:, 0] = True  # of the prompt something counts
    with torch.no_grad():
        prompt = probe.init_state(keep=True)
        read(probe, prompt, states, slice(0, cut), mask, sizes)
        whole = probe(hidden_states=[state[:, :cut] for state in states], attention_mask=mask[:, :cut]).logits
        torch.testing.assert_close(probe.finish(prompt).logits, whole, atol=1e-4, rtol=1e-4)
        reply = probe.init_state(repeat_rows(prompt.joined(), repeats), keep=True)
        repeated = [state.repeat_interleave(repeats, 0) for state in states]
        for column in range(cut, length):
            read(probe, reply, repeated, slice(column, column + 1), mask.repeat_interleave(repeats, 0), (len(states),))
            seen = [state[:, : column + 1] for state in states]
            whole = probe(hidden_states=seen, attention_mask=mask[:, : column + 1]).logits
            expected = whole.repeat_interleave(repeats, 0)
            torch.testing.assert_close(probe.finish(reply).logits, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(1, 12), st.booleans())
def test_replies_are_scored_token_by_token_as_they_are_streamed(case, blocks, learning):
    config, *rest = case
    probe, states, mask, _ = made(({**config, "causal": True}, *rest))
    reply = mask & (mask.cumsum(dim=1) > mask.sum(dim=1, keepdim=True) // 2)
    with patch("llama_probe.heads.probe._BLOCKS", blocks):
        output = probe.train(learning)(hidden_states=states, attention_mask=mask, reply_mask=reply)
    scored = output.token_logits.mean(dim=0)
    scored.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in probe.parameters())
    state, streamed = probe.eval().init_state(keep=True), []
    for column in range(mask.shape[1]):
        read(probe, state, states, slice(column, column + 1), mask, last=False)
        streamed.append(probe.finish(state).logits)
    for row, counted in enumerate(output.token_mask):
        expected = torch.stack([streamed[column][row] for column in reply[row].nonzero().flatten()])
        found = scored[row, counted].detach()
        if blocks == 12:
            assert len(found) == len(expected)
        assert torch.cdist(found, expected, p=torch.inf).amin(dim=1).max() < 1e-4
        torch.testing.assert_close(found[-1], expected[-1], atol=1e-5, rtol=1e-5)
        assert torch.cdist(output.logits[row : row + 1], found, p=torch.inf).min() < 1e-4


@pytest.mark.parametrize("head_type", ["multimax", "mha"])
def test_segments_are_told_apart_by_their_numbers_alone(head_type):
    probe = make_probe(probe_type=head_type, token_scope="user")
    states = torch.randn(LAYERS + 1, 2, 9, HIDDEN).unbind()
    numbers = torch.tensor([[0, 1, 1, 0, 2, 2, 2, 3, 0], [1, 1, 1, 0, 0, 2, 2, 0, 0]])
    mask = numbers > 0
    expected = probe(hidden_states=states, probe_mask=mask, segments=numbers).logits
    torch.testing.assert_close(probe(hidden_states=states, probe_mask=mask, segments=numbers**2).logits, expected)
    whole = probe(hidden_states=states, probe_mask=mask).logits
    assert not torch.allclose(whole, expected)
    assert torch.equal(probe(hidden_states=states, probe_mask=numbers).logits, whole), "a mask of numbers is a mask"
    for row in range(2):
        part = [state[row : row + 1] for state in states]
        alone = probe(hidden_states=part, probe_mask=mask[row : row + 1], segments=numbers[row : row + 1]).logits
        torch.testing.assert_close(alone[0], expected[row], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(cases(), st.booleans())
def test_padding_and_batching_change_nothing(case, novelty):
    probe, states, mask, _ = made(case, novelty)
    with torch.no_grad():
        batched = probe(hidden_states=states, attention_mask=mask)
        # what stands on masked positions must not matter
        other = tuple(torch.where(mask.unsqueeze(-1), state, state * 7 + 3) for state in states)
        assert_alike(probe(hidden_states=other, attention_mask=mask), batched)
        alone = [probe(hidden_states=[state[i : i + 1, kept] for state in states]) for i, kept in enumerate(mask)]
        torch.testing.assert_close(torch.cat([each.logits for each in alone]), batched.logits, atol=1e-5, rtol=1e-5)
        if batched.novelty is not None:
            novelties = torch.cat([each.novelty for each in alone])
            torch.testing.assert_close(novelties, batched.novelty, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_weights_are_distributions(case):
    probe, states, mask, _ = made(case)
    layers = len(probe.layer_indices)
    with torch.no_grad():
        whole = probe(hidden_states=states, attention_mask=mask, output_attentions=True)
        state = probe.init_state(output_attentions=True)
        read(probe, state, states, slice(None), mask, (2,))
        streamed = probe.finish(state)
    assert whole.token_weights.shape == (len(mask), layers, mask.shape[1])
    assert whole.layer_weights.shape == (len(mask), layers)
    assert not whole.token_weights.transpose(1, 2)[~mask].any()
    for name in ("token_weights", "layer_weights"):
        weights, again = whole[name], streamed[name]
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(again, weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_type", [head_type for head_type in HEAD_TYPES if get_probe_type(head_type).reads_half])
def test_a_long_prompt_in_half_precision_has_finite_scores(head_type):
    """A sum over its tokens would be larger than fp16 can say."""
    stage = make_probe(probe_type=head_type).token_stage
    torch.manual_seed(0)
    x = torch.full((LAYERS + 1, 1, 5000, HIDDEN), 20.0) + torch.randn(LAYERS + 1, 1, 5000, HIDDEN)
    half, whole = (stage.result(stage.update(None, part, None, slice(None)), slice(None)) for part in (x.half(), x))
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.3)


class TestAgainstThePaper:
    """Each head type beside a slow transcription of its definition, one row and one layer at a time."""

    hidden = 8

    def setup_method(self):
        torch.manual_seed(0)
        self.states = [torch.randn(1, 5, self.hidden) for _ in range(3)]

    def score(self, probe, aggregate):
        token, layer = probe.token_stage, probe.layer_stage
        summaries = torch.stack([aggregate(token, slot, x[0]) for slot, x in enumerate(self.states)])
        return probe.classifier(aggregate(layer, 0, summaries))

    def check(self, aggregate, **config):
        probe = make_probe(hidden_size=self.hidden, num_hidden_layers=2, normalize="none", **config)
        found = probe(hidden_states=self.states).logits[0]
        torch.testing.assert_close(found, self.score(probe, aggregate), atol=1e-5, rtol=1e-5)

    def test_pooling(self):
        self.check(lambda module, slot, x: x.mean(0), probe_type="pooling")
        self.check(lambda module, slot, x: x.max(0).values, probe_type="pooling", pool="max")

    def test_gate(self):
        def gate(module, slot, x):
            scores = torch.stack([torch.tanh(module.weight[slot] @ item) for item in x])
            return sum(weight * item for weight, item in zip(scores.softmax(0), x, strict=True))

        self.check(gate, probe_type="gate")

    @pytest.mark.parametrize("pool", ["mean", "max"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_mha(self, pool, causal):
        def mha(module, slot, x):
            query, key, value = (x @ module.qkv[slot].T).chunk(3, dim=-1)
            width = query.shape[-1] // 2
            mixed = []
            for head in range(2):
                part = slice(head * width, (head + 1) * width)
                scores = query[:, part] @ key[:, part].T / width**0.5
                if causal and module.num_slots > 1:  # tokens; layers are all seen
                    scores = torch.stack([row.where(torch.arange(5) <= i, -torch.inf) for i, row in enumerate(scores)])
                attention = scores.softmax(-1)
                mixed.append(attention @ value[:, part])
            out = torch.cat(mixed, -1) @ module.out[slot].T
            return out.mean(0) if pool == "mean" else out.max(0).values

        self.check(mha, probe_type="mha", pool=pool, downcast=2, num_attention_heads=2, causal=causal)

    @pytest.mark.parametrize("layers, read", [("all", 2), ([0, 1], 1)])
    def test_last(self, layers, read):
        """The last token that counts, behind padding and a hole, of the last layer."""
        probe = make_probe(hidden_size=8, num_hidden_layers=2, normalize="none", probe_type="last", layers=layers)
        assert probe.layer_indices == [read] and probe.config.layers == layers
        out = probe(hidden_states=self.states, attention_mask=torch.tensor([[0, 1, 0, 1, 0]]), output_attentions=True)
        assert torch.equal(out.logits, probe.classifier(self.states[read][:, 3]))
        assert out.layer_weights.tolist() == [[1.0]] and out.token_weights.tolist() == [[[0, 0, 0, 1, 0]]]


@pytest.mark.parametrize("head_type", ["gate", "mha"])
def test_an_untrained_head_attends_to_all_tokens_alike(head_type):
    probe = ProbeModel(
        ProbeConfig(probe_type=head_type, hidden_size=HIDDEN, num_hidden_layers=LAYERS, downcast=4)
    ).eval()
    out = probe(hidden_states=[torch.randn(2, 6, HIDDEN) for _ in range(LAYERS + 1)], output_attentions=True)
    torch.testing.assert_close(out.token_weights, torch.full((2, LAYERS + 1, 6), 1 / 6))
    torch.testing.assert_close(out.layer_weights, torch.full((2, LAYERS + 1), 1 / (LAYERS + 1)))
    out.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in probe.parameters())


STATES = tuple(torch.randn(2, 5, HIDDEN) for _ in range(LAYERS + 1))


def test_states_in_any_form_and_dtype():
    probe = make_probe()
    before = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    expected = probe(hidden_states=STATES).logits
    torch.testing.assert_close(probe(hidden_states=torch.stack(STATES, dim=1)).logits, expected)
    half = probe(hidden_states=[state.bfloat16() for state in STATES]).logits
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0.05)
    for name, tensor in probe.half().to(torch.bfloat16).double().state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert probe.to("meta").device.type == "meta"


def test_the_backbone_stays_outside_the_module_tree_and_as_trainable_as_it_was():
    lm = probed({"own": make_probe()})
    lm.model.embed_tokens.requires_grad_(False)
    trainable = {name: parameter.requires_grad for name, parameter in lm.named_parameters()}
    probe = ProbeModel(ProbeConfig(downcast=4), backbone=lm.train()).train()
    assert probe.config.hidden_size == HIDDEN and probe.config.num_hidden_layers == LAYERS
    assert not any("backbone" in name for name in probe.state_dict()) and not lm.training
    assert all(parameter.requires_grad for parameter in probe.parameters())
    assert {name: parameter.requires_grad for name, parameter in lm.named_parameters()} == trainable
    lm.probes["own"].set_backbone(lm)
    lm.probes["own"](make_prompts(), labels=torch.tensor([0, 1, 0])).loss.backward()
    learned = {name for name, parameter in lm.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in lm.named_parameters() if name.startswith("probes.own.")}


def test_dropouts_act_in_training_only():
    probe = make_probe(dropout=0.5, layer_dropout=0.5)
    assert torch.equal(probe(hidden_states=STATES).logits, probe(hidden_states=STATES).logits)
    probe.train()
    assert not torch.equal(probe(hidden_states=STATES).logits, probe(hidden_states=STATES).logits)


class TestRefusals:
    @pytest.mark.parametrize(
        "inputs, words",
        [
            ({}, "either input_ids"),
            ({"input_ids": make_prompts()}, "backbone"),
            ({"hidden_states": STATES[:-1]}, "4 tensors.* 5 tensors"),
            ({"hidden_states": torch.randn(2, 4, 5, HIDDEN)}, r"\[batch, 5 .*tokens, 32\]"),
            ({"hidden_states": [state[..., :-1] for state in STATES]}, "32"),
            ({"hidden_states": STATES, "attention_mask": torch.ones(2, 4)}, "mask has the shape"),
            ({"hidden_states": STATES, "attention_mask": torch.tensor([[1] * 5, [0] * 5])}, r"rows \[1\]"),
        ],
    )
    def test_wrong_inputs(self, inputs, words):
        with pytest.raises(ProbeError, match=words):
            make_probe()(**inputs)

    def test_a_wrong_mask_is_refused_before_the_backbone_runs(self):
        lm, probe = make_lm(), make_probe()
        probe.set_backbone(lm)
        lm.forward = lm.model.forward = None
        with pytest.raises(ProbeError, match="mask has the shape"):
            probe(make_prompts(), probe_mask=torch.ones(2, 4))

    def test_steps(self):
        probe = make_probe()
        state = probe.init_state(output_attentions=True)
        with pytest.raises(ProbeError, match="output_attentions"):
            probe.step(state, [0], probe.prepare(STATES[0][None, :, :3]), last=False)
        state = probe.init_state()
        probe.step(state, [0, 1], probe.prepare(torch.stack(STATES[:2])))
        with pytest.raises(ProbeError):
            probe.finish(state)
