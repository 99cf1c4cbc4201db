"""Head folders: bit-exact round trips, and a refusal of all that is damaged or hostile. tests/attack kills saves."""

import contextlib
import json
import os
import signal
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_probe, read_head, save_head
from hub_server.heads import same_weights
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from llama_probe import ProbeError
from llama_probe.data.row_files import InputFile
from llama_probe.data.row_sources import Source
from llama_probe.files import PENDING
from llama_probe.heads import probe_types
from llama_probe.heads.configuration import read_config
from llama_probe.hub.card import write_card
from llama_probe.hub.folder import (
    CARD_NAME,
    CONFIG_NAME,
    PLOT_NAMES,
    RECIPE_NAME,
    RESULTS_NAME,
    WEIGHTS_NAME,
    list_heads,
)


@pytest.fixture
def folder(tmp_path):
    return save_head(make_probe(id2label={0: "no", 1: "yes"}, threshold=0.3, temperature=1.5), tmp_path / "head")


def change_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "config_sha256": None, **changes}))


@pytest.mark.parametrize("head_type", probe_types())
def test_round_trip_is_bit_exact(tmp_path, head_type):
    probe = make_probe(probe_type=head_type, num_labels=3, layers=[0, 2, 4], prefix_ids=[5, 6], token_scope="content")
    back = read_head(save_head(probe, tmp_path / "one"))
    assert not back.training and back.state_dict().keys() == probe.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in probe.state_dict().items())
    stamps = {"weights_sha256": None, "llama_probe_version": None, "transformers_version": None}
    assert back.config.replace(**stamps) == probe.config and back.config.transformers_version is not None
    assert (back.config.hidden_size, back.config.num_hidden_layers) == (HIDDEN, LAYERS)
    again = save_head(back, tmp_path / "two")
    assert {path.name for path in again.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (again / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def with_results(probe, number):
    probe.results = {"chosen_seed": number}
    return probe


def test_results_and_plots_of_another_head_are_removed(folder, caplog):
    measured = with_results(read_head(folder), 0)
    save_head(measured, folder)
    kept = [folder / name for name in (PLOT_NAMES[0], RECIPE_NAME)]
    for path in kept:
        path.write_bytes(b"of the training")
    save_head(read_head(folder), folder)
    assert read_head(folder).results == {"chosen_seed": 0} and all(path.is_file() for path in kept), "the same head"
    save_head(with_results(measured, 1), folder)
    assert read_head(folder).results == {"chosen_seed": 1} and not any(path.exists() for path in kept)
    measured = with_results(read_head(folder), 0)
    measured.classifier.bias.data += 1
    assert read_head(save_head(measured, folder)).results is None and "after its results were measured" in caplog.text


def test_a_folder_without_a_head_keeps_its_files(tmp_path):
    (tmp_path / RESULTS_NAME).write_text("{}")
    save_head(make_probe(), tmp_path)
    assert (tmp_path / RESULTS_NAME).read_text() == "{}"


@pytest.mark.parametrize("breaks", [{}, {"renew_card": lambda *_: 1 / 0}], ids=["results", "template"])
def test_a_card_that_cannot_be_made_is_said_and_the_old_one_kept(folder, monkeypatch, caplog, breaks):
    """Its licence and tags go into the next card."""
    card = ModelCard.load(folder / CARD_NAME)
    card.data.license = "mit"
    card.save(folder / CARD_NAME)
    before = (folder / CARD_NAME).read_text()
    other = make_probe(seed=1)
    other.results = {"of": "another version"}
    with monkeypatch.context() as patch:
        for name, value in breaks.items():
            patch.setattr(f"llama_probe.heads.saving.{name}", value)
        save_head(other, folder)
    assert same_weights(read_head(folder), other) and (folder / CARD_NAME).read_text() == before
    assert "README.md stays as it was: " in caplog.text and len(caplog.text.strip().splitlines()) == 1
    save_head(make_probe(), folder)
    assert ModelCard.load(folder / CARD_NAME).data.license == "mit"


def test_a_head_that_is_read_while_others_are_saved(tmp_path):
    """It is one of them, with its own results, and never refused."""
    heads = [with_results(make_probe(seed=seed), seed) for seed in range(2)]
    save_head(heads[0], tmp_path / "head")
    child = os.fork()
    if child == 0:
        while True:
            for head in heads:
                save_head(head, tmp_path / "head")
                time.sleep(0.02)  # or no read would ever be of one head
    found, deadline = [], time.monotonic() + 60
    try:
        while len(found) < 60 or len(set(found)) < 2:  # both, or any order would pass
            head = read_head(tmp_path / "head")
            found.append(head.results["chosen_seed"])
            assert same_weights(head, heads[found[-1]]) and time.monotonic() < deadline
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_a_killed_save_left_is_no_head_of_its_own(folder):
    folder.rename(folder.parent / PENDING)
    assert list_heads(folder.parent) == {}


def test_two_saves_at_the_same_time(tmp_path):
    heads = [make_probe(seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            list(pool.map(lambda head: save_head(head, tmp_path / "head"), heads))
            assert any(same_weights(read_head(tmp_path / "head"), head) for head in heads)
    assert {path.name for path in (tmp_path / "head").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, "README.md"}


def test_files_of_a_killed_save_behind_a_link(folder, tmp_path):
    """A stranger's folder must not have files from elsewhere moved into it."""
    save_head(make_probe(seed=1), tmp_path / "other")
    (folder / PENDING).symlink_to(tmp_path / "other")
    assert same_weights(read_head(folder), make_probe())
    with pytest.raises(ProbeError, match="cannot be written"):
        save_head(make_probe(seed=2), folder)
    assert same_weights(read_head(tmp_path / "other"), make_probe(seed=1))


@pytest.mark.parametrize("change", [{"temperature": 1.25}, {"weights_sha256": None}, {"a new field": 1}])
def test_a_config_that_was_changed_after_it_was_saved(folder, change):
    digest = json.loads((folder / CONFIG_NAME).read_text())["config_sha256"]
    change_config(folder, config_sha256=digest, base_model_name_or_path="me/lm", llama_probe_version="9")
    assert read_config(folder).base_model_name_or_path == "me/lm", "what says nothing about scores may be changed"
    change_config(folder, config_sha256=digest, **change)
    with pytest.raises(ProbeError, match="config_sha256"):
        read_config(folder)
    change_config(folder, **change)
    assert read_config(folder)


def test_what_a_config_lacks_or_has_too_much_is_said(folder, caplog):
    change_config(folder, weights_sha256=None, **{"colour": "red", "a\x1b[31m": 1})
    assert read_head(folder).config.num_labels == 2
    assert "weights_sha256" in caplog.text and r"'a\x1b[31m', 'colour'" in caplog.text


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME])
@pytest.mark.parametrize("there", ["/dev/zero", "a fifo", "20 GB"])
def test_files_that_are_none(folder, name, there):
    """Refused at once, or not taken for a file."""
    (folder / name).unlink(missing_ok=True)
    if there == "a fifo":
        os.mkfifo(folder / name)
    elif there == "20 GB":
        with (folder / name).open("wb") as file:
            file.truncate(20 * 2**30)
    else:
        (folder / name).symlink_to(there)
    for work in (read_head, write_card):
        with contextlib.suppress(ProbeError):
            work(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000])
def test_names_that_are_too_long(name, tmp_path):
    for read in (read_head, lambda path: Source(rows=path).read(), lambda path: InputFile.find([path])):
        with pytest.raises(ProbeError):
            read(str(tmp_path / name))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"threshold": 0.9, "threshold": 0.3}', "'threshold' occurs twice"),
        (b'{"probe_type": "pickle"}', "probe_type='pickle'"),
        (b'{"probe_type": "muli"}', "probe_type='muli' is gone.*examples/paper"),
        (b'{"num_hidden_layers": 99999999999}', "num_hidden_layers"),
        (b'{"probe_type": "gate"}', "hidden_size and num_hidden_layers"),
        (b" " * (5 * 2**20), "larger than"),
        (
            b'{"hidden_size": 1048576, "num_hidden_layers": 1048576, "downcast": 1, "num_attention_heads": 1}',
            "has the shape|cannot be built|does not fit",
        ),
    ],
)
def test_hostile_configs(folder, content, words):
    (folder / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ProbeError, match=words) as raised:
        read_head(folder)
    assert str(folder) in str(raised.value)


