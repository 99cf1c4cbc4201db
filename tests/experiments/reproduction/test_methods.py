"""Methods that are compared, and the heads that are trained for each."""

from conftest import HIDDEN

from llama_probe import ProbeConfig
from llama_probe.experiments.reproduction.comparison import candidates_of
from llama_probe.experiments.reproduction.methods import HEADS, downcast_methods


class TestMethods:
    def test_candidates(self):
        base = ProbeConfig(probe_type="pooling", hidden_size=HIDDEN, num_hidden_layers=3)
        linear = candidates_of(HEADS["layer-linear"], "layer-linear", base, 5)
        assert [candidate.config.layers for candidate in linear] == [[0], [1], [2], [3]]
        gates = [candidates_of(HEADS["gate"], "gate", base, seed)[0] for seed in (0, 1)]
        assert len({candidate.number for candidate in [*linear, *gates]}) == 6
        assert [candidate.seed for candidate in gates] == [0, 1] and gates[0].config.layers == "all"
        (half,) = candidates_of(HEADS["multimax-half"], "multimax-half", base, 0)
        assert half.config.layers == [0, 2] and half.learning_rate == 5e-3

    def test_downcasts_can_be_built(self):
        for hidden_size, values in ((576, ["4", "8", "16", "32", "64"]), (48, ["4", "8", "16"])):
            found = downcast_methods(hidden_size)
            assert list(found) == values
            for method in found.values():
                ProbeConfig(hidden_size=hidden_size, num_hidden_layers=2, **method.head)
