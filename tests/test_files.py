"""Head folders: bit-exact round trips, atomic writes, and a clear refusal of everything damaged or hostile."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_lm, make_probe
from safetensors.torch import load_file, save_file

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.files import (
    CONFIG_NAME,
    PLOT_NAMES,
    WEIGHTS_NAME,
    check_output,
    read_config,
    read_head,
    save_head,
    write_atomically,
)


@pytest.fixture
def folder(tmp_path):
    return save_head(make_probe(id2label={0: "no", 1: "yes"}, threshold=0.3, temperature=1.5), tmp_path / "head")


def change_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


@pytest.mark.parametrize("kind", ["pooling", "gate", "mha"])
def test_round_trip_is_bit_exact(tmp_path, kind):
    probe = make_probe(probe_type=kind, num_labels=3, layers=[0, 2, 4], prefix_ids=[5, 6], token_scope="content")
    back = read_head(save_head(probe, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert back.state_dict().keys() == probe.state_dict().keys()
    for name, tensor in probe.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    assert (
        back.config.replace(weights_sha256=None, llama_probe_version=None, transformers_version=None) == probe.config
    )
    assert back.config.transformers_version is not None


def test_the_model_saves_and_loads_itself(folder, tmp_path):
    lm = make_lm()
    probe = ProbeModel.from_pretrained(folder, backbone=lm)
    assert probe.backbone is lm and not probe.training
    probe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


def test_what_was_measured_of_another_head_goes_with_it(folder):
    """Results and plots would pass for those of the head that took its place."""
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


def test_results_of_another_head_never_stand_beside_new_weights(folder, monkeypatch):
    """Whatever ends the process between two renames."""
    measured = read_head(folder)
    measured.results = {"chosen_seed": 0}
    save_head(measured, folder)
    rename = Path.replace

    def killed(self, target):
        rename(self, target)
        if target.name == WEIGHTS_NAME:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_head(make_probe(seed=5), folder)
    assert read_head(folder).results is None


def test_saving_twice_gives_the_same_bytes(folder, tmp_path):
    again = save_head(read_head(folder), tmp_path / "again")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_failed_write_changes_nothing(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def broken(self):
        raise OSError("disk full")

    monkeypatch.setattr(ProbeConfig, "to_json_string", broken)
    with pytest.raises(OSError, match="disk full"):
        save_head(make_probe(seed=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(bytes(2**16)), lambda path: save_file({"w": torch.zeros(2**14)}, path)]
)
def test_a_full_disk_changes_nothing_and_is_named(tmp_path, write):
    import resource

    kept = tmp_path / "kept"
    kept.write_text("as it was")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        with pytest.raises(ProbeError, match="kept cannot be written: there is no room for it"):
            write_atomically({kept: write})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept.read_text() == "as it was" and list(tmp_path.iterdir()) == [kept]


def test_one_that_was_killed_while_it_saved_may_save_again(tmp_path, monkeypatch):
    """Between its files as well: what is there then is taken for no other's."""
    replace, calls = Path.replace, []

    def die(path, target):
        if calls:
            raise KeyboardInterrupt
        calls.append(target)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_head(make_probe(), tmp_path / "head")
    assert len(list((tmp_path / "head").iterdir())) == 1
    check_output(tmp_path / "head")
    with pytest.raises(ProbeError, match=WEIGHTS_NAME):
        read_head(tmp_path / "head")
    read_head(save_head(make_probe(), tmp_path / "head"))


def test_unknown_keys_are_reported_and_left_out(folder, caplog):
    change_config(folder, **{"colour": "red", "a\x1b[31m": 1})
    assert read_config(folder).num_labels == 2
    assert r"unknown keys are left out (written by another version?): 'a\x1b[31m', 'colour'" in caplog.text


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (
            b'{"probe_type": "pickle"}',
            "probe_type='pickle' is not known; allowed: attentive, gate, last, mha, muli, multimax, pooling",
        ),
        (b'{"hidden_size": 1e400}', "hidden_size"),
        (b'{"num_hidden_layers": 99999999999}', "num_hidden_layers"),
        (b'{"probe_type": "gate"}', "lacks hidden_size or num_hidden_layers"),
        (b" " * (5 * 2**20), "larger than"),
    ],
)
def test_hostile_configs(folder, content, words):
    (folder / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ProbeError, match=words):
        read_head(folder)


def test_a_config_too_large_to_build(folder):
    change_config(folder, hidden_size=2**20, num_hidden_layers=2**20, downcast=1, num_attention_heads=1)
    with pytest.raises(ProbeError, match=r"has the shape|cannot be built"):
        read_head(folder)


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
        (lambda tensors: tensors.update({"classifier.bias": torch.zeros(2).long()}), "classifier.bias is I64"),
    ],
)
def test_wrong_tensors(folder, change, words):
    change_weights(folder, change)
    with pytest.raises(ProbeError, match=words):
        read_head(folder)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(tmp_path, wrong):
    """Such a head fails at each prompt: that is said when it is loaded, before anybody serves with it."""
    probe = make_probe(probe_type="gate")
    name, weight = list(probe.named_parameters())[-1]
    weight.data.flatten()[-1] = wrong
    with pytest.raises(ProbeError, match=f"{name} holds values that are no finite numbers.*lower learning rate"):
        read_head(save_head(probe, tmp_path / "head"))


def test_weights_of_another_kind(folder, tmp_path):
    other = save_head(make_probe(probe_type="gate"), tmp_path / "gate")
    (folder / WEIGHTS_NAME).write_bytes((other / WEIGHTS_NAME).read_bytes())
    with pytest.raises(ProbeError, match="does not hold the tensors that its config asks for"):
        read_head(folder)


def test_missing_files(folder, tmp_path):
    (folder / WEIGHTS_NAME).unlink()
    (folder / "probe_model.bin").write_bytes(b"pickle")
    with pytest.raises(ProbeError, match="only safetensors are read"):
        read_head(folder)
    with pytest.raises(ProbeError, match="is not a head folder"):
        read_head(tmp_path)


def test_what_a_trainer_wrote_is_no_head_folder(tmp_path):
    for name in ("model.safetensors", "training_args.bin"):
        (tmp_path / name).touch()
    with pytest.raises(ProbeError, match=r"no probe_config.json \(found: model.safetensors.*probe.save_pretrained"):
        read_head(tmp_path)


def test_sizes_are_kept(folder):
    config = read_config(folder)
    assert (config.hidden_size, config.num_hidden_layers) == (HIDDEN, LAYERS)
    assert config.id2label == {0: "no", 1: "yes"} and config.threshold == 0.3


PLACES = pytest.mark.parametrize("write", [check_output, lambda folder: save_head(make_probe(), folder)])


@PLACES
@pytest.mark.parametrize("name", ["a" * 300, "taken", "taken/inside"])
def test_where_no_head_can_be_written(tmp_path, name, write):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(
        ProbeError, match=r"cannot be a folder: File name too long|taken is a file; name a folder for the head"
    ):
        write(tmp_path / name)


@PLACES
def test_a_folder_that_is_read_only(tmp_path, monkeypatch, write):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may write everywhere
    with pytest.raises(ProbeError, match=r"nothing can be written into .*: name another folder"):
        write(tmp_path / "new")
