"""Heads on a Hub, fetched: the real client against a server on loopback."""

import contextlib
import threading
from dataclasses import replace

import pytest
from conftest import make_probe
from hub_server.heads import plain, plant_model, same_weights
from huggingface_hub import constants
from transformers import AutoModel

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.hub.folder import CONFIG_NAME, WEIGHTS_NAME
from llama_probe.hub.transport import HubOptions, HubReference, download_head, hide_secrets


REPO = "alice/mood"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("user/repo", ("user/repo", None, None)),
        ("user/repo@v1.0", ("user/repo", "v1.0", None)),
        ("user/repo:a/b", ("user/repo", None, "a/b")),
        ("user/re.po@refs/pr/1:toxic-mha", ("user/re.po", "refs/pr/1", "toxic-mha")),
    ],
)
def test_references(text, expected):
    reference = HubReference.parse(text)
    assert (reference.repo_id, reference.revision, reference.subfolder) == expected and str(reference) == text


@pytest.mark.parametrize("text", ["alias", "./a/b", "/a/b", "a/b/c", "a/b@", "a/b:", "a b/c", "../x"])
def test_what_is_no_reference(text):
    assert HubReference.parse(text) is None


@pytest.mark.parametrize("text", ["a/b:../c", "a/b:/etc", "a/b:c/../../d", "a/b:c\\d", "a/b:c//d"])
def test_references_that_lead_outside(text):
    with pytest.raises(ProbeError, match="relative path inside"):
        HubReference.parse(text)


class TestPull:
    @pytest.fixture
    def head(self, hub):
        plant_model(hub, REPO, make_probe())
        return REPO

    def test_requests_of_a_warm_pull(self, hub, head):
        download_head(HubReference(head))
        for reference, expected in ((HubReference(head), 1), (HubReference(head, hub.head(head)), 0)):
            hub.requests.clear()
            download_head(reference)
            assert len(hub.requests) == expected, hub.requests

    def test_a_new_commit_is_seen_and_an_old_one_stays(self, hub, head):
        old = hub.head(head)
        plant_model(hub, head, make_probe(seed=1))
        assert same_weights(ProbeModel.from_pretrained(head), make_probe(seed=1))
        assert same_weights(ProbeModel.from_pretrained(f"{head}@{old}"), make_probe())

    def test_a_config_comes_without_its_weights(self, hub, head):
        config = ProbeConfig.from_pretrained(head)
        assert {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path} == {CONFIG_NAME}
        assert config == ProbeModel.from_pretrained(head).config
        with pytest.raises(ProbeError, match="nowhere"):
            ProbeConfig.from_pretrained(head, revision="nowhere")

    @pytest.mark.parametrize("how", ["down", "local_files_only", "HF_HUB_OFFLINE"])
    def test_offline_after_one_pull(self, hub, head, how, tmp_path, monkeypatch):
        options = HubOptions(local_files_only=how == "local_files_only", cache_dir=tmp_path / "own")
        with pytest.raises(ProbeError, match="cached snapshot"):
            download_head(HubReference(head), HubOptions(local_files_only=True))
        download_head(HubReference(head), replace(options, local_files_only=False))
        hub.requests.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
        with hub.down() if how == "down" else contextlib.nullcontext():
            download_head(HubReference(head), options)
        assert not hub.requests

    def test_private(self, hub, token, head, monkeypatch):
        hub.repositories[head].private = True
        assert ProbeModel.from_pretrained(head)
        wrong, bob = "hf_" + "y" * 34, hub.add_user("bob")
        monkeypatch.delenv("HF_TOKEN")
        for used in (None, False, wrong, bob):
            with pytest.raises(ProbeError, match=r"^alice/mood cannot be fetched") as raised:
                ProbeModel.from_pretrained(head, token=used, force_download=True)
            assert wrong not in str(raised.value) and bob not in str(raised.value)
        assert ProbeModel.from_pretrained(head, token=token, force_download=True)

    @pytest.mark.parametrize(
        "source, words",
        [
            ("alice/nothing", "cannot be fetched, and there is no folder alice/nothing: .*authenticated"),
            ("alice/nothing:mood", "cannot be fetched: .*authenticated"),
            (f"{REPO}@v9", "Revision Not Found.*v9"),
            (f"{REPO}:other", f"no probe_config.json; heads in it: {REPO}, {REPO}:topic$"),
            ("alice/text", "no probe_config.json$"),
            ("alice/half", "no probe_model.safetensors$"),
        ],
    )
    def test_what_is_not_there(self, hub, head, source, words):
        for folder in ("topic", "a:b", "c d"):  # nobody can ask for the last two
            plant_model(hub, head, make_probe(), f"{folder}/")
        hub.plant("alice/text", {"notes.txt": b"hello"})
        hub.plant("alice/half", {CONFIG_NAME: hub.files(head)[CONFIG_NAME], "pytorch_model.bin": b"\x80\x04."})
        with pytest.raises(ProbeError, match=words):
            ProbeModel.from_pretrained(source)
        assert not hub.count("GET", ".bin"), "a pickle is not fetched"

    @pytest.mark.parametrize("status, code", [(403, "GatedRepo"), (403, None), (429, None), (500, None)])
    def test_a_hub_that_refuses(self, hub, head, status, code):
        fault = hub.fault("answer", status=status, code=code, path="/resolve/", times=None)
        with pytest.raises(ProbeError, match="gated" if code else str(status)):
            ProbeModel.from_pretrained(head)
        assert fault.hits
        hub.faults.clear()
        assert ProbeModel.from_pretrained(head)

    def test_a_damaged_head_is_refused_until_it_is_fetched_again(self, hub, head):
        hub.fault("wrong sha", path=WEIGHTS_NAME)
        for _ in range(2):
            with pytest.raises(ProbeError, match=f"{WEIGHTS_NAME}.*force_download"):
                ProbeModel.from_pretrained(head)
        assert same_weights(ProbeModel.from_pretrained(head, force_download=True), make_probe())

    @pytest.mark.parametrize("fault", ["truncate", "run"])
    def test_a_hub_that_breaks_off_or_never_ends(self, hub, head, fault, monkeypatch):
        done = threading.Event()
        options = {"declared": False} if fault == "truncate" else {"action": lambda: done.wait(20)}
        injected = hub.fault(fault, method="GET", path=WEIGHTS_NAME, times=None, **options)
        with monkeypatch.context() as patch, pytest.raises(ProbeError, match="cannot be fetched"):
            patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
            ProbeModel.from_pretrained(head)
        done.set()
        hub.faults.clear()
        assert injected.hits and same_weights(ProbeModel.from_pretrained(head), make_probe()), "no part was kept"

    def test_a_connection_that_breaks_once_is_mended(self, hub, head):
        fault = hub.fault("truncate", path=WEIGHTS_NAME)
        assert same_weights(ProbeModel.from_pretrained(head), make_probe()) and fault.hits

    def test_a_renamed_repository(self, hub, head):
        hub.renamed["alice/old"] = head
        for _ in range(2):
            assert same_weights(ProbeModel.from_pretrained("alice/old"), make_probe())


