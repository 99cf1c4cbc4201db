"""What every rank does in test_distributed.py: started by torchrun, it writes what it found into a file of its own."""

import contextlib
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import LAYERS, make_lm, make_probe, make_prompts
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainerState

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.backbone import passes
from llama_probe.backbone.loading import weights_digest
from llama_probe.data import batches
from llama_probe.data.disk_states import DiskStates
from llama_probe.data.prompts import PromptDataset
from llama_probe.distributed import gather, meet, rank, world_size
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.evaluation.report import inspect_head
from llama_probe.evaluation.scoring_job import ScoringJob
from llama_probe.training.arguments import ProbeTrainingArguments
from llama_probe.training.recipe import Recipe
from llama_probe.training.run import train_recipe
from llama_probe.training.trainer import ProbeTrainer


LABELS = torch.arange(13).numpy() % 2
SEARCH = {"trials": 4}


def prompts() -> list[list[int]]:
    return [make_prompts(1, 5 + row % 4, seed=row)[0].tolist() for row in range(13)]


def recipe(rows: Path, **sections) -> Recipe:
    """A short one on the rows that the test has written."""
    training = {"num_train_epochs": 2, "learning_rate": 0.03, **sections.pop("training", {})}
    parts = {"validation": {"folds": 0}, "test": {"share": 0.3}, "head": {"probe_type": "gate"}, **sections}
    return Recipe.load({"train": [str(rows)], "training": training, **parts})


def train(folder: Path, name: str, **sections) -> dict:
    return train_recipe(recipe(folder / "rows.jsonl", **sections), str(folder / "backbone"), folder / name)


def scored(folder: Path, name: str) -> dict:
    """A scoring job of one head over the rows, in chunks of five."""
    rows, head, backbone = (str(folder / part) for part in ("rows.jsonl", "mood", "backbone"))
    return ScoringJob([rows], folder / name, [head], backbone, chunk_rows=5).execute()


def sharded(folder: Path) -> dict:
    """A head on a backbone whose weights lie in pieces on all ranks, trained by the stock Trainer."""
    whole, lm = make_lm(), make_lm()
    for layer in lm.model.layers:
        fully_shard(layer)
    fully_shard(lm.model)
    pieces = sum(parameter.to_local().numel() for parameter in lm.model.parameters())
    dataset = PromptDataset(prompts(), LABELS)
    heads = [make_probe(probe_type="gate"), make_probe(probe_type="gate")]
    found = []
    for head, backbone in zip(heads, (whole, lm), strict=True):
        head.set_backbone(backbone)
        found.append(predict_logits(head, dataset))
    torch.manual_seed(0)
    trained = ProbeModel(ProbeConfig(probe_type="gate", dropout=0.0), backbone=lm)
    arguments = ProbeTrainingArguments(str(folder / "sharded"), num_train_epochs=2, per_device_train_batch_size=2)
    trainer = ProbeTrainer(trained, arguments, None, dataset, dataset)
    trainer.train()
    frozen = all(
        torch.equal(getattr(a, "full_tensor", lambda a=a: a)(), b)
        for a, b in zip(lm.model.parameters(), whole.model.parameters(), strict=True)
    )
    return {
        "share": pieces / sum(parameter.numel() for parameter in whole.model.parameters()),
        "difference": (found[0] - found[1]).abs().max().item(),
        "weights": torch.cat([tensor.flatten() for tensor in trained.state_dict().values()]).tolist(),
        "digest": weights_digest(lm) == weights_digest(whole),
        "frozen": frozen,
        "trainer_world": trainer.args.world_size,
    }


