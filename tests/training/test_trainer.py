"""Training with the stock Trainer: only the head is trained, saved and resumed."""

import copy
import gc
import inspect
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import make_lm, make_tokenizer, read_head
from datasets import Dataset
from hub_server.heads import same_weights
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training_runs import head_of, token_rows, trainer_of
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from llama_probe import AutoModelForProbedGeneration, ProbeError, ProbeModel
from llama_probe.data.batches import collate
from llama_probe.data.disk_states import StateDataset
from llama_probe.data.prompts import PromptDataset, PromptFormat
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.heads.decision import probe_loss
from llama_probe.hub.folder import CARD_NAME, CONFIG_NAME, HEAD_FILES, WEIGHTS_NAME
from llama_probe.training.row_encoder import STATES
from llama_probe.training.trainer import ProbeTrainer, RecipeTrainer


TRAIN, VALIDATION = token_rows(48), token_rows(16, 1)
MORE_ANSWERS = [(f"{word} number {i}", word) for i in range(60) for word in ("bad", "good")]
ANSWERS = MORE_ANSWERS[:32]
TEXTS = [text for text, _ in ANSWERS]
TOOL_RESULTS = [[{"role": "tool", "content": text}] for text in TEXTS[:16]]
IDS, GUARD = PromptDataset([[1], [2]], np.arange(2)), {"token_scope": "response", "flagged": ["LABEL_1"]}


def head(backbone=None, **changes):
    return head_of(backbone, **{"probe_type": "mha", "dropout": 0.1, **changes})


def trainer_for(probe, folder, **changes):
    changes |= {"label_smoothing_factor": 0.0, "metric_for_best_model": "auprc", "patience": None}
    return trainer_of(folder, PromptDataset(*TRAIN), PromptDataset(*VALIDATION), model=probe, **changes)


def mood(folder, rows=ANSWERS, held_back=ANSWERS[:12], **changes):
    """A trainer of a head for good and bad, on a backbone that is given by `changes`."""
    if "model" in changes:
        changes.setdefault("processing_class", make_tokenizer())
    return trainer_of(folder, rows, held_back, **{"learning_rate": 3e-2, **changes})


def test_the_stock_trainer_alone_will_do(tmp_path, caplog):
    """No helper of this package: rows of a data set, the tokenizer, and the head's own loss."""
    prompts, labels = TRAIN
    rows = Dataset.from_dict({"input_ids": prompts, "label": labels, "note": ["x"] * len(labels)})
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), num_train_epochs=6, learning_rate=2e-2, **quiet)
    trainer = Trainer(head(make_lm()), args, None, rows, rows, processing_class=make_tokenizer())
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * start
    trainer.model.save_pretrained(tmp_path / "head")
    saved = read_head(tmp_path / "head")
    assert saved.num_parameters() == trainer.model.num_parameters()
    assert saved.config.prompt_format == "unknown" and "not known" in (tmp_path / "head" / "README.md").read_text()
    assert "special tokens" not in caplog.text.lower() and "PAD/BOS/EOS" not in caplog.text


