"""Heads pushed to a Hub and pulled back: the real client against a server on loopback."""

import pytest
from conftest import make_lm, make_probe, read_head, save_head
from hub_server.heads import plain, plant_model, same_weights
from huggingface_hub import constants
from transformers import AutoModel

from llama_probe import LlamaForProbedGeneration, ProbeError
from llama_probe.hub.folder import CONFIG_NAME, WEIGHTS_NAME
from llama_probe.hub.publish import pull_head, push_folder
from llama_probe.hub.transport import HubReference, download_head, heads_on_hub


REPO = "alice/mood"
OWN_CARD = "---\nlicense: mit\n---\nMy own words.\n"


@pytest.fixture
def model():
    model = LlamaForProbedGeneration.from_causal_lm(make_lm())
    model.add_probe("mood", make_probe(id2label={0: "bad", 1: "good"}, threshold=0.4, temperature=2.0))
    return model


@pytest.fixture
def pushed(token, model):
    """The model, with the head "mood" pushed, and a head "other" that is not."""
    model.push_probe_to_hub(REPO, "mood", license="mit")
    model.add_probe("other", make_probe(seed=3))
    return model


@pytest.fixture
def folder(tmp_path):
    return save_head(make_probe(), tmp_path / "mood")


class TestPush:
    def test_round_trip(self, hub, token, model):
        info = model.push_probe_to_hub(REPO, "mood", private=True, tags=["mine"], license="mit", subfolder="")
        assert hub.repositories[REPO].private and len(hub.repositories[REPO].commits) == 2, "one after the first"
        assert set(hub.files(REPO)) >= {CONFIG_NAME, WEIGHTS_NAME, "README.md"} and info.oid == hub.head(REPO)
        back = read_head(REPO, subfolder="")  # as transformers spells none
        assert same_weights(back, model.probes["mood"])
        assert back.config.id2label == {0: "bad", 1: "good"} and back.config.temperature == 2.0
        assert model.load_probe(REPO, "again") == "again" and model.load_probe(REPO, token=token, name="b") == "b"
        card = hub.files(REPO)["README.md"].decode()
        assert f'probe="{REPO}"' in card and 'probe_labels["mood"]' in card
        assert "license: mit" in card and "- mine" in card
        again = model.push_probe_to_hub(REPO, "mood", tags=["mine"], license="mit")
        assert again.oid == info.oid and len(hub.repositories[REPO].commits) == 2, "nothing has changed"

    def test_several_heads_in_one_repository(self, hub, token, model):
        model.add_probe("topic", make_probe(seed=1, num_labels=3))
        for name in ("mood", "topic"):
            model.push_probe_to_hub(REPO, name, subfolder=f"{name}/", license="mit")
        assert heads_on_hub(REPO) == ["mood", "topic"] and "README.md" in hub.files(REPO)
        lm = AutoModel.from_pretrained(plain(hub), probe=[f"{REPO}:mood", f"{REPO}:topic"])
        assert lm.active_probes == ["mood", "topic"] and lm.probes["topic"].config.num_labels == 3
        assert model.load_probe(REPO, "sub", subfolder="topic/") == "sub"
        with pytest.raises(ProbeError, match=f"heads in it: {REPO}:mood, {REPO}:topic"):
            model.load_probe(REPO, "root")

    def test_branches_and_pull_requests(self, hub, pushed):
        main = hub.head(REPO)
        for _ in range(2):
            pushed.push_probe_to_hub(REPO, "other", revision="next", license="mit")
        request = pushed.push_probe_to_hub(REPO, "other", create_pr=True, license="mit")
        assert hub.head(REPO) == main and same_weights(read_head(REPO), pushed.probes["mood"])
        for revision in ("next", request.pr_revision):
            for head in (read_head(f"{REPO}@{revision}"), read_head(REPO, revision=revision)):
                assert same_weights(head, pushed.probes["other"])

    def test_what_a_new_version_no_longer_has_goes_away(self, hub, token, model):
        hub.plant(REPO, {"results.json": b"{}", "notes.txt": b"mine"})
        model.push_probe_to_hub(REPO, "mood", license="mit")
        assert "results.json" not in hub.files(REPO) and "notes.txt" in hub.files(REPO)

    @pytest.mark.parametrize(
        "fault, words, head",
        [("cut upload", "not known", "mood"), ("forbid", "nothing was", "mood"), ("lose", "not known", "other")],
    )
    def test_a_failed_push_tells_if_the_branch_may_have_moved(self, hub, token, pushed, fault, words, head):
        before = hub.head(REPO), hub.files(REPO)
        injected = hub.fault(fault, times=None, path="/commit/")
        with pytest.raises(ProbeError, match=words) as raised:
            pushed.push_probe_to_hub(REPO, "other", license="mit")
        assert injected.hits and token not in str(raised.value)
        assert same_weights(read_head(REPO), pushed.probes[head])
        assert head == "other" or before == (hub.head(REPO), hub.files(REPO))

    def test_no_path_of_this_machine_is_pushed(self, hub, token, tmp_path, caplog):
        path = "/home/me/secret plans/lm-1"
        head = make_probe(base_model_name_or_path=path)
        head.results = {"backbone": path, "card": {"command": "--backbone 'secret plans/lm-1'"}}
        folder = save_head(head, tmp_path / "mood")
        (folder / "README.md").write_text(OWN_CARD)
        push_folder(folder, REPO)
        assert f"the backbone '{path}'" in caplog.text
        assert not any(b"secret" in content for content in hub.files(REPO).values())
        assert read_head(REPO).config.base_model_name_or_path == "lm-1"
        assert read_head(folder).config.base_model_name_or_path == path, "the folder is kept"

    def test_two_at_once(self, hub, pushed):
        hub.fault("run", action=lambda: hub.plant(REPO, {"theirs.txt": b"x"}), path="/commit/")
        with pytest.raises(ProbeError, match=r"nothing was uploaded.*A commit has happened since"):
            pushed.push_probe_to_hub(REPO, "other", license="mit")
        assert same_weights(read_head(REPO), pushed.probes["mood"]) and "theirs.txt" in hub.files(REPO)
        pushed.push_probe_to_hub(REPO, "other", license="mit")
        assert same_weights(read_head(REPO), pushed.probes["other"]) and "theirs.txt" in hub.files(REPO)

    def test_tokens_that_may_not(self, hub, token, pushed):
        wrong, bob = "hf_" + "x" * 34, hub.add_user("bob")
        for used, words in ((wrong, "Invalid credentials"), (bob, "no write access")):
            with pytest.raises(ProbeError, match=words) as raised:
                pushed.push_probe_to_hub(REPO, "mood", token=used, license="apache-2.0")
            assert used not in str(raised.value) and token not in str(raised.value)

    @pytest.mark.parametrize(
        "card, arguments, words",
        [
            (b"", {"repo_id": "a/b/c"}, "'a/b/c'"),
            (b"", {"subfolder": "../x"}, "subfolder='../x'"),
            (b"", {"subfolder": "my mood"}, "'alice/mood:my mood'"),
            (b"", {"revision": "a:b"}, "'alice/mood@a:b'"),
            (b"---\na: b: c\n---\n", {}, r"README\.md cannot be read as a card"),
            (b"caf\xe9", {}, r"README\.md cannot be read as a card"),
            (None, {}, r"results\.json"),
            (b"", {"subfolder": ".git"}, r"cannot update files under a '\.git/' folder"),  # by the client
        ],
    )
    def test_what_is_refused_uploads_nothing(self, hub, token, folder, card, arguments, words):
        if card is None:
            (folder / "results.json").write_text('{"of": "another version"}')
        else:
            (folder / "README.md").write_bytes(card)
        with pytest.raises(ProbeError, match=words):
            push_folder(folder, **{"repo_id": REPO, **arguments})
        assert not hub.count("POST", "/preupload/") + hub.count("POST", "/commit/")
        assert not hub.requests or ".git" in arguments.values()

    def test_a_name_without_its_user_and_a_card_without_a_licence(self, hub, token, folder, caplog):
        (folder / "README.md").write_text("My own words.")
        push_folder(folder, "mood", tags="mine")
        assert b"- mine" in hub.files(REPO)["README.md"] and "gives no license" in caplog.text

    def test_a_folder_with_a_card_of_its_own(self, hub, token, folder):
        (folder / "secret.txt").write_text("not of the head")
        (folder / "calibration.png").write_bytes(b"a plot")
        (folder / "README.md").write_text(OWN_CARD, "utf-8-sig")  # as of Windows
        push_folder(folder, REPO, subfolder="a")
        assert hub.files(REPO)["a/README.md"].decode().endswith("My own words.\n")
        push_folder(folder, REPO, subfolder="a", license="apache-2.0", tags=["b"])
        card = hub.files(REPO)["a/README.md"].decode()
        assert card.endswith("My own words.\n") and "license: apache-2.0" in card and "- b" in card
        assert card.count("license:") == 1
        assert not any("secret" in name for name in hub.files(REPO)) and "a/calibration.png" in hub.files(REPO)
        assert (folder / "README.md").read_text("utf-8-sig") == OWN_CARD

    def test_links_out_of_the_folder(self, hub, token, folder, tmp_path):
        """A link in a stranger's folder must not have the user's own files uploaded."""
        (tmp_path / "id_rsa").write_text(OWN_CARD)
        with pytest.raises(ProbeError, match=f"{tmp_path} is not a head"):
            push_folder(tmp_path, REPO)
        folder = folder.rename(tmp_path / "snapshots").resolve()
        for file in ("README.md", "results.json"):
            (folder / file).unlink(missing_ok=True)
            (folder / file).symlink_to("../id_rsa")
            with pytest.raises(ProbeError, match=f"{file} leads out of the folder"):
                push_folder(folder, REPO)
            (folder / file).unlink()
        assert not hub.requests
        (folder / "own").write_text(OWN_CARD)
        (folder / "README.md").symlink_to("own")
        push_folder(folder, REPO)
        assert hub.files(REPO)["README.md"].endswith(b"My own words.\n")

    def test_a_folder_of_the_cache(self, hub, token, tmp_path):
        """Its files are links to blobs of the repository, which may be links to blobs of the whole cache."""
        plant_model(hub, "bob/heads", make_probe(), "a/")
        folder = download_head(HubReference("bob/heads", None, "a"))
        blob = (folder / WEIGHTS_NAME).resolve()
        shared = blob.parents[2] / "blobs" / blob.name
        shared.parent.mkdir()
        blob.rename(shared)
        blob.symlink_to(shared)
        push_folder(folder, REPO)
        assert same_weights(read_head(pull_head(REPO, tmp_path / "pulled")), make_probe())