LARGE = b'{"classifier.bias": {"dtype": "F32", "shape": [75000000], "data_offsets": [0, 300000000]}}'
DAMAGES = {
    "truncated": lambda data: data[:-100],
    "endless header": lambda data: struct.pack("<Q", 2**60) + b"{}",
    "long header": lambda data: struct.pack("<Q", 2**20 + 8) + b"{}".ljust(2**20 + 8),
    "too large": lambda data: data + bytes(2**21),
    "a pickle": lambda data: b"\x80\x04\x95" + b"cos\nsystem\n" * 10,
    "300 MB declared": lambda data: struct.pack("<Q", len(LARGE)) + LARGE + bytes(16),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(folder, damage):
    path = folder / WEIGHTS_NAME
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ProbeError, match="is damaged or not a safetensors file"):
        read_head(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: tensors.pop("classifier.bias"), r"missing \['classifier.bias'\]"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"unexpected \['extra'\]"),
        (lambda tensors: tensors.update({"classifier.bias": torch.zeros(3)}), r"classifier.bias has the shape \[3\]"),
        (lambda tensors: tensors.update({"classifier.bias": torch.zeros(2).half()}), "classifier.bias .*float16"),
        (lambda tensors: tensors["classifier.bias"].add_(1), "sha256 differs"),
    ],
)
def test_wrong_tensors(folder, change, words):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)
    with pytest.raises(ProbeError, match=words):
        read_head(folder)


def test_weights_that_are_not_finite(tmp_path):
    probe = make_probe(probe_type="gate")
    probe.classifier.bias.data[-1] = float("-inf")
    with pytest.raises(ProbeError, match=r"classifier\.bias holds NaN or infinity"):
        read_head(save_head(probe, tmp_path / "head"))


def test_only_safetensors_are_read(folder):
    (folder / WEIGHTS_NAME).rename(folder / "probe_model.bin")
    with pytest.raises(ProbeError, match="only safetensors are read"):
        read_head(folder)
