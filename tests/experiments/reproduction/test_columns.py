"""The paper's order of the methods, compared with the numbers of a report."""

from llama_probe.experiments.reproduction.columns import find_orders


class TestOrders:
    def result(self, f1, std=0.01, runs=2):
        return {"runs": [{}] * runs, "summary": {"test": {"accuracy": {"mean": f1, "std": std}, "f1": None}}}

    def test_are_read_off_the_numbers(self):
        def order(*means, **kwargs):
            names = zip(("pooling", "gate", "mha"), means, strict=True)
            (found,) = find_orders({"emotion": {name: self.result(mean, **kwargs) for name, mean in names}})
            return found["holds"], found["clear"]

        assert order(0.6, 0.7, 0.8) == (True, True)
        assert order(0.6, 0.61, 0.8) == (True, False)
        assert order(0.6, 0.59, 0.8) == (False, False) and order(0.6, 0.8, 0.7) == (False, False)
        assert order(0.6, 0.7, 0.8, runs=1) == (True, None)

    def test_need_all_their_methods(self):
        assert find_orders({"emotion": {"pooling": self.result(0.6), "gate": self.result(0.7), "mha": None}}) == []
        found = find_orders({"emotion": {"muli": self.result(0.6), "gate": self.result(0.5)}})
        assert [(item["order"], item["holds"]) for item in found] == [(["muli", "gate"], False)]
