"""How soon heads that follow replies find a label."""

import numpy as np
import pytest
import torch
from conftest import make_lm, make_probe, make_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe.backbone import passes
from llama_probe.data.disk_states import DiskStates
from llama_probe.data.prompts import PromptDataset
from llama_probe.evaluation.calibration import with_rates
from llama_probe.evaluation.detection import apply_rules, detection, halting_rules, judged_scores, reply_report
from llama_probe.evaluation.prediction import follow_replies, predict_logits
from llama_probe.heads import probe_types
from llama_probe.serving.halting import HaltRule, Streak


PROMPT, LENGTHS = 4, [5, 9, 7]


@pytest.mark.parametrize("scope", ["response", "all"])
@pytest.mark.parametrize("head_type, cached", [*((name, True) for name in probe_types()), ("mha", False)])
def test_each_token_gets_the_score_of_the_text_that_ends_there(head_type, scope, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "BATCH_TOKENS", 24)
    lm, probe = make_lm(), make_probe(token_scope=scope, temperature=1.7, probe_type=head_type, flagged=["LABEL_1"])
    prompts = make_prompts(3, PROMPT + max(LENGTHS)).tolist()
    ids = [row[: PROMPT + n] for row, n in zip(prompts, LENGTHS, strict=True)]
    masks = [[False] * PROMPT + [True] * n for n in LENGTHS] if scope == "response" else None
    dataset = PromptDataset(ids, np.zeros(3, dtype=int), masks, LENGTHS)
    if cached:
        dataset = DiskStates(tmp_path, dtype=torch.float32).dataset(lm, probe.config, dataset)
    else:
        probe.set_backbone(lm)
    found, again = follow_replies([probe, probe], dataset)
    torch.testing.assert_close(found, again)
    largest = torch.stack([logits[logits.diff(dim=1).argmax()] for logits in found])
    torch.testing.assert_close(predict_logits(probe, dataset), largest)
    probe.set_backbone(lm)
    assert [len(logits) for logits in found] == LENGTHS
    for row, logits in enumerate(found):
        for n in range(1, LENGTHS[row] + 1):
            whole = torch.tensor([ids[row][: PROMPT + n]])
            mask = None if masks is None else torch.tensor([masks[row][: PROMPT + n]])
            with torch.no_grad():
                expected = probe(input_ids=whole, probe_mask=mask).logits[0]
            torch.testing.assert_close(logits[n - 1], expected, atol=1e-5, rtol=1e-5)


def test_the_delay_is_counted_in_tokens_read():
    scores = [
        np.array([0.1, 0.9, 0.2, 0.8, 0.7, 0.1, 0.1, 0.1]),  # with patience 2 halted at the fifth of eight tokens
        np.array([0.9, 0.1]),  # flagged, never twice in a row
        np.array([0.6, 0.6]),  # halted in vain
        np.array([0.1, 0.1]),
    ]
    labels = np.array([1, 1, 0, 0])
    delay = {"median": 5.0, "p90": 5.0, "share": 5 / 8}
    assert detection(judged_scores(scores, patience=2), labels, threshold=0.5) == {
        "rows": 4, "detected": 0.5, "false_halts": 0.5, "delay": delay, "shown": (4 / 8 + 1) / 2
    }  # fmt: skip
    by_window = detection(judged_scores(scores, window=2), labels, threshold=0.45)
    assert (by_window["detected"], by_window["delay"]["median"], by_window["false_halts"]) == (1, 1.5, 0.5)
    silent = detection(scores, labels, threshold=0.95)
    assert silent["detected"] == 0 and silent["delay"] == dict.fromkeys(delay)
    assert detection(scores, np.zeros(4), 0.5)["detected"] is None