class TestRows:
    def test_from_rows_to_a_head_that_serves(self, tmp_path, backbone_folder):
        folder, config = tmp_path / "head", {"probe_type": "gate", "flagged": ["bad"]}
        trainer = mood(tmp_path / "out", backbone=str(backbone_folder), probe_config=config)
        trainer.train()
        assert trainer.evaluate(ANSWERS)["eval_accuracy"] > 0.9, "with the threshold that was fitted"
        columns = dict(zip(("text", "label"), zip(*ANSWERS, strict=True), strict=True))
        assert trainer.evaluate({"a": ANSWERS, "b": columns})["eval_b_loss"] == trainer.evaluate(columns)["eval_loss"]
        trainer.save_model(str(folder))
        saved = read_head(folder)
        assert saved.config.id2label == {0: "bad", 1: "good"} and saved.config.prompt_format == "chat"
        assert saved.config.temperature != 1 and saved.config.threshold is not None and saved.config.prefix_ids
        assert saved.config.base_model_name_or_path == str(backbone_folder) and saved.config.fingerprint
        assert saved.novelty is None, "too few rows for it"
        counts = {"train": 32, "validation": 12}
        assert saved.results["data"] == {name: {"source": "own rows", "rows": n} for name, n in counts.items()}
        card = (folder / "README.md").read_text()
        assert "train 32 rows" in card and f"{saved.results['runs'][0]['validation']['f1']:.3f}" in card
        model = AutoModelForProbedGeneration.from_pretrained(backbone_folder, probe={"mood": folder})
        prompts = PromptFormat.from_config(saved.config, make_tokenizer())
        output = model.classify(**prompts.batch(TEXTS[:8]))["mood"]
        # The states were cached in half precision.
        torch.testing.assert_close(output.logits, trainer.logits[:8], atol=2e-2, rtol=1e-2)

    def test_novelty_is_fitted_if_there_are_rows_enough(self, tmp_path, backbone_folder):
        changes = {"backbone": str(backbone_folder), "probe_config": {"probe_type": "pooling"}, "num_train_epochs": 1}
        trainer = mood(tmp_path / "out", MORE_ANSWERS[50:], MORE_ANSWERS[:50], **changes)
        trainer.train()
        assert trainer.results["novelty"]["rows"] == {"train": 70, "validation": 50}
        trainer.save_model(str(tmp_path / "head"))
        assert read_head(tmp_path / "head").config.novelty == trainer.heads["head"].config.novelty is not None
        assert trainer.evaluate()["eval_accuracy"] >= 0.4, "an evaluation gathers logits alone"

    def test_the_head_renders_as_it_says(self, tmp_path):
        probe = head(make_lm(vocab_size=260), prompt_format="raw", max_length=6, id2label={0: "good", 1: "bad"})
        trainer = mood(tmp_path, held_back=None, model=probe, cache_states=False, num_train_epochs=1)
        assert trainer.train_dataset[0]["input_ids"] == make_tokenizer()(TEXTS[0])["input_ids"][:6]
        assert trainer.train_dataset.labels[:2].tolist() == [1, 0], "the head's labels, not those of the rows"
        trainer.train()
        assert probe.config.temperature == 1 and probe.results is None, "no rows to judge it by"

    @pytest.mark.parametrize("names, metric, judging", [((), None, "own"), (("a", "b"), "eval_own_2_auroc", "own_2")])
    def test_several_sets_to_evaluate_on(self, tmp_path, names, metric, judging):
        lm, sets = make_lm(vocab_size=260), {"own": ANSWERS[:12], "own_2": ANSWERS[12:]}
        fields = {"id2label": {0: "bad", 1: "good"}}
        probe = {name: head(lm, **fields) for name in names} or head(lm, **fields)
        more = {"num_train_epochs": 2, "metric_for_best_model": metric, "callbacks": [EarlyStoppingCallback(2)]}
        trainer = mood(tmp_path, model=probe, held_back=sets, **more)
        trainer.train()
        scores = trainer.evaluate()
        assert {"eval_own_loss", "eval_own_2_loss", f"eval_{judging}_auroc"} <= scores.keys()
        for name, each in trainer.heads.items():
            best = scores[f"eval_{judging}_{trainer.metric_name(name, 'auroc')}"]
            assert trainer.progress[name].best == pytest.approx(best) and len(trainer.progress[name].scores) == 2
            assert each.results["data"]["validation"]["rows"] == len(sets[judging])

    @pytest.mark.parametrize(
        "rows, name, value",
        [
            ({"text": TEXTS[:16], "label": [[0], [0, 1]] * 8}, "problem_type", "multi_label_classification"),
            ({"text": TEXTS[:16], "label": [0.5, -1.0] * 8}, "problem_type", "regression"),
            ({"prompt": ["How?"] * 16, "response": TEXTS[:16], "label": [0, 1] * 8}, "token_scope", "response"),
            ({"messages": TOOL_RESULTS, "label": [0, 1] * 8}, "token_scope", "tool"),
            ({"input_ids": [[5, 6, 7], [8, 9]] * 8, "label": [0, 1] * 8}, "prompt_format", "unknown"),
        ],
    )
    def test_what_the_rows_are_decides_what_the_head_is(self, tmp_path, backbone_folder, rows, name, value):
        trainer = mood(tmp_path, rows, rows, backbone=str(backbone_folder), num_train_epochs=1)
        trainer.train()
        predicted = trainer.predict({column: rows[column] for column in rows.keys() - {"label"}}).predictions
        assert getattr(trainer.heads["head"].config, name) == value and len(trainer.logits) == len(predicted) == 16

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"backbone": "demo"}, "one of"),
            ({"probe_config": {"probe_type": "gate"}}, "backbone"),
            ({"model": head()}, "backbone"),
            ({"rows": {"words": ["a", "b"], "label": [1, 0]}}, "words"),
            ({"column_mapping": {"review": "text"}}, "review"),
            ({"metric_for_best_model": "r2"}, "r2"),
            ({"class_weights": "1"}, "class_weights has 1"),
            ({"label_smoothing_factor": 1.0}, "label_smoothing_factor=1.0"),
            ({"include_for_metrics": ["inputs"], "cache_states": True}, "cache_states=True: include_for_metrics"),
            ({"token_loss": "max"}, "token_loss='max'"),
            ({"token_loss": "monotone"}, "token_loss='monotone'.* token_scope='prompt'"),
            ({"model": head(token_scope="response"), "token_loss": "monotone"}, "token_loss='monotone'.*flagged"),
            ({"model": head(**GUARD), "rows": IDS, "held_back": None, "token_loss": "monotone"}, "rows with replies"),
            ({"rows": Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()}, "one split in memory"),
            ({"held_back": "rows.csv"}, "eval_dataset"),
            ({"held_back": {}}, "eval_dataset"),
            ({"held_back": {"test": ANSWERS[:12]}, "metric_for_best_model": "tset_auprc"}, "'tset_auprc'"),
        ],
    )
    def test_mistakes_beside_those_of_the_page_on_troubleshooting(self, tmp_path, changes, words):
        with pytest.raises(ProbeError, match=words):
            mood(tmp_path, **{"model": head(make_lm(vocab_size=260)), **changes})