class TestRevisions:
    """A head's revision is never the backbone's, nor the other way round."""

    @pytest.fixture
    def head(self, hub):
        plant_model(hub, REPO, make_probe())
        plant_model(hub, REPO, make_probe(seed=1), branch="next")
        return REPO

    def test_of_the_head(self, hub, head):
        lm = AutoModel.from_pretrained(plain(hub), probe=head, probe_revision="next")
        assert same_weights(lm.probes["mood"], make_probe(seed=1))
        lm = AutoModel.from_pretrained(plain(hub), probe={"a": f"{head}@main", "b": head}, probe_revision="next")
        assert same_weights(lm.probes["a"], make_probe()) and same_weights(lm.probes["b"], make_probe(seed=1))
        assert not [request for request in hub.requests if "org/tiny" in request[1] and "next" in request[1]]

    def test_of_the_backbone(self, hub, head):
        backbone = plain(hub)
        hub.plant(backbone, hub.files(backbone), branch="frozen")
        lm = AutoModel.from_pretrained(backbone, revision="frozen", probe=head)
        assert same_weights(lm.probes["mood"], make_probe())
        assert not [request for request in hub.requests if REPO in request[1] and "frozen" in request[1]]


def test_secrets_are_hidden():
    assert hide_secrets("a secret! hf_abcdefghijk api_org_abcdefghijk", "secret!") == "a *** *** ***"
    assert "secret" not in repr(HubOptions(token="secret!")) and HubOptions(token="secret!").token == "secret!"