@pytest.mark.parametrize("threshold", [0.55, None])
@pytest.mark.parametrize("patience, window", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_a_reply_is_measured_to_end_where_generate_ends_it(patience, window, threshold):
    rng = np.random.default_rng(0)
    replies, rule = rng.random((50, 12)), HaltRule("guard", CONFIG, 1, threshold, patience, window)
    read = []
    for scores in replies:
        probs, streak = torch.tensor(np.stack([1 - scores, scores], axis=1)), Streak(patience, window)
        ends = [rule.follow(streak, each, flag)[1] for each, flag in zip(probs, rule.halts(probs), strict=True)]
        read.append(ends.index(True) + 1 if True in ends else None)
    halted = [count for count in read if count is not None]
    measured = detection(judged_scores(replies, patience, window), np.ones(50), threshold or 0.5)
    assert 0 < measured["detected"] == len(halted) / 50
    assert (measured["delay"]["median"], measured["delay"]["p90"]) == (np.median(halted), np.percentile(halted, 90))


def replies(seed, harmless=20, harmful=10):
    """Logits after each token of replies, higher for harmful ones, and their labels."""
    rng, followed = np.random.default_rng(seed), []
    labels = np.array([0] * harmless + [1] * harmful)
    for label in labels:
        positive = rng.beta(1 + label, 2, size=rng.integers(1, 15))
        followed.append(torch.from_numpy(np.stack([1 - positive, positive], axis=1)).log())
    return followed, labels


CONFIG = make_probe(token_scope="response", id2label={0: "fine", 1: "awful"}, flagged=["awful"]).config


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), limit=st.sampled_from([0.0, 0.05, 0.3]))
def test_rules_keep_to_the_false_halts(seed, limit):
    followed, labels = replies(seed)
    rules = halting_rules(CONFIG, followed, labels, limit)
    assert list(rules) == ["awful"] and sum(rule["chosen"] for rule in rules["awful"]) == 1
    assert all(rule["validation"]["false_halts"] <= limit for rule in rules["awful"])
    again = apply_rules(CONFIG, rules, followed, labels)
    assert all(rule["test"] == rule["validation"] for rule in again["awful"])
    assert apply_rules(CONFIG.replace(id2label={0: "fine", 1: "bad"}), rules, followed, labels) == {}


def test_a_rate_means_whole_replies():
    followed, labels = replies(3, harmless=400, harmful=100)
    largest = torch.stack([logits[logits[:, 1].argmax()] for logits in followed])
    config = with_rates(CONFIG, largest[:400], [0.05, 0.01])
    report = reply_report(config, followed, labels, resamples=30)
    limits = {"own": 0.05, "fpr-5%": 0.05, "fpr-1%": 0.01, "1.0% halted": 0.01, "0.5% halted": 0.005}
    for name, limit in limits.items():
        rule = report["thresholds"][name]
        assert 0 < rule["false_halts"] <= limit
        intervals = {**rule, **rule["delay"]}
        for measure, (low, high) in rule["intervals"].items():
            assert low <= intervals[measure] <= high
    low, high = report["intervals"]["r_auc"]
    assert report["label"] == "awful" and 0.5 < low < report["r_auc"] < high < 1
    few = reply_report(CONFIG.replace(thresholds={"fpr-5%": 0.5}, threshold=0.5), *replies(3, 2, 8), resamples=200)
    assert few["thresholds"]["fpr-5%"]["intervals"]["detected"][0] >= 0, "also where no harmless reply is drawn"


def test_replies_whose_label_nobody_knows_do_not_count():
    followed, labels = replies(3, harmless=40, harmful=20)
    config = make_probe(token_scope="response", problem_type="multi_label_classification", num_labels=2).config
    known = np.stack([1 - labels, labels], axis=1).astype("float32")
    unknown = [torch.tensor([[0.0, 30.0]] * 5)] * 50
    rules = halting_rules(config, followed, known)
    more = np.concatenate([known, np.full((50, 2), np.nan, "float32")])
    assert halting_rules(config, followed + unknown, more) == rules
    assert apply_rules(config, rules, followed + unknown, more) == apply_rules(config, rules, followed, known)
    by_label = reply_report(config, followed + unknown, more, resamples=0)
    assert by_label == reply_report(config, followed, known, resamples=0) and list(by_label) == ["LABEL_0", "LABEL_1"]
    flagging = config.replace(flagged=["LABEL_1"], threshold=[0.1, 0.9])
    (report,) = reply_report(flagging, followed, known, resamples=0).values()
    assert report["r_auc"] == by_label["LABEL_1"]["r_auc"] and report["thresholds"]["own"]["threshold"] == 0.9


def test_each_of_several_labels_has_rules():
    labels = np.array([0, 1, 2, 2])
    followed = [20 * torch.eye(3)[[label] * 3] for label in labels]
    config = make_probe(token_scope="response", num_labels=3).config
    rules = halting_rules(config, followed, labels)
    assert list(rules) == list(config.id2label.values())
    for first, *_ in rules.values():
        measured = first["validation"]
        assert (measured["detected"], measured["false_halts"], measured["delay"]["median"]) == (1, 0, 1)
    regression = make_probe(token_scope="response", num_labels=1, problem_type="regression").config
    assert halting_rules(regression, followed, labels.astype(float)[:, None]) == {}