@pytest.mark.parametrize("held_back", [None, ANSWERS[:12]])
def test_a_loaded_head_that_learns_on(tmp_path, held_back):
    """What was fitted to its earlier weights goes, and what is measured now is saved."""
    lm, fields = make_lm(vocab_size=260), {"id2label": {0: "bad", 1: "good"}, "flagged": ["bad"]}
    fitted = {"threshold": 0.7, "thresholds": {"fpr-1%": 0.9}, "temperature": 3.0}
    head(lm, **fields, **fitted).save_pretrained(tmp_path / "head")
    loaded = ProbeModel.from_pretrained(tmp_path / "head", backbone=lm)
    trainer = mood(tmp_path / "out", model=loaded, held_back=held_back, num_train_epochs=1)
    assert loaded.config.threshold == 0.7, "an evaluation takes what it has"
    trainer.train()
    trainer.save_model(str(tmp_path / "head"))
    saved = read_head(tmp_path / "head")
    assert saved.config.thresholds is None and saved.config.threshold != 0.7 and saved.config.temperature != 3.0
    assert (saved.results is None) == (held_back is None)


def test_cached_states_spare_passes_and_are_deleted(tmp_path):
    lm, passes, counts = make_lm(vocab_size=260), [], []
    lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    for cache in (True, False):
        passes.clear()
        trainer = mood(tmp_path / str(cache), model=head(lm), cache_states=cache, num_train_epochs=3)
        trainer.train()
        counts.append(len(passes))
    assert counts[0] < counts[1] / 2
    del trainer
    gc.collect()
    assert not (tmp_path / "True" / STATES).exists(), "states can reveal the texts"


def test_states_in_a_folder_of_ones_own_are_used_again(tmp_path):
    lm, passes, counts = make_lm(vocab_size=260), [], []
    lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    for name in ("first", "second"):
        passes.clear()
        mood(tmp_path / name, model=head(lm), cache_states=True, cache_dir=str(tmp_path / "kept"))
        counts.append(len(passes))
    assert counts == [2, 1], "the fingerprint of the backbone takes a pass of its own"