class TestPullIntoAFolder:
    @pytest.fixture
    def head(self, hub):
        plant_model(hub, REPO, make_probe())
        return REPO

    def test_paths_that_lead_outside(self, hub, head, tmp_path):
        files = hub.files(head)
        evil = {f"../../{name}": data for name, data in files.items()} | {"a/../../evil/probe_config.json": b"{}"}
        hub.plant(head, evil)
        assert heads_on_hub(head) == [""]
        target = pull_head(head, tmp_path / "in" / "here")
        assert {path.name for path in target.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
        assert [path.name for path in (tmp_path / "in").iterdir()] == ["here"]

    def test_a_pulled_head_is_pushed_elsewhere_with_a_card_of_its_new_place(self, hub, token, tmp_path):
        make_probe().push_to_hub(REPO, license="mit", tags=["mine"])
        push_folder(pull_head(REPO, tmp_path / "pulled"), "alice/copy", tags=["copied"])
        card = hub.files("alice/copy")["README.md"].decode()
        assert 'probe="alice/copy"' in card and REPO not in card
        assert "license: mit" in card and "- mine\n- copied" in card

    def test_pulling_into_a_folder(self, hub, head, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert pull_head(head).name == "mood"
        assert same_weights(read_head("mood"), make_probe())
        (tmp_path / "file").touch()
        hub.plant("alice/damaged", hub.files(head) | {WEIGHTS_NAME: b"no"})
        sources = {head: "not an empty", "mood": "not a Hub id", "a/nothing": "fetched", "alice/damaged": "damaged"}
        for source, words in sources.items():
            with pytest.raises(ProbeError, match=words):
                pull_head(source, check=read_head)
        for place in ("file", "file/inside"):
            with pytest.raises(ProbeError, match=r"file (exists|cannot be made)"):
                pull_head(head, place)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mood"]


def test_a_hub_that_is_not_reached(hub, token, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert heads_on_hub(REPO) == []
    for repo_id in (REPO, "mood"):  # without a user, the Hub is asked for the name
        with pytest.raises(ProbeError, match=f"the push to {repo_id} failed, and nothing was uploaded"):
            make_probe().push_to_hub(repo_id, license="mit")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ProbeError, match="HF_HUB_OFFLINE"):
        make_probe().push_to_hub(REPO, license="mit")
