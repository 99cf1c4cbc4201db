"""Outputs of heads for a data set."""

import numpy as np
import torch
from conftest import make_lm, make_probe, make_prompts

from llama_probe import ProbeModel
from llama_probe.data.cached_states import PromptDataset
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.evaluation.report import inspect_head


LABELS = np.array([0, 1, 1, 0, 1])


def test_rows_come_back_in_their_order_in_bounded_batches(monkeypatch):
    dataset = PromptDataset([row.tolist() for length in (7, 3, 9, 5, 3) for row in make_prompts(1, length)], LABELS)
    probe, seen, original = make_probe(), [], ProbeModel.score
    probe.set_backbone(make_lm())

    def score(probe, x, mask, **kwargs):
        seen.append(tuple(mask.shape))
        return original(probe, x, mask, **kwargs)

    monkeypatch.setattr(ProbeModel, "score", score)
    together = predict_logits(probe, dataset, batch_tokens=8)
    assert seen == [(1, 9), (1, 7), (1, 5), (2, 3)], "a longer row is a batch of its own"
    seen.clear()
    inspect_head(probe, dataset, LABELS, batch_tokens=14)
    assert seen == [(1, 9), (2, 7), (2, 3)]
    monkeypatch.undo()
    for row, ids in enumerate(dataset.prompts):
        alone = probe(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


def test_rows_without_a_tool_result_are_not_flagged():
    markers = {role: {"ids": [ids], "skip": 0} for role, ids in (("user", 60), ("tool", 61), ("assistant", 62))}
    probe = make_probe(probe_type="gate", token_scope="tool", turn_markers=markers, flagged=["LABEL_1"])
    probe.set_backbone(make_lm())
    plain = (make_prompts(1, 6) % 50 + 3)[0].tolist()
    probs = predict_logits(probe, PromptDataset([[60, *plain], [60, 5, 62, 61, *plain]], LABELS[:2])).softmax(-1)
    assert probs[0, 1] == 0 < probs[1, 1]