def in_parts(folder: Path) -> dict:
    """Layers split between the ranks by transformers' own plan: all ranks read the same rows."""
    lm = AutoModelForCausalLM.from_pretrained(folder / "backbone", tp_plan="auto")
    head = make_probe(probe_type="mha")
    head.set_backbone(lm)
    with torch.no_grad():
        logits = head(input_ids=make_prompts(seed=4)).logits
    cached = DiskStates(folder / "tp", torch.float32).dataset(lm, head.config, PromptDataset(prompts(), LABELS))
    scores = predict_logits(make_probe(probe_type="mha"), cached)
    with contextlib.suppress(ProbeError):
        ProbeTrainer(head, ProbeTrainingArguments(str(folder / "tp")), None, cached)
        raise AssertionError("the Trainer would give each rank its own rows")
    local = lm.model.layers[LAYERS - 1].mlp.down_proj.weight
    split = getattr(local, "to_local", lambda: local)().shape
    return {"logits": logits.tolist(), "scores": scores.tolist(), "split": list(split)}


def computed_in_parts(folder: Path) -> float:
    """How far weights are apart that are trained on whole batches, and on batches of which each rank has other parts."""
    config = make_probe(probe_type="gate").config
    states = DiskStates(folder / "parts", torch.float32).dataset(make_lm(), config, PromptDataset(prompts(), LABELS))
    weights = []
    for most in (batches.PART_TOKENS, 9):
        head = make_probe(probe_type="gate")
        settings = {"num_train_epochs": 2, "save_strategy": "no", "optim": "sgd", "learning_rate": 1.0}
        arguments = ProbeTrainingArguments(str(folder / f"parts-{most}"), **settings)
        with patch.object(batches, "PART_TOKENS", most):
            ProbeTrainer(head, arguments, None, states).train()
        weights.append(torch.cat([tensor.flatten() for tensor in head.state_dict().values()]))
    return (weights[0] - weights[1]).abs().max().item()


def checkpointed(folder: Path) -> list[str]:
    """The files of a checkpoint when it is marked as complete; the other rank is late."""
    heads = {name: make_probe(probe_type="gate") for name in "ab"}
    arguments = ProbeTrainingArguments(str(folder / "checkpointed"), num_train_epochs=1, save_strategy="epoch")
    save, found = Trainer._save_rng_state, []
    lm = make_lm()
    for head in heads.values():
        head.set_backbone(lm)
    dataset = PromptDataset(prompts(), LABELS)

    def save_late(trainer: Trainer, output: str) -> None:
        time.sleep(0.3 * rank())
        save(trainer, output)

    def list_files(_, path: str) -> None:
        found.extend(sorted(file.name for file in Path(path).parent.iterdir()))

    with patch.object(Trainer, "_save_rng_state", save_late), patch.object(TrainerState, "save_to_json", list_files):
        ProbeTrainer(heads, arguments, None, dataset).train()
    return gather(found)[0]


def scripted(folder: Path) -> int:
    """The rows that this rank computes for a trainer in a user's script, which begins no process group."""
    counts, compute = [], batches.collect_hidden_states
    head = make_probe(probe_type="gate")
    head.set_backbone(make_lm())

    def counted(lm, layers, ids, **kwargs):
        counts.append(len(ids))
        return compute(lm, layers, ids, **kwargs)

    with patch.object(batches, "collect_hidden_states", counted):
        rows = {"input_ids": prompts(), "label": LABELS.tolist()}
        ProbeTrainer(head, ProbeTrainingArguments(str(folder / "scripted")), train_dataset=rows)
    return sum(counts)


def main(folder: Path) -> None:
    passes.BATCH_TOKENS = 14  # several batches a rank
    computed = scripted(folder)
    meet()
    head = make_probe(probe_type="mha")
    head.set_backbone(make_lm())
    dataset = PromptDataset(prompts(), LABELS)
    found = {
        "computed": computed,
        "world_size": world_size(),
        "logits": predict_logits(head, dataset).tolist(),
        "inspection": inspect_head(head, dataset, LABELS),
        "folded": train(folder, "folded", validation={"folds": 2}, training={"cache_states": False}),
        "scored": scored(folder, "scored"),
        "search": train(folder, "search", search=SEARCH),
        "sharded": sharded(folder),
        "in_parts": in_parts(folder),
        "computed_in_parts": computed_in_parts(folder),
        "checkpointed": checkpointed(folder),
    }
    (folder / f"rank-{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