def test_a_trainer_that_is_freed_leaves_the_states_of_the_next(tmp_path, monkeypatch):
    """As in a loop over heads, whose trainers are freed at any time."""
    lm, of_rows = make_lm(vocab_size=260), StateDataset.__init__
    monkeypatch.setattr(StateDataset, "__init__", lambda *given: (gc.collect(), of_rows(*given))[1])
    for head_type in ("gate", "mha"):
        trainer = mood(tmp_path, model=head(lm, probe_type=head_type), cache_states=True)
        assert len(trainer.train_dataset[0]["hidden_states"]) == 5
        del trainer


def test_a_search_is_that_of_a_recipe(tmp_path):
    with pytest.raises(ProbeError, match="search of a recipe"):
        mood(tmp_path, model_init=lambda: head(make_lm(vocab_size=260)))
    with pytest.raises(ProbeError, match="search of a recipe"):
        mood(tmp_path, model=head(make_lm(vocab_size=260))).hyperparameter_search(n_trials=2)


# Methods of transformers that no page describes, and that this package overrides or calls, with their parameters.
HOOKS = {
    "_clip_grad_norm": ["self", "model"],
    "_get_dataloader": ["self", "dataset", "description", "batch_size", "sampler_fn"],
    "_get_eval_sampler": ["self", "eval_dataset"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_save_rng_state": ["self", "output_dir"],
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_transformers_is_where_it_was(name):
    assert hasattr(Trainer, name), f"transformers {transformers.__version__} has no Trainer.{name}"
    parameters = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert parameters[: len(HOOKS[name])] == HOOKS[name], f"Trainer.{name} takes other parameters"


def test_each_hook_that_is_overridden_is_listed_and_called(tmp_path, monkeypatch):
    overridden = {name for owner in (ProbeTrainer, RecipeTrainer) for name in vars(owner) if hasattr(Trainer, name)}
    hooks = {name for name in overridden if re.match("_[a-z]", name)}
    assert hooks == set(HOOKS) - {"_get_dataloader"}
    called = set()
    for name in hooks:
        real = getattr(ProbeTrainer, name)
        spy = lambda *given, name=name, real=real: called.add(name) or real(*given)  # noqa: E731
        monkeypatch.setattr(ProbeTrainer, name, spy)
    monkeypatch.setattr(ProbeTrainer, "push_to_hub", lambda *_: None)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    trainer_for(head(make_lm()), tmp_path, num_train_epochs=1, push_to_hub=True).train()
    assert called == hooks, "a release of transformers does not call the others any more"


def test_a_reply_in_token_ids_ends_with_its_mask(tmp_path):
    row = {"input_ids": [5, 6, 7, 8, 9, 3, 4], "probe_mask": [0, 0, 1, 1, 1, 0, 0]}
    rows = [row | {"label": i % 2} for i in range(8)]
    probe = head(make_lm(vocab_size=260), token_scope="response")
    learned = mood(tmp_path, rows, None, model=probe, cache_states=False).train_dataset.dataset
    assert learned[0]["input_ids"] == [5, 6, 7, 8, 9] and learned.reply_lengths[0] == 3


class Curious(TrainerCallback):
    """Evaluates on other rows during the training."""

    def on_step_begin(self, args, state, control, **kwargs):
        for prefix in ("eval", "train"):
            self.trainer.evaluate(ANSWERS, metric_key_prefix=prefix)


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_own_callables(tmp_path, names):
    lm, sizes, seen = make_lm(vocab_size=260), [], []
    own = {"compute_metrics": lambda evaluated: seen.append(evaluated) or {"rows": len(evaluated.inputs)}}
    own |= {"include_for_metrics": ["inputs"], "gradient_checkpointing": True}
    own["data_collator"] = lambda rows: sizes.append(len(rows)) or collate(rows)
    own["callbacks"] = [curious := Curious()]
    probe = {name: head(lm) for name in names} or head(lm)
    own["per_device_train_batch_size"] = 16
    curious.trainer = trainer = mood(tmp_path, model=probe, num_train_epochs=1, **own)
    trainer.train()
    for progress in trainer.progress.values():
        assert len(progress.scores) == 1, "a single head by the loss; the evaluations of the callback do not count"
    assert trainer.evaluate()["eval_rows"] == 12 and sizes
    assert seen[-1].label_ids.tolist() == [0, 1] * 6, "rows in their order, whatever their lengths"
    assert seen[-1].predictions.shape == (12, *[2] * bool(names), 2)
    assert trainer.predict(ANSWERS).label_ids.tolist() == [0, 1] * 16


def test_learns_and_leaves_the_backbone_bit_identical(tmp_path):
    lm = make_lm()
    probe = head(lm)
    trainer = trainer_for(probe, tmp_path, num_train_epochs=8)
    assert trainer.evaluate(trainer.train_dataset)["eval_accuracy"] < 0.7
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_accuracy"] > 0.95
    assert same_weights(lm, make_lm())
    assert not lm.training and all(p.grad is None for p in lm.parameters())
    saved = load_file(next(tmp_path.glob("checkpoint-*")) / "model.safetensors")
    names = {f"heads.head.{name}" for name in probe.state_dict()}
    assert saved.keys() == names, "checkpoints hold only the head"
    assert trainer.evaluate()["eval_auprc"] == trainer.state.best_metric > 0.85


def test_a_lora_adapted_backbone(tmp_path):
    lm = get_peft_model(make_lm(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    before, probe = copy.deepcopy(lm), head(lm)
    trainer_for(probe, tmp_path, num_train_epochs=1).train()
    assert same_weights(lm, before)
    plain = head(make_lm())
    plain.load_state_dict(probe.state_dict())
    data = PromptDataset(*token_rows(4))
    assert not torch.allclose(predict_logits(probe, data), predict_logits(plain, data)), "the adapter is in the states"


TWO, BALANCED = [0, 0, 0, 0, 0, 1, 0, 1], {"class_weights": "balanced"}
SEVERAL, VALUE = {"problem_type": "multi_label_classification"}, {"problem_type": "regression", "num_labels": 1}


@pytest.mark.parametrize(
    "fields, labels, arguments, weights",
    [
        ({}, TWO, {"class_weights": [1, 3.0], "label_smoothing_factor": 0.1, "focal_gamma": 1.0}, [1.0, 3.0]),
        ({}, TWO, BALANCED, [8 / (2 * 6), 8 / (2 * 2)]),
        (SEVERAL, [[1.0, 0]] * 6 + [[0, 1.0]] * 2, BALANCED, [2 / 6, 6 / 2]),
        # A value that stands for no label elsewhere counts as any other.
        (VALUE, [-100.0, 1, -100, 3, -100, -100, -100, -100], {}, None),
    ],
)
def test_the_loss_of_a_step_is_the_mean_over_the_rows_of_its_batches(tmp_path, fields, labels, arguments, weights):
    probe, rows = head(make_lm(), probe_type="pooling", dropout=0.0, **fields), token_rows(8)[0]
    arguments = {"label_smoothing_factor": 0.0, "focal_gamma": 0.0, **arguments}
    once = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, PromptDataset(rows, np.array(labels)), None, model=probe, **once, **arguments)
    logits, weights = predict_logits(probe, trainer.train_dataset), weights and torch.tensor(weights)
    factors = arguments["label_smoothing_factor"], arguments["focal_gamma"]
    loss = probe_loss(logits, torch.tensor(labels), probe.config, weights, *factors)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_what_the_trainer_pushes_is_a_head(tmp_path, hub, token, strategy):
    probe = head(make_lm(), id2label={0: "bad", 1: "good"})
    changes = {"push_to_hub": strategy != "end", "hub_model_id": "alice/mood", "hub_strategy": strategy}
    changes |= {"hub_private_repo": True, "num_train_epochs": 1}
    trainer = trainer_for(probe, tmp_path, **changes)
    trainer.train()
    if strategy == "end":  # as in the scripts of transformers
        trainer.push_to_hub(finetuned_from="tiny", tasks="text-classification")
        trainer.create_model_card(tasks="text-classification")
    assert hub.repositories["alice/mood"].private
    back = ProbeModel.from_pretrained("alice/mood")
    assert back.config.id2label == {0: "bad", 1: "good"} and same_weights(back, probe)
    assert same_weights(ProbeModel.from_pretrained(tmp_path), probe) and "good" in (tmp_path / CARD_NAME).read_text()
    files = set(HfApi().list_repo_files("alice/mood"))
    assert {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME} <= files <= {*HEAD_FILES, ".gitattributes"}, "and no pickle"
