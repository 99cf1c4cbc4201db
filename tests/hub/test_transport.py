"""Heads on a Hub, fetched: the real client against a server on loopback."""

import time
from dataclasses import replace

import pytest
from conftest import make_probe
from hub_server.heads import plain, plant_model, same_weights
from huggingface_hub import constants
from transformers import AutoModel

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.hub.folder import CONFIG_NAME, WEIGHTS_NAME
from llama_probe.hub.transport import HubOptions, HubReference, download_head, reason


REPO = "alice/mood"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("user/repo", HubReference("user/repo")),
        ("user/repo:a/b", HubReference("user/repo", None, "a/b")),
        ("user/re.po@refs/pr/1:toxic-mha", HubReference("user/re.po", "refs/pr/1", "toxic-mha")),
        *dict.fromkeys(["alias", "./a/b", "/a/b", "a/b/c", "a/b@", "a/b:", "a b/c", "../x"]).items(),
    ],
)
def test_references(text, expected):
    assert HubReference.parse(text) == expected and (expected is None or str(expected) == text)


@pytest.mark.parametrize("text", ["a/b:../c", "a/b:/etc", "a/b:c/../../d", "a/b:c\\d", "a/b:c//d"])
def test_references_that_lead_outside(text):
    with pytest.raises(ProbeError, match="relative path inside"):
        HubReference.parse(text)


class TestPull:
    @pytest.fixture
    def head(self, hub):
        plant_model(hub, REPO, make_probe())
        return REPO

    def test_a_new_commit_is_seen_and_an_old_one_stays(self, hub, head):
        old = hub.head(head)
        plant_model(hub, head, make_probe(seed=1))
        assert same_weights(ProbeModel.from_pretrained(head), make_probe(seed=1))
        assert same_weights(ProbeModel.from_pretrained(f"{head}@{old}"), make_probe())
        for revision, requests in ((None, 1), (old, 0)):  # once it is cached
            hub.requests.clear()
            download_head(HubReference(head, revision))
            assert len(hub.requests) == requests, hub.requests

    def test_a_config_comes_without_its_weights(self, hub, head):
        config = ProbeConfig.from_pretrained(head)
        assert {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path} == {CONFIG_NAME}
        assert config == ProbeModel.from_pretrained(head).config
        with pytest.raises(ProbeError, match="nowhere"):
            ProbeConfig.from_pretrained(head, revision="nowhere")

    def test_offline_after_one_pull(self, hub, head, tmp_path, monkeypatch):
        options = HubOptions(cache_dir=tmp_path / "own")
        with pytest.raises(ProbeError, match="cached snapshot"):
            download_head(HubReference(head), replace(options, local_files_only=True))
        download_head(HubReference(head), options)
        hub.requests.clear()
        download_head(HubReference(head), replace(options, local_files_only=True))
        with hub.down():
            download_head(HubReference(head), options)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
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

    def test_a_damaged_head_is_refused_until_it_is_fetched_again(self, hub, head):
        hub.fault("wrong sha", path=WEIGHTS_NAME)
        for _ in range(2):
            with pytest.raises(ProbeError, match=f"{WEIGHTS_NAME}.*force_download"):
                ProbeModel.from_pretrained(head)
        assert same_weights(ProbeModel.from_pretrained(head, force_download=True), make_probe())

    @pytest.mark.parametrize(
        "kind, options, words",
        [
            ("answer", {"status": 403, "code": "GatedRepo"}, "gated"),
            ("answer", {"status": 429}, "429"),
            ("answer", {"status": 500}, "500"),
            ("truncate", {"declared": False}, ""),
            ("run", {"method": "GET", "action": lambda: time.sleep(1)}, ""),
        ],
    )
    def test_a_hub_that_refuses_breaks_off_or_is_slow(self, hub, head, kind, options, words, monkeypatch):
        injected = hub.fault(kind, path=WEIGHTS_NAME, times=None, **options)
        with monkeypatch.context() as patch, pytest.raises(ProbeError, match=f"cannot be fetched.*{words}"):
            patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
            ProbeModel.from_pretrained(head)
        hub.faults.clear()
        assert injected.hits and same_weights(ProbeModel.from_pretrained(head), make_probe()), "no part was kept"


def test_the_revisions_of_head_and_backbone_are_told_apart(hub):
    plant_model(hub, REPO, make_probe())
    plant_model(hub, REPO, make_probe(seed=1), branch="next")
    hub.plant(backbone := plain(hub), hub.files(backbone), branch="frozen")
    heads = {"a": f"{REPO}@main", "b": f"{REPO}@next"}
    lm = AutoModel.from_pretrained(backbone, revision="frozen", probe=heads)
    assert same_weights(lm.probes["a"], make_probe()) and same_weights(lm.probes["b"], make_probe(seed=1))
    lm = AutoModel.from_pretrained(backbone, revision="frozen", probe=REPO)
    assert same_weights(lm.probes["mood"], make_probe())
    wrong = {REPO: "frozen", backbone: "next"}
    assert not [path for _, path, _ in hub.requests for repo, name in wrong.items() if repo in path and name in path]


def test_secrets_are_hidden():
    assert reason(OSError("a secret! hf_abcdefghijk api_org_abcdefghijk"), "secret!") == "a *** *** ***"
    assert "secret" not in repr(HubOptions(token="secret!")) and HubOptions(token="secret!").token == "secret!"
