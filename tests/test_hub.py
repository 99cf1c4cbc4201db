"""Heads on a Hub: the real client against a server on loopback."""

import json
import os
import struct
import subprocess
import sys
import threading

import pytest
import torch
from conftest import make_lm, make_probe
from transformers import AutoModel

from llama_probe import LlamaForProbedGeneration, ProbeError, ProbeModel
from llama_probe.files import CONFIG_NAME, WEIGHTS_NAME, read_head, save_head
from llama_probe.hub import HubOptions, HubReference, download_head, hide_secrets, list_heads
from llama_probe.publish import pull_head, push_folder


REPO = "alice/mood"


@pytest.fixture
def token(hub, monkeypatch):
    """Alice's write token, logged in."""
    token = hub.add_user("alice")
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.fixture
def model():
    model = LlamaForProbedGeneration.from_causal_lm(make_lm())
    model.add_probe("mood", make_probe(id2label={0: "bad", 1: "good"}, threshold=0.4, temperature=2.0))
    return model


def same_weights(one: ProbeModel, other: ProbeModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def contents(probe: ProbeModel, folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in save_head(probe, folder).iterdir()}


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


@pytest.mark.parametrize(
    "text", ["a/b:../c", "a/b:/etc", "a/b:c/../../d", "a/b:c\\d", "a/b:c//d", "a/b--c:x", "a/.b.."]
)
def test_references_that_lead_outside(text):
    with pytest.raises(ProbeError, match=r"relative path inside|cannot name a repository"):
        HubReference.parse(text)


class TestPush:
    def test_round_trip(self, hub, token, model):
        info = model.push_probe_to_hub(REPO, "mood", private=True, tags=["mine"], license="mit")
        assert hub.repositories[REPO].private and len(hub.repositories[REPO].commits) == 2, (
            "one commit after the first"
        )
        assert set(hub.files(REPO)) >= {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
        assert info.oid == hub.head(REPO)
        back = ProbeModel.from_pretrained(REPO)
        assert same_weights(back, model.probes["mood"])
        assert back.config.id2label == {0: "bad", 1: "good"} and back.config.temperature == 2.0
        assert model.load_probe(REPO, "again") == "again" and model.load_probe(REPO, token=token, name="b") == "b"
        card = hub.files(REPO)["README.md"].decode()
        assert (
            f'probe="{REPO}"' in card
            and 'probe_labels["mood"]' in card
            and "license: mit" in card
            and "- mine" in card
        )

    def test_a_head_by_itself(self, hub, token):
        probe = make_probe()
        probe.push_to_hub(REPO, commit_message="first", license="mit")
        assert same_weights(ProbeModel.from_pretrained(REPO), probe)

    def test_several_heads_in_one_repository(self, hub, token, model):
        model.add_probe("topic", make_probe(seed=1, num_labels=3))
        for name in ("mood", "topic"):
            model.push_probe_to_hub(REPO, name, subfolder=name, license="mit")
        assert list_heads(REPO) == ["mood", "topic"] and "README.md" in hub.files(REPO)
        lm = AutoModel.from_pretrained(plain(hub), probe=[f"{REPO}:mood", f"{REPO}:topic"])
        assert lm.active_probes == ["mood", "topic"] and lm.probes["topic"].config.num_labels == 3
        assert model.load_probe(REPO, "sub", subfolder="topic") == "sub"
        with pytest.raises(ProbeError, match=rf"{REPO} is not a head: .*heads in it: {REPO}:mood, {REPO}:topic"):
            model.load_probe(REPO, "root")

    def test_branches_and_pull_requests(self, hub, token, model):
        model.push_probe_to_hub(REPO, "mood", license="mit")
        main = hub.head(REPO)
        model.add_probe("v2", make_probe(seed=2))
        model.push_probe_to_hub(REPO, "v2", revision="next", license="mit")
        request = model.push_probe_to_hub(REPO, "v2", create_pr=True, license="mit")
        assert hub.head(REPO) == main
        assert same_weights(ProbeModel.from_pretrained(REPO), model.probes["mood"])
        for revision in ("next", request.pr_revision):
            assert same_weights(ProbeModel.from_pretrained(f"{REPO}@{revision}"), model.probes["v2"])
            assert same_weights(ProbeModel.from_pretrained(REPO, revision=revision), model.probes["v2"])

    def test_a_push_that_changes_nothing(self, hub, token, model):
        first = model.push_probe_to_hub(REPO, "mood", license="mit")
        count = len(hub.repositories[REPO].commits)
        hub.clear_requests()
        again = model.push_probe_to_hub(REPO, "mood", license="mit")
        assert again.oid == first.oid and len(hub.repositories[REPO].commits) == count
        assert not hub.count("PUT", "/cdn/")

    def test_what_a_new_version_no_longer_has_goes_away(self, hub, token, model):
        hub.plant(REPO, {"results.json": b"{}", "notes.txt": b"mine"})
        model.push_probe_to_hub(REPO, "mood", license="mit")
        assert "results.json" not in hub.files(REPO) and "notes.txt" in hub.files(REPO)

    @pytest.mark.parametrize("fault", ["refuse_upload", "cut_upload", "forbid", "server_error"])
    def test_an_interrupted_push_leaves_the_branch_where_it_was(self, hub, token, model, fault):
        model.push_probe_to_hub(REPO, "mood", license="mit")
        before, files = hub.head(REPO), hub.files(REPO)
        model.add_probe("other", make_probe(seed=3))
        arguments = {"server_error": {"status": 500, "path": "/commit/"}}.get(fault, {})
        injected = getattr(hub.faults, fault)(times=None, **arguments)
        with pytest.raises(ProbeError) as raised:
            model.push_probe_to_hub(REPO, "other", license="mit")
        assert injected.hits and token not in str(raised.value)
        assert hub.head(REPO) == before and hub.files(REPO) == files
        assert same_weights(ProbeModel.from_pretrained(REPO), model.probes["mood"])

    def test_two_at_once(self, hub, token, model):
        model.push_probe_to_hub(REPO, "mood", license="mit")
        hub.faults.run(lambda: hub.plant(REPO, {"theirs.txt": b"x"}), path="/commit/")
        model.add_probe("other", make_probe(seed=3))
        with pytest.raises(ProbeError, match=r"somebody else pushed .* push again"):
            model.push_probe_to_hub(REPO, "other", license="mit")
        assert same_weights(ProbeModel.from_pretrained(REPO), model.probes["mood"]) and "theirs.txt" in hub.files(REPO)
        model.push_probe_to_hub(REPO, "other", license="mit")
        assert same_weights(ProbeModel.from_pretrained(REPO), model.probes["other"]) and "theirs.txt" in hub.files(
            REPO
        )

    def test_two_threads_at_once(self, hub, token, tmp_path):
        folders = [save_head(make_probe(seed=seed), tmp_path / "mood") for seed in [0]]
        folders.append(save_head(make_probe(seed=1), tmp_path / "two" / "mood"))
        make_probe(seed=5).push_to_hub(REPO, license="mit")
        outcomes = []

        def push(folder):
            try:
                outcomes.append(push_folder(folder, REPO, license="mit").oid)
            except ProbeError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=push, args=(folder,)) for folder in folders]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        read_head(download_head(HubReference(REPO)))  # weights and config are of one push
        assert all(len(outcome) == 40 or "somebody else pushed" in outcome for outcome in outcomes)
        assert hub.head(REPO) in outcomes

    @pytest.mark.parametrize(
        "role, words",
        [("read", "may not write .* role 'write'"), ("wrong", "does not know this token"), ("bob", "may not write")],
    )
    def test_tokens_that_may_not(self, hub, token, model, role, words):
        model.push_probe_to_hub(REPO, "mood", license="mit")
        used = {"read": lambda: hub.add_token("alice", role="read"), "wrong": lambda: "hf_" + "x" * 34}.get(
            role, lambda: hub.add_user("bob")
        )()
        with pytest.raises(ProbeError, match=words) as raised:
            model.push_probe_to_hub(REPO, "mood", token=used, license="apache-2.0")
        assert used not in str(raised.value) and token not in str(raised.value)

    def test_no_licence_is_warned_of(self, hub, token, model, caplog):
        model.push_probe_to_hub(REPO, "mood")
        assert "states no licence" in caplog.text and REPO in hub.repositories

    @pytest.mark.parametrize(
        "arguments", [{"repo_id": "a/b/c"}, {"repo_id": REPO, "subfolder": "../x"}, {"repo_id": "a b"}]
    )
    def test_wrong_names_ask_nobody(self, hub, token, model, arguments):
        with pytest.raises(ProbeError, match=r"not allowed|relative path|cannot name"):
            model.push_probe_to_hub(name="mood", **arguments)
        assert not hub.requests

    def test_a_name_without_a_user_is_the_own_users(self, hub, token, model):
        model.push_probe_to_hub("mood", license="mit")
        assert 'probe="alice/mood"' in hub.files(REPO)["README.md"].decode()

    def test_a_folder(self, hub, token, tmp_path):
        folder = save_head(make_probe(), tmp_path / "mood")
        (folder / "secret.txt").write_text("not of the head")
        (folder / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
        push_folder(folder, REPO, subfolder="a")
        assert hub.files(REPO)["a/README.md"].decode().endswith("My own words.\n")
        push_folder(folder, REPO, subfolder="a", license="apache-2.0", tags=["b"])
        card = hub.files(REPO)["a/README.md"].decode()
        assert card.endswith("My own words.\n") and "license: apache-2.0" in card and "- b" in card
        assert not any("secret" in name for name in hub.files(REPO))
        (folder / WEIGHTS_NAME).write_bytes(b"no")
        hub.clear_requests()
        with pytest.raises(ProbeError, match=r"damaged"):
            push_folder(folder, REPO)
        assert not hub.requests


def plain(hub) -> str:
    """A backbone on the Hub."""
    if "org/tiny" not in hub.repositories:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            make_lm().save_pretrained(folder)
            hub.plant("org/tiny", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    return "org/tiny"


class TestPull:
    @pytest.fixture
    def head(self, hub, tmp_path):
        hub.plant(REPO, contents(make_probe(), tmp_path / "planted"))
        return REPO

    def test_requests_of_a_warm_pull(self, hub, head):
        download_head(HubReference(head))
        for reference, expected in ((HubReference(head), 1), (HubReference(head, hub.head(head)), 0)):
            hub.clear_requests()
            download_head(reference)
            assert len(hub.requests) == expected, hub.requests

    def test_a_new_commit_is_seen_and_an_old_one_stays(self, hub, head, tmp_path):
        old = hub.head(head)
        hub.plant(head, contents(make_probe(seed=1), tmp_path / "new"))
        assert same_weights(ProbeModel.from_pretrained(head), make_probe(seed=1))
        assert same_weights(ProbeModel.from_pretrained(f"{head}@{old}"), make_probe())

    @pytest.mark.parametrize("how", ["down", "local_files_only", "HF_HUB_OFFLINE"])
    def test_offline_after_one_pull(self, hub, head, how, tmp_path):
        cold = {**hub.env, "HF_HOME": str(tmp_path / "cold")}
        options = HubOptions(local_files_only=how == "local_files_only")
        if how == "HF_HUB_OFFLINE":
            code = f"from llama_probe import ProbeModel; ProbeModel.from_pretrained({head!r})"
            subprocess.run([sys.executable, "-c", code], env={**os.environ, **hub.env}, check=True)
            hub.clear_requests()
            environment = {**os.environ, **hub.env, "HF_HUB_OFFLINE": "1"}
            subprocess.run([sys.executable, "-c", code], env=environment, check=True)
            failed = subprocess.run(
                [sys.executable, "-c", code],
                env={**environment, **cold, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
            )
            assert "not in the cache" in failed.stderr and not hub.requests
            return
        with pytest.raises(ProbeError, match=r"not in the cache"):
            download_head(HubReference(head), HubOptions(local_files_only=True))
        download_head(HubReference(head))
        hub.clear_requests()
        if how == "down":
            with hub.down():
                download_head(HubReference(head), options)
        else:
            download_head(HubReference(head), options)
        assert not hub.requests

    def test_cache_dir_and_endpoint(self, hub, head, tmp_path):
        ProbeModel.from_pretrained(head, cache_dir=tmp_path / "own")
        assert (tmp_path / "own" / "models--alice--mood").is_dir()
        with pytest.raises(ProbeError, match=r"not in the cache"):
            ProbeModel.from_pretrained(head, local_files_only=True)

    def test_private(self, hub, token, head, monkeypatch):
        hub.repositories[head].private = True
        assert ProbeModel.from_pretrained(head)
        wrong, bob = "hf_" + "y" * 34, hub.add_user("bob")
        monkeypatch.delenv("HF_TOKEN")
        for used in (None, False, wrong, bob):
            with pytest.raises(
                ProbeError, match=r"does not exist on the Hub, or is private|could not be fetched"
            ) as raised:
                ProbeModel.from_pretrained(head, token=used, force_download=True)
            assert wrong not in str(raised.value) and bob not in str(raised.value)
        assert ProbeModel.from_pretrained(head, token=token, force_download=True)

    @pytest.mark.parametrize(
        "source, words",
        [
            ("alice/nothing", "does not exist on the Hub"),
            (f"{REPO}@v9", "has no revision 'v9'"),
            (f"{REPO}:other", f"is not a head: it has no probe_config.json; heads in it: {REPO}"),
            ("alice/text", "is not a head: it has no probe_config.json$"),
            ("alice/half", "has no probe_model.safetensors"),
        ],
    )
    def test_what_is_not_there(self, hub, head, source, words):
        hub.plant("alice/text", {"notes.txt": b"hello"})
        hub.plant("alice/half", {CONFIG_NAME: hub.files(head)[CONFIG_NAME]})
        with pytest.raises(ProbeError, match=words):
            ProbeModel.from_pretrained(source)

    def test_a_truncated_download(self, hub, head):
        hub.faults.truncate(path=WEIGHTS_NAME, times=None, declared=False)
        with pytest.raises(ProbeError, match=r"could not be fetched"):
            ProbeModel.from_pretrained(head)
        hub.faults.clear()
        assert ProbeModel.from_pretrained(head), "nothing damaged was kept"

    def test_other_bytes_than_announced(self, hub, head):
        fault = hub.faults.wrong_sha(path=WEIGHTS_NAME)
        with pytest.raises(ProbeError, match=r"does not belong to"):
            ProbeModel.from_pretrained(head)
        assert fault.hits == 1

    def test_the_weights_of_another_head(self, hub, head, tmp_path):
        other = contents(make_probe(seed=7), tmp_path / "other")
        hub.plant(head, {WEIGHTS_NAME: other[WEIGHTS_NAME]})
        with pytest.raises(ProbeError, match=r"does not belong to the probe_config.json beside it"):
            ProbeModel.from_pretrained(head)

    def test_a_large_tensor_declared_in_a_small_file(self, hub, head):
        config = json.loads(hub.files(head)[CONFIG_NAME])
        header = {
            name: {"dtype": "F32", "shape": [75_000_000], "data_offsets": [0, 300_000_000]}
            for name in ["classifier.weight"]
        }
        text = json.dumps(header).encode()
        hub.plant(head, {WEIGHTS_NAME: struct.pack("<Q", len(text)) + text})
        with pytest.raises(ProbeError, match=r"damaged|does not hold"):
            ProbeModel.from_pretrained(head)
        # and a config that asks for one
        hub.plant(head, {CONFIG_NAME: json.dumps({**config, "hidden_size": 2**20, "weights_sha256": None}).encode()})
        with pytest.raises(ProbeError, match=r"damaged|has the shape|does not hold|cannot be built"):
            ProbeModel.from_pretrained(head)

    def test_paths_that_lead_outside(self, hub, head, tmp_path):
        files = hub.files(head)
        hub.plant(
            head, {f"../../{name}": data for name, data in files.items()} | {"a/../../evil/probe_config.json": b"{}"}
        )
        assert list_heads(head) == [""]
        target = pull_head(head, tmp_path / "in" / "here")
        assert sorted(path.name for path in target.iterdir()) == sorted([CONFIG_NAME, WEIGHTS_NAME])
        assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["here"]

    def test_a_pickle_is_not_read(self, hub, head):
        hub.plant(head, {"probe_model.bin": b"\x80\x04.", "pytorch_model.bin": b"\x80\x04.", WEIGHTS_NAME: None})
        with pytest.raises(ProbeError, match=r"has no probe_model.safetensors"):
            ProbeModel.from_pretrained(head)
        assert not hub.count("GET", ".bin")

    def test_pulling_into_a_folder(self, hub, head, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert pull_head(head).name == "mood"
        assert same_weights(read_head("mood"), make_probe())
        with pytest.raises(ProbeError, match=r"not an empty folder"):
            pull_head(head)
        with pytest.raises(ProbeError, match=r"no Hub id"):
            pull_head("mood")
        with pytest.raises(ProbeError, match=r"does not exist"):
            pull_head("alice/nothing")
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name[0] != "h") == [
            "mood",
            "planted",
        ]


class TestRevisions:
    """A head's revision is never the backbone's, nor the other way round."""

    @pytest.fixture
    def head(self, hub, tmp_path):
        hub.plant(REPO, contents(make_probe(), tmp_path / "one"), branch="main")
        hub.plant(REPO, contents(make_probe(seed=1), tmp_path / "two"), branch="next")
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


class TestAliases:
    @pytest.fixture
    def named(self, hub, monkeypatch, tmp_path):
        """Alice's heads for org/tiny."""
        files = contents(make_probe(seed=4), tmp_path / "planted")
        hub.plant(
            "alice/tiny-probes",
            {f"{alias}/{name}": data for alias in ("mood", "topic") for name, data in files.items()},
        )
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        return tmp_path / "config" / "llama_probe" / "config.json"

    @pytest.mark.parametrize("how", ["argument", "variable", "file"])
    def test_a_namespace(self, hub, named, how, monkeypatch):
        arguments = {}
        if how == "argument":
            arguments = {"probe_namespace": "alice"}
        elif how == "variable":
            monkeypatch.setenv("LLAMA_PROBE_NAMESPACE", "alice")
        else:
            named.parent.mkdir(parents=True)
            named.write_text('{"namespace": "alice"}')
        lm = AutoModel.from_pretrained(plain(hub), probe=["mood", "topic"], **arguments)
        assert lm.active_probes == ["mood", "topic"] and same_weights(lm.probes["mood"], make_probe(seed=4))

    def test_one_alias_is_another_head_on_another_backbone(self, hub, named, monkeypatch, tmp_path):
        monkeypatch.setenv("LLAMA_PROBE_NAMESPACE", "alice")
        folder = tmp_path / "small"
        make_lm(hidden_size=16).save_pretrained(folder)
        files = contents(make_probe(hidden_size=16), tmp_path / "planted-small")
        hub.plant("alice/small-probes", {f"mood/{name}": data for name, data in files.items()})
        assert AutoModel.from_pretrained(folder, probe="mood").probes["mood"].config.hidden_size == 16
        assert AutoModel.from_pretrained(plain(hub), probe="mood").probes["mood"].config.hidden_size == 32

    def test_the_bundled_name_serves_other_backbones_through_the_hub(self, hub, named, monkeypatch, tmp_path):
        files = contents(make_probe(seed=5), tmp_path / "t")
        hub.plant("alice/tiny-probes", {f"toxicchat-mha/{name}": data for name, data in files.items()})
        lm = AutoModel.from_pretrained(plain(hub), probe="toxicchat-mha", probe_namespace="alice")
        assert same_weights(lm.probes["toxicchat-mha"], make_probe(seed=5))

    def test_without_one_the_error_lists_what_exists(self, hub, named):
        with pytest.raises(ProbeError) as raised:
            AutoModel.from_pretrained(plain(hub), probe="weather", probe_namespace="alice")
        message = str(raised.value)
        assert "on the Hub in alice/tiny-probes: mood, topic" in message and "toxicchat-mha (Hugging" in message
        with pytest.raises(ProbeError, match=r"LLAMA_PROBE_NAMESPACE.*user/tiny-probes"):
            AutoModel.from_pretrained(plain(hub), probe="weather")

    def test_a_head_in_the_backbones_own_repository(self, hub, named, tmp_path):
        backbone = plain(hub)
        files = contents(make_probe(seed=6), tmp_path / "own")
        hub.plant(backbone, {f"mine/{name}": data for name, data in files.items()})
        assert same_weights(AutoModel.from_pretrained(backbone, probe="mine").probes["mine"], make_probe(seed=6))

    def test_damaged_settings(self, hub, named):
        named.parent.mkdir(parents=True)
        for text in ("[", '"x"', '{"namespace": "a/b"}', '{"namespace": 3}'):
            named.write_text(text)
            with pytest.raises(ProbeError, match=r"namespace"):
                AutoModel.from_pretrained(plain(hub), probe="mood")


def test_secrets_are_hidden():
    assert hide_secrets("a secret! hf_abcdefghijk", "secret!") == "a *** ***"
