"""Runs of several processes, started by the real torchrun: they see each other, divide the work, and agree."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ranks_at_work
import torch
from command_line import settings
from conftest import LAYERS, make_lm, make_probe, make_prompts, read_head
from launcher import finish, free_port, kill_rank, torchrun
from ranks_at_work import LABELS, prompts
from training_runs import write
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llama_probe import ProbeError, distributed
from llama_probe.backbone import passes
from llama_probe.cli import app
from llama_probe.data.disk_states import rows_on_disk
from llama_probe.data.prompts import PromptDataset
from llama_probe.distributed import claimed
from llama_probe.evaluation.prediction import predict_logits
from llama_probe.evaluation.report import inspect_head, report
from llama_probe.training.plan import compute_states, make_plan
from llama_probe.training.recipe_rows import read_rows
from llama_probe.training.run_folder import CHECKPOINTS


def write_rows(path: Path) -> None:
    texts = [f"{'good' if i % 3 else 'bad'} number {i}{'!' * (i % 7)}" for i in range(41)]
    write(path, [{"text": text, "label": int("bad" in text)} for text in texts])


def test_commands_that_cannot_divide_refuse(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "meet", lambda: None)
    for words, message in ((["inspect", "x"], "inspect runs in one process"), (["classify", "x"], "give files with")):
        assert message in str(CliRunner().invoke(app, words).exception)


def test_a_claimed_folder_has_one_run_at_a_time(tmp_path):
    folder = tmp_path / "head"
    with claimed(folder):
        with pytest.raises(ProbeError, match="another run"), claimed(folder):
            pass
        with claimed(tmp_path / "other"):
            (folder / "weights").touch()
    with claimed(folder):
        assert [path.name for path in folder.iterdir()] == ["weights"], "and no lock file"
    with pytest.raises(ProbeError, match="weights"), claimed(folder / "weights"):
        pass


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(ValueError), claimed(tmp_path / name):
            raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.slow
class TestTwoNodes:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory, backbone_folder) -> Path:
        folder = tmp_path_factory.mktemp("nodes")
        shutil.copytree(backbone_folder, folder / "backbone")
        write_rows(folder / "rows.jsonl")
        make_probe(probe_type="gate", prompt_format="chat", max_length=64).save_pretrained(folder / "mood")
        return folder

    @pytest.fixture(scope="class")
    def found(self, folder) -> list[dict]:
        port = free_port()
        nodes = [torchrun(ranks_at_work.__file__, folder, nodes=2, node=node, port=port) for node in (0, 1)]
        for node in nodes:
            done = finish(node)
            assert done.returncode == 0, done.stderr
        return [json.loads((folder / f"rank-{number}.json").read_text()) for number in (0, 1)]

    def test_they_are_two_and_agree(self, found):
        assert [part["world_size"] for part in found] == [2, 2]
        assert found[0]["folded"]["environment"]["processes"] == 2
        shares = [part["sharded"].pop("share") for part in found]
        assert sum(shares) == pytest.approx(1) and 0.4 < shares[0] < 0.6, "each has a half of the sharded weights"
        assert all(part.pop("computed") < len(LABELS) for part in found), "a trainer divides the pass of the backbone"
        assert found[0] == found[1]

    def test_scores_are_those_of_one_process(self, found, monkeypatch):
        monkeypatch.setattr(passes, "BATCH_TOKENS", 14)
        head = make_probe(probe_type="mha")
        head.set_backbone(make_lm())
        dataset = PromptDataset(prompts(), LABELS)
        assert found[0]["logits"] == predict_logits(head, dataset).tolist()
        assert found[0]["inspection"] == json.loads(json.dumps(inspect_head(head, dataset, LABELS)))

    def test_a_search_trains_heads_side_by_side(self, found, folder):
        trials = found[0]["search"]["search"]
        assert len(trials) == 4 and trials[0]["score"] == max(trial["score"] for trial in trials)
        alone = ranks_at_work.train(folder, "alone", search=ranks_at_work.SEARCH)
        values = [{trial["name"]: trial["values"] for trial in search} for search in (trials, alone["search"])]
        assert values[0] == values[1]
        assert not list((folder / "search").glob(".*")), "no part of a checkpoint is left"

    def test_a_scoring_job_writes_what_one_process_writes(self, found, folder, monkeypatch):
        monkeypatch.setattr(passes, "BATCH_TOKENS", 14)
        alone = ranks_at_work.scored(folder, "scored-alone")
        assert found[0]["scored"] == alone and alone["rows"] == 41 and len(alone["parts"]) == 9
        tables = [pq.read_table(folder / name).to_pylist() for name in ("scored", "scored-alone")]
        assert tables[0] == tables[1]

    def test_ranks_that_compute_a_batch_in_different_numbers_of_parts(self, found):
        assert found[0]["computed_in_parts"] < 1e-5, "with SGD, which magnifies no rounding"

    def test_a_checkpoint_is_complete_once_its_state_is_written(self, found):
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(found[0]["checkpointed"])

    def test_folds(self, found, folder):
        (run,) = found[0]["folded"]["runs"]
        assert run["validation"]["rows"] == found[0]["folded"]["data"]["train"]["rows"] == 28
        assert read_head(folder / "folded").results == found[0]["folded"]

    def test_a_sharded_backbone(self, found):
        for part in found:
            sharded = part["sharded"]
            assert sharded["trainer_world"] == 2
            assert sharded["difference"] < 1e-5 and sharded["frozen"] and sharded["digest"]

    def test_a_backbone_with_a_tensor_parallel_plan(self, found, folder):
        head = make_probe(probe_type="mha")
        head.set_backbone(AutoModelForCausalLM.from_pretrained(folder / "backbone"))
        with torch.no_grad():
            whole = head(input_ids=make_prompts(seed=4)).logits
        scores = predict_logits(head, PromptDataset(prompts(), LABELS))
        for part in found:
            assert torch.allclose(torch.tensor(part["in_parts"]["logits"]), whole, atol=1e-5)
            assert torch.allclose(torch.tensor(part["in_parts"]["scores"]), scores, atol=1e-5)
        weight = head.backbone.model.layers[LAYERS - 1].mlp.down_proj.weight
        assert found[0]["in_parts"]["split"] == [weight.shape[0], weight.shape[1] // 2]


@pytest.mark.slow
def test_train_with_two_processes_ends_with_a_killed_rank_and_resumes(tmp_path, backbone_folder):
    write_rows(tmp_path / "rows.jsonl")
    output = tmp_path / "head"
    training = {"num_train_epochs": 10, "per_device_train_batch_size": 8, "learning_rate": 0.03, "patience": 10}
    training["cache_dir"] = str(tmp_path / "two")
    head = {"probe_type": "gate", "max_length": 64}
    words = settings(validation={"folds": 0}, head=head, training=training)
    places = (tmp_path / "rows.jsonl", "--backbone", backbone_folder, "--output", output)
    arguments = ["-m", "llama_probe.cli", "train", *places, *words, "--resume", "--json"]
    process = torchrun(*arguments)
    saved = output / CHECKPOINTS
    ranks = kill_rank(process, lambda: list(saved.glob("checkpoint-*/trainer_state.json")))
    done = finish(process, 60)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, "torchrun says which process it was"
    assert not any(child.is_running() for child in ranks), "none is left"
    assert not (output / "probe_model.safetensors").exists()
    weights = list(saved.glob("checkpoint-*/model*.safetensors"))
    assert weights and all(path.name == "model.safetensors" for path in weights), "each was written once"
    last = max(int(path.parent.name.split("-")[1]) for path in saved.glob("checkpoint-*/trainer_state.json"))

    done = finish(torchrun(*arguments))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)  # the main rank alone prints
    (run,) = results["runs"]
    assert run["epochs"] == 10.0 and results["environment"]["processes"] == 2
    assert f"{last} of 50 steps are done" in done.stderr, "it does only what is left"
    assert not (output / CHECKPOINTS).exists()
    # The states on disk are those of one process, and so are the scores of the head on them.
    training = {"cache_dir": str(tmp_path / "one")}
    alone = ranks_at_work.recipe(tmp_path / "rows.jsonl", test={}, head=head, training=training)
    plan = make_plan(alone, read_rows(alone), tmp_path / "alone", str(backbone_folder))
    states = compute_states(plan)
    for entry in (tmp_path / "one").iterdir():
        one, two = (rows_on_disk(tmp_path / name / entry.name) for name in ("one", "two"))
        assert one.keys() == two.keys() and one
        assert all(torch.equal(states, two[key][1]) for key, (_, states) in one.items())
    trained = read_head(output)
    logits = predict_logits(trained, states["validation"])
    assert run["validation"] == json.loads(json.dumps(report(trained.config, logits, plan.rows.validation.labels)))
