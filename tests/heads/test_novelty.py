"""How unlike its training data a prompt is: calibrated, and saved with the head. `test_probe.py` has the ways of reading."""

import pytest
import torch
from conftest import HIDDEN, make_probe, read_head, save_head, with_novelty

from llama_probe import ProbeConfig, ProbeError
from llama_probe.heads.novelty import Novelty, abstain_levels, novelty_layers


def sums(rows, tokens, shift=0.0, seed=0):
    """Total and count of rows whose tokens are independent."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.full((3, rows), float(tokens))
    noise = torch.randn(3, rows, HIDDEN, generator=generator)
    return (shift + noise / tokens**0.5) * tokens, count


def joined(*parts):
    return tuple(torch.cat(each, dim=1) for each in zip(*parts, strict=True))


def test_it_is_calibrated_and_the_number_of_tokens_is_taken_out():
    lengths = (4, 8, 16, 32, 64)
    config = ProbeConfig(probe_type="gate", hidden_size=HIDDEN, num_hidden_layers=10)
    config = config.replace(novelty={"layers": novelty_layers(config), "rank": 8})
    train, validation, test = (joined(*(sums(400, n, seed=100 * part + n) for n in lengths)) for part in range(3))
    novelty = Novelty.fit(config, train, validation)
    assert float((novelty(*validation) > 0.99).float().mean()) == pytest.approx(0.01, abs=0.002)
    assert float((novelty(*test) > 0.99).float().mean()) == pytest.approx(0.01, abs=0.01)
    assert float(novelty(*test).mean()) == pytest.approx(0.5, abs=0.05)
    means = [float(part.mean()) for part in novelty(*test).split(400)]
    assert max(means) - min(means) < 0.15, "long rows are no less novel than short ones"
    for n in lengths:
        assert float(novelty(*sums(100, n, shift=2.0)).min()) > 0.99
    far = [float(novelty.excess(*sums(100, 16, shift=shift)).mean()) for shift in (0, 0.5, 1, 2, 4)]
    assert far == sorted(far)


def test_layers_are_those_of_the_head():
    def layers(read, count=30):
        return novelty_layers(ProbeConfig(probe_type="gate", layers=read, hidden_size=8, num_hidden_layers=count))

    assert layers("all") == [6, 12, 18] and layers([0, 15, 30]) == [0, 15] and layers([30]) == [30]
    assert layers([6, 9, 12, 15, 18, 21, 24, 27]) == [6, 12, 18]


def test_it_is_saved_with_the_head_and_keeps_its_results(tmp_path):
    probe = make_probe(probe_type="gate")
    old = read_head(save_head(probe, tmp_path / "old"))
    states = torch.randn(2, len(old.layer_indices), 5, HIDDEN)
    assert old.novelty is old.config.novelty is old(hidden_states=states).novelty is None
    old.results = {"evaluations": {}}
    new = read_head(save_head(with_novelty(old), tmp_path / "new"))
    assert new.results == {"evaluations": {}} and new.config.novelty == old.config.novelty
    with torch.no_grad():
        torch.testing.assert_close(new(hidden_states=states).novelty, old(hidden_states=states).novelty)
        torch.testing.assert_close(new(hidden_states=states).logits, probe(hidden_states=states).logits)
    assert new.num_parameters() == probe.num_parameters()
    total, count = torch.zeros(2, 2, HIDDEN), torch.tensor([[0.0, 2.0]]).expand(2, -1)
    assert new.novelty(total, count).isnan().tolist() == [True, False], "a row without tokens has none"


SETTINGS = [([2], 3, {"layers": [0, 1]}), ([9], 3, {}), ([2, 1], 3, {}), ([], 3, {}), ([1], 0, {})]
CANNOT = [([1], 3, {"token_scope": "response"}), ([4], 3, {"probe_type": "last"})]


@pytest.mark.parametrize("layers, rank, changes", SETTINGS + CANNOT)
def test_settings_that_are_refused(layers, rank, changes):
    config = make_probe(**{"probe_type": "gate", **changes}).config
    with pytest.raises(ProbeError, match="novelty"):
        config.replace(novelty={"layers": layers, "rank": rank})
    if not config.supports_novelty:
        with pytest.raises(ProbeError, match=next(iter(changes))):
            novelty_layers(config)


def test_abstaining_needs_novelty():
    configs = {"a": make_probe().config}
    assert abstain_levels(None, configs) == {}
    with pytest.raises(ProbeError, match=r"'a' has no novelty; .*calibrate .*--novelty-data"):
        abstain_levels(0.99, configs)
    for value in (True, "0.9", 1.5, -0.1):
        with pytest.raises(ProbeError, match="abstain_at="):
            abstain_levels(value, configs)
    with pytest.raises(ProbeError, match="'b'"):
        abstain_levels({"b": 0.5}, configs)
