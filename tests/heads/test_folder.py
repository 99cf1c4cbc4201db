"""Head folders: bit-exact round trips, and a refusal of everything damaged, hostile or half-written."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm, make_probe, read_head, save_head
from safetensors.torch import load_file, save_file

from llama_probe import ProbeConfig, ProbeError
from llama_probe.heads.configuration import read_config
from llama_probe.hub.folder import CARD_NAME, CONFIG_NAME, PLOT_NAMES, WEIGHTS_NAME, check_output


@pytest.fixture
def folder(tmp_path):
    return save_head(make_probe(id2label={0: "no", 1: "yes"}, threshold=0.3, temperature=1.5), tmp_path / "head")


def change_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["pooling", "gate", "mha"])
def test_round_trip_is_bit_exact(tmp_path, kind):
    probe = make_probe(probe_type=kind, num_labels=3, layers=[0, 2, 4], prefix_ids=[5, 6], token_scope="content")
    back = read_head(save_head(probe, tmp_path / "one"))
    assert not back.training and back.state_dict().keys() == probe.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in probe.state_dict().items())
    stamps = {"weights_sha256": None, "llama_probe_version": None, "transformers_version": None}
    assert back.config.replace(**stamps) == probe.config and back.config.transformers_version is not None
    assert (back.config.hidden_size, back.config.num_hidden_layers) == (HIDDEN, LAYERS)
    again = save_head(back, tmp_path / "two")
    assert {path.name for path in again.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (again / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_with_a_backbone(folder):
    lm = make_lm()
    assert read_head(folder, backbone=lm).backbone is lm
    with pytest.raises(ProbeError, match="hidden_size"):
        read_head(folder, backbone=make_lm(hidden_size=16))


def test_results_and_plots_of_another_head_are_removed(folder):
    measured = read_head(folder)
    measured.results = {"chosen_seed": 0}
    save_head(measured, folder)
    (folder / PLOT_NAMES[0]).write_bytes(b"a plot")
    save_head(read_head(folder), folder)
    assert read_head(folder).results == {"chosen_seed": 0} and (folder / PLOT_NAMES[0]).is_file(), "the same head"
    measured.results = {"chosen_seed": 1}
    save_head(measured, folder)
    assert read_head(folder).results == {"chosen_seed": 1} and not (folder / PLOT_NAMES[0]).exists()
    save_head(make_probe(seed=5), folder)
    assert read_head(folder).results is None


def test_results_of_other_weights_are_not_saved(folder, caplog):
    measured = read_head(folder)
    measured.results = {"chosen_seed": 0}
    measured.classifier.bias.data += 1
    assert read_head(save_head(measured, folder)).results is None and "after its results were measured" in caplog.text


@pytest.mark.parametrize("survivor", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_kill_between_two_renames(folder, tmp_path, monkeypatch, survivor):
    """No results of another head beside new weights, and the next save succeeds."""
    measured = read_head(folder)
    measured.results = {"chosen_seed": 0}
    save_head(measured, folder)
    rename = Path.replace

    def killed(self, target):
        rename(self, target)
        if target.name == survivor:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        for place in (folder, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                save_head(make_probe(seed=5), place)
    assert not (folder / "results.json").exists()
    if survivor == CONFIG_NAME:
        for place, words in ((folder, "does not belong"), (tmp_path / "new", WEIGHTS_NAME)):
            with pytest.raises(ProbeError, match=words):
                read_head(place)
    for place in (folder, tmp_path / "new"):
        check_output(place)
        read_head(save_head(make_probe(), place))


def test_a_failed_write_changes_nothing(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def broken(self):
        raise OSError("broken")

    monkeypatch.setattr(ProbeConfig, "to_json_string", broken)
    with pytest.raises(OSError, match="broken"):
        save_head(make_probe(seed=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_unknown_keys_are_reported_and_left_out(folder, caplog):
    change_config(folder, **{"colour": "red", "a\x1b[31m": 1})
    assert read_config(folder).num_labels == 2
    assert r"'a\x1b[31m', 'colour'" in caplog.text


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"probe_type": "pickle"}', "probe_type='pickle'"),
        (b'{"hidden_size": 1e400}', "hidden_size"),
        (b'{"num_hidden_layers": 99999999999}', "num_hidden_layers"),
        (b'{"probe_type": "gate"}', "hidden_size and num_hidden_layers"),
        (b" " * (5 * 2**20), "larger than"),
        (
            b'{"hidden_size": 1048576, "num_hidden_layers": 1048576, "downcast": 1, "num_attention_heads": 1}',
            "has the shape|cannot be built|other tensors",
        ),
    ],
)
def test_hostile_configs(folder, content, words):
    (folder / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ProbeError, match=words) as raised:
        read_head(folder)
    assert str(folder) in str(raised.value)


def _huge_header(path):
    header = json.dumps(
        {"classifier.bias": {"dtype": "F32", "shape": [75_000_000], "data_offsets": [0, 300_000_000]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        lambda path: path.write_bytes(b"\x80\x04\x95" + b"cos\nsystem\n" * 10),
        _huge_header,
    ],
    ids=["empty", "truncated", "cut header", "endless header", "a pickle", "300 MB declared"],
)
def test_damaged_weights(folder, damage):
    damage(folder / WEIGHTS_NAME)
    with pytest.raises(ProbeError, match="is damaged or not a safetensors file"):
        read_head(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: tensors.pop("classifier.bias"), r"missing \['classifier.bias'\]"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"unexpected \['extra'\]"),
        (lambda tensors: tensors.update({"classifier.bias": torch.zeros(3)}), r"classifier.bias has the shape \[3\]"),
        (lambda tensors: tensors.update({"classifier.bias": torch.zeros(2).half()}), "classifier.bias is F16"),
        (lambda tensors: tensors["classifier.bias"].add_(1), "does not belong to the probe_config.json beside it"),
    ],
)
def test_wrong_tensors(folder, change, words):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)
    with pytest.raises(ProbeError, match=words):
        read_head(folder)


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path, wrong):
    probe = make_probe(probe_type="gate")
    name, weight = list(probe.named_parameters())[-1]
    weight.data.flatten()[-1] = wrong
    with pytest.raises(ProbeError, match=f"{name} holds NaN or infinity"):
        read_head(save_head(probe, tmp_path / "head"))


def test_only_safetensors_are_read(folder, tmp_path):
    (folder / WEIGHTS_NAME).unlink()
    (folder / "probe_model.bin").write_bytes(b"pickle")
    with pytest.raises(ProbeError, match="only safetensors are read"):
        read_head(folder)
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(ProbeError, match=r"is not a head folder.*save_pretrained"):
        read_head(tmp_path)
