"""The tests' own Hub, proven with the real client: what it takes, what it gives, what it refuses, and how it fails."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.utils.hub
from conftest import make_lm, make_probe
from hub_server import HubServer, fixture
from hub_server.client import LIBRARIES, changed_constants, point_client_at
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    hf_api,
    hf_hub_download,
    list_repo_files,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import httpx
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from llama_probe.files import CONFIG_NAME, WEIGHTS_NAME, read_head, save_head


hub = fixture.hub

REPO = "alice/head"
WEIGHTS = save({"weight": torch.arange(6.0)})
FILES = {"config.json": b'{"a": 1}', "sub/notes.txt": b"notes", "model.safetensors": WEIGHTS}


@pytest.fixture
def api(hub):
    """The client of alice, who may write."""
    return HfApi(endpoint=hub.url, token=hub.add_user("alice"))


def add(files):
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def push(api, files=FILES, **options):
    return api.create_commit(REPO, add(files), commit_message="Push", **options)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def read(path):
    return Path(path).read_bytes()


def failed_with(status):
    return pytest.raises(HfHubHTTPError, check=lambda error: error.response.status_code == status)


def refused_upload():
    """The client's plain RuntimeError around whatever went wrong with one file."""
    return pytest.raises(RuntimeError, match="Error while uploading '")


# What goes in comes out.


def test_a_push_comes_back_bit_by_bit(hub, api, tmp_path):
    assert api.create_repo(REPO).repo_id == REPO
    commit = push(api)
    assert commit.oid == hub.head(REPO) and commit.commit_url == f"{hub.url}/{REPO}/commit/{commit.oid}"
    assert list_repo_files(REPO) == [".gitattributes", *sorted(FILES)]
    for path, data in FILES.items():
        local = hf_hub_download(REPO, path, endpoint=hub.url, cache_dir=tmp_path)
        assert read(local) == data and commit.oid in local
    assert hf_hub_download(REPO, "config.json").startswith(constants.HF_HUB_CACHE)
    assert [repo.repo_id for repo in scan_cache_dir().repos] == [REPO]
    folder = snapshot_download(REPO, allow_patterns="*.safetensors", local_dir=tmp_path / "local")
    assert load_file(f"{folder}/model.safetensors")["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert api.repo_exists(REPO) and not api.repo_exists("alice/other")
    assert api.file_exists(REPO, "sub/notes.txt") and not api.file_exists(REPO, "notes.txt")


def test_plain_calls_of_a_head_and_of_transformers(hub, api, tmp_path):
    lm, probe = make_lm(), make_probe()
    lm.save_pretrained(tmp_path / "both")
    save_head(probe, tmp_path / "both")
    api.create_repo("alice/both", private=True)
    api.upload_folder(repo_id="alice/both", folder_path=tmp_path / "both")
    token = api.token
    back = AutoModelForCausalLM.from_pretrained("alice/both", token=token)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in lm.state_dict().items())
    head = read_head(snapshot_download("alice/both", allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], token=token))
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in probe.state_dict().items())
    # transformers looks main up by itself, and then asks for files of that commit.
    lookup = ("GET", "/api/models/alice/both/revision/main", 200)
    for revision, requests in [("main", [lookup]), (hub.head("alice/both"), [])]:
        hub.clear_requests()
        AutoModelForCausalLM.from_pretrained("alice/both", token=token, revision=revision)
        assert hub.requests == requests
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("alice/both")


@pytest.mark.parametrize("size, parts", [(1000, 1), (1001, 2), (3000, 3)])
def test_large_objects_go_up_in_parts(hub, api, size, parts):
    hub.lfs_bytes, hub.part_bytes, data = 500, 1000, bytes(i % 251 for i in range(size))
    api.create_repo(REPO)
    push(api, {"data.bin": data})
    assert hub.files(REPO)["data.bin"] == data
    assert hub.count("PUT", "/cdn/") == parts and hub.count("POST", "/complete") == (parts > 1)
    (entry,) = api.get_paths_info(REPO, "data.bin")
    assert entry.lfs.size == entry.size == size and entry.lfs.sha256 == sha256(data)


def test_ranges(hub, api):
    hub.plant(REPO, FILES)
    metadata = api.parse_safetensors_file_metadata(REPO, "model.safetensors")
    assert metadata.tensors["weight"].shape == [6]
    for url in (f"{hub.url}/{REPO}/resolve/main/model.safetensors", f"{hub.url}/{REPO}/resolve/main/config.json"):
        whole = get_session().get(url).content
        for asked, status, part in [
            ("bytes=2-4", 206, whole[2:5]),
            ("bytes=3-", 206, whole[3:]),
            ("bytes=-3", 206, whole[-3:]),
            ("bytes=2-999999", 206, whole[2:]),
            ("bytes=999999-", 416, None),
        ]:
            answer = get_session().get(url, headers={"Range": asked})
            assert answer.status_code == status and part in (None, answer.content)


def test_the_model_page(hub, api):
    card = b"---\nlicense: mit\ntags: [llama-probe]\nbase_model: a/b\nreleased: 2024-05-01\n---\n# Head\n"
    hub.plant(REPO, {**FILES, "README.md": card})
    hub.plant("alice/hidden", {"README.md": card}, private=True)
    hub.plant("bob/other", {"model.safetensors": WEIGHTS})
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.sha, info.private, info.author) == (REPO, hub.head(REPO), False, "alice")
    assert info.tags == ["llama-probe", "license:mit", "base_model:a/b", "safetensors"]
    assert info.card_data.base_model == "a/b" and info.card_data.released == "2024-05-01"
    sizes = {file.rfilename: file.size for file in info.siblings}
    assert sizes == {path: len(data) for path, data in {**FILES, "README.md": card}.items()}
    assert info.last_modified.tzinfo is not None
    assert api.model_info(REPO, expand=["tags"]).sha is None

    def found(client=api, **query):
        return sorted(model.id for model in client.list_models(**query))

    assert found() == ["alice/head", "alice/hidden", "bob/other"]
    assert found(HfApi()) == ["alice/head", "bob/other"]
    assert found(author="bob") == found(search="OTHER") == ["bob/other"]
    assert found(filter="llama-probe") == ["alice/head", "alice/hidden"]
    assert found(filter=["llama-probe", "safetensors"]) == ["alice/head"]
    assert len(found(limit=1)) == 1
    assert next(api.list_models(author="bob", full=True)).siblings[0].rfilename == "model.safetensors"


def test_trees(hub, api):
    hub.plant(REPO, {"a.txt": b"1", "x/b.txt": b"22", "x/y/c.safetensors": WEIGHTS})
    assert [entry.path for entry in api.list_repo_tree(REPO)] == ["a.txt", "x"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "x")] == ["x/b.txt", "x/y"]
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert list(entries) == ["a.txt", "x", "x/b.txt", "x/y", "x/y/c.safetensors"]
    assert entries["a.txt"].blob_id == "56a6051ca2b02b04ef92d5150c9ef600403cb1de" and entries["a.txt"].lfs is None
    assert entries["x/y/c.safetensors"].lfs.size == len(WEIGHTS)
    assert [entry.path for entry in api.get_paths_info(REPO, ["x", "a.txt", "z"])] == ["x", "a.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "z"))


# Commits.


def test_one_commit_of_several_operations(hub, api):
    before = hub.plant(REPO, {**FILES, "old/a": b"1", "old/b": b"2"})
    operations = [
        *add({"config.json": b"{}", "new.txt": b"new"}),
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationCopy("sub/notes.txt", "copy.txt"),
        CommitOperationDelete("sub/notes.txt"),
        CommitOperationDelete("old/"),
    ]
    commit = api.create_commit(REPO, operations, commit_message="Title", commit_description="Text")
    assert hub.files(REPO) == {
        "config.json": b"{}",
        "new.txt": b"new",
        "model.safetensors": WEIGHTS,
        "copy.safetensors": WEIGHTS,
        "copy.txt": b"notes",
    }
    newest, older, *_ = api.list_repo_commits(REPO)
    assert (newest.commit_id, newest.title, newest.message, newest.authors) == (commit.oid, "Title", "Text", ["alice"])
    assert older.commit_id == before and len(hub.files(REPO, before)) == 5


@pytest.mark.parametrize(
    "operations, status",
    [
        ([*add({"new.txt": b"1"}), CommitOperationDelete("missing.txt")], 404),
        ([*add({"new.txt": b"1"}), CommitOperationDelete("missing/")], 404),
        (add({"new.txt": b"1", "config.json/x": b"2"}), 400),
        (add({"new.txt": b"1", "a\\b": b"2"}), 400),
        (add({"new.txt": b"1", "a//b": b"2"}), 400),
    ],
)
def test_a_commit_that_fails_changes_nothing(hub, api, operations, status):
    head = hub.plant(REPO, FILES)
    with failed_with(status):
        api.create_commit(REPO, operations, commit_message="Bad")
    assert hub.head(REPO) == head and list(hub.repositories[REPO].commits)[-1] == head


def commit_lines(api, *lines, summary="x"):
    """Sends lines of a commit that the client itself would not send."""
    lines = [{"key": "header", "value": {"summary": summary}}, *({"key": key, "value": value} for key, value in lines)]
    return get_session().post(
        f"{api.endpoint}/api/models/{REPO}/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": f"Bearer {api.token}"},
    )


BAD_PATHS = [
    "../evil.txt",
    "a/../../evil.txt",
    "/etc/evil",
    ".git/config",
    "a/.GIT/hooks",
    "",
    ".",
    "a/./b",
    "a\0",
    None,
]


@pytest.mark.parametrize("path", BAD_PATHS)
@pytest.mark.parametrize("kind", ["file", "lfsFile"])
def test_bad_paths(hub, api, path, kind):
    head = hub.plant(REPO, FILES)
    value = {"file": {"content": "", "encoding": "base64"}, "lfsFile": {"algo": "sha256", "oid": sha256(WEIGHTS)}}[
        kind
    ]
    answer = commit_lines(api, (kind, {**value, "path": path}))
    assert (answer.status_code, hub.head(REPO)) == (400, head) and "Invalid path" in answer.json()["error"]


def test_bad_lines(hub, api):
    head = hub.plant(REPO, FILES)
    pointer = {"path": "new.safetensors", "algo": "sha256", "oid": sha256(WEIGHTS), "size": len(WEIGHTS)}
    for line, words in [
        (("file", {"path": "new.txt", "content": "?", "encoding": "base64"}), "is not base64"),
        (("lfsFile", {**pointer, "size": 1}), "was not uploaded"),
        (("lfsFile", {**pointer, "algo": "md5"}), "was not uploaded"),
        (("lfsFile", {**pointer, "oid": "0" * 64}), "was not uploaded"),
        (("chmod", {"path": "config.json"}), "Unknown operation"),
    ]:
        answer = commit_lines(api, line)
        assert answer.status_code == 400 and words in answer.json()["error"]
    assert "has a summary" in commit_lines(api, summary="").json()["error"]
    assert hub.head(REPO) == head
    # The same tree again is no commit, and the good pointer is one.
    same = commit_lines(api, ("lfsFile", {**pointer, "path": "model.safetensors"}))
    assert (same.status_code, same.json()["commitOid"]) == (200, head) == (200, hub.head(REPO))
    assert commit_lines(api, ("lfsFile", pointer)).json()["commitOid"] == hub.head(REPO) != head


def test_an_object_that_was_never_uploaded(hub, api, monkeypatch):
    head = hub.plant(REPO, {"config.json": b"{}"})
    monkeypatch.setattr("huggingface_hub._commit_api._upload_files", lambda **options: None)
    with pytest.raises(HfHubHTTPError, match="points at an LFS object that was not uploaded"):
        push(api)
    assert hub.head(REPO) == head


def test_uploaded_bytes_must_have_their_sha(hub, api, monkeypatch):
    hub.plant(REPO, {})
    operation = CommitOperationAdd("model.safetensors", WEIGHTS)
    operation.upload_info.sha256 = bytes(32)
    with refused_upload() as caught:
        api.create_commit(REPO, [operation], commit_message="Bad")
    assert "do not have the declared sha256" in str(caught.value.__cause__)
    assert not hub.repositories[REPO].objects


def test_a_push_of_the_same_files_makes_no_commit(hub, api):
    api.create_repo(REPO)
    first = push(api).oid
    hub.clear_requests()
    assert push(api).oid == first == hub.head(REPO)
    assert hub.count("PUT") == hub.count("POST", "/commit/") == 0
    assert len(hub.repositories[REPO].commits) == 2
    push(api, {**FILES, "copy.safetensors": WEIGHTS})
    assert hub.count("PUT") == 0 and hub.count("POST", "/commit/") == 1


def test_a_stale_parent(hub, api):
    stale, head = hub.plant(REPO, FILES), hub.plant(REPO, {"config.json": b"{}"})
    with failed_with(412):
        push(api, {"new.txt": b"new"}, parent_commit=stale)
    assert hub.head(REPO) == head
    assert push(api, {"new.txt": b"new"}, parent_commit=head).oid == hub.head(REPO) != head


@pytest.mark.parametrize(
    "readme, words", [("---\na: [\n---\n", "not valid YAML"), ("---\ntags: x\n---\n", '"tags" must be')]
)
def test_cards_are_checked(hub, api, readme, words):
    head = hub.plant(REPO, {})
    with pytest.raises(ValueError, match=words):
        push(api, {"README.md": readme.encode()})
    assert hub.head(REPO) == head
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push(api, {"README.md": b"# No metadata"})


# Revisions.


def test_branches_and_tags(hub, api, tmp_path):
    first = hub.plant(REPO, FILES)
    api.create_branch(REPO, branch="feat/x")
    api.create_tag(REPO, tag="v1.0")
    second = push(api, {"config.json": b"{}"}, revision="feat/x").oid
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "feat/x": second}
    assert [(tag.ref, tag.target_commit) for tag in refs.tags] == [("refs/tags/v1.0", first)]
    assert hub.files(REPO)["config.json"] == FILES["config.json"]
    for revision, data in [("main", b'{"a": 1}'), ("v1.0", b'{"a": 1}'), ("feat/x", b"{}"), (second, b"{}")]:
        local = hf_hub_download(REPO, "config.json", revision=revision, endpoint=hub.url, cache_dir=tmp_path)
        assert read(local) == data
        assert api.model_info(REPO, revision=revision).sha == hub.head(REPO, revision)
    for create in (api.create_branch, api.create_tag):
        name = {"branch": "feat/x"} if create == api.create_branch else {"tag": "v1.0"}
        create(REPO, **name, exist_ok=True)
        with failed_with(409):
            create(REPO, **name)
    with failed_with(400):
        push(api, {"config.json": b"[]"}, revision="v1.0")
    api.delete_branch(REPO, branch="feat/x")
    api.delete_tag(REPO, tag="v1.0")
    refs = api.list_repo_refs(REPO)
    assert [ref.name for ref in refs.branches + refs.tags] == ["main"]
    with failed_with(403):
        api.delete_branch(REPO, branch="main")


def test_revisions_that_are_not_there(hub, api):
    hub.plant(REPO, FILES)
    for call in (
        api.model_info,
        api.list_repo_files,
        api.list_repo_commits,
        lambda *args, **options: push(api, **options),
    ):
        with pytest.raises(RevisionNotFoundError):
            call(REPO, revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="0" * 40)
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="nowhere")
    assert not api.revision_exists(REPO, "nowhere")


def test_a_pull_request_leaves_the_branch(hub, api):
    head = hub.plant(REPO, FILES)
    bob = HfApi(token=hub.add_user("bob"))
    commit = bob.create_commit(
        REPO, add({"x.safetensors": WEIGHTS[:-1] + b"\7"}), commit_message="Mine", create_pr=True
    )
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1") and hub.head(REPO) == head
    assert read(hf_hub_download(REPO, "x.safetensors", revision="refs/pr/1"))[-1] == 7
    assert [ref.ref for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    push(api, {"y.txt": b"y"}, revision="refs/pr/1")
    assert set(hub.files(REPO, "refs/pr/1")) == {*FILES, "x.safetensors", "y.txt"} and hub.head(REPO) == head
    assert push(api, {"z.txt": b"z"}, create_pr=True).pr_num == 2
    with failed_with(403):
        bob.create_commit(REPO, add({"x.txt": b"x"}), commit_message="Not mine")
    upload = [UploadInfo.from_bytes(b"12345")]
    (action,), *_ = post_lfs_batch_info(upload, bob.token, "model", REPO, revision=None, endpoint=hub.url)
    assert set(action["actions"]) == {"upload", "verify"}
    with failed_with(403):
        post_lfs_batch_info(upload, bob.token, "model", REPO, revision="main", endpoint=hub.url)


# Who may do what.


def test_repositories_are_made_and_deleted(hub, api):
    url = api.create_repo("named", private=True)
    assert url == f"{hub.url}/alice/named" and api.model_info("alice/named").private
    assert api.create_repo("alice/named", exist_ok=True) == url
    with failed_with(409):
        api.create_repo("alice/named")
    with failed_with(403):
        api.create_repo("bob/named")
    with failed_with(400):
        api.create_repo("alice/named", repo_type="dataset")
    api.update_repo_settings("alice/named", visibility="public")
    assert HfApi().model_info("alice/named").private is False
    with failed_with(403):
        HfApi(token=hub.add_user("bob")).delete_repo("alice/named")
    api.delete_repo("alice/named")
    api.delete_repo("alice/named", missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("alice/named")


@pytest.mark.parametrize(
    "call",
    [
        lambda client, repo_id: client.model_info(repo_id),
        lambda client, repo_id: client.hf_hub_download(repo_id, "config.json"),
        lambda client, repo_id: client.create_commit(repo_id, add(FILES), commit_message="x"),
        lambda client, repo_id: client.delete_repo(repo_id),
    ],
    ids=["info", "download", "commit", "delete"],
)
def test_hidden_and_missing_repositories_look_the_same(hub, api, call):
    hub.plant("alice/hidden", FILES, private=True)
    for client, status in [(HfApi(), 401), (HfApi(token=hub.add_user("bob")), 404)]:
        answers = set()
        for repo_id in ("alice/hidden", "alice/nothing"):
            with pytest.raises(RepositoryNotFoundError) as caught:
                call(client, repo_id)
            answers.add((caught.value.response.status_code, caught.value.server_message))
        assert answers == {(status, "Repository not found")}
    assert read(api.hf_hub_download("alice/hidden", "model.safetensors")) == WEIGHTS


def test_an_id_without_a_namespace(hub):
    for call in (lambda: HfApi().model_info("gpt2"), lambda: hf_hub_download("gpt2", "config.json")):
        with pytest.raises(RepositoryNotFoundError):
            call()


def test_a_wrong_token(hub):
    hub.plant(REPO, FILES)
    for call in (HfApi(token="hf_wrong").model_info, HfApi(token="hf_wrong").list_repo_files):
        with failed_with(401) as caught:
            call(REPO)
        assert not isinstance(caught.value, RepositoryNotFoundError)
        assert caught.value.server_message == "Invalid credentials in Authorization header"


def test_roles(hub, api):
    hub.plant(REPO, FILES, private=True)
    hub.plant("alice/second", FILES, private=True)
    reader = HfApi(token=hub.add_token("alice", role="read"))
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read" and reader.whoami()["name"] == "alice"
    assert reader.hf_hub_download(REPO, "config.json")
    assert reader.create_repo(REPO, exist_ok=True).repo_id == REPO
    for files in ({"new.txt": b"new"}, {"new.safetensors": WEIGHTS}):
        with failed_with(403):
            push(reader, files)
    with failed_with(403):
        push(reader, {"new.txt": b"new"}, create_pr=True)
    fine = HfApi(token=hub.add_token("alice", role="fine", repos=[REPO]))
    assert fine.whoami()["auth"]["accessToken"]["role"] == "fineGrained"
    push(fine, {"new.txt": b"new"})
    with pytest.raises(RepositoryNotFoundError):
        fine.model_info("alice/second")
    with failed_with(403):
        fine.create_repo("alice/third")
    with pytest.raises(ValueError, match="no role 'admin'"):
        hub.add_token("alice", role="admin")
    api.auth_check(REPO, write=True)
    with failed_with(403):
        reader.auth_check(REPO, write=True)


def test_gated_repositories(hub, api):
    hub.plant(REPO, FILES)
    api.update_repo_settings(REPO, gated="manual")
    bob = HfApi(token=hub.add_user("bob"))
    for client, status in [(HfApi(), 401), (bob, 403)]:
        assert client.model_info(REPO).gated == "manual"
        with pytest.raises(GatedRepoError) as caught:
            client.hf_hub_download(REPO, "config.json")
        assert caught.value.response.status_code == status
    assert api.hf_hub_download(REPO, "config.json", cache_dir=constants.HF_HOME + "/alice")
    hub.repositories[REPO].granted.add("bob")
    assert bob.hf_hub_download(REPO, "config.json")


def test_objects_need_a_signed_url_and_no_token(hub, api):
    hub.plant(REPO, FILES, private=True)
    headers = {"Authorization": f"Bearer {api.token}"}
    answer = get_session().head(
        f"{hub.url}/{REPO}/resolve/main/model.safetensors", headers=headers, follow_redirects=False
    )
    location = answer.headers["Location"]
    assert answer.status_code == 302 and location.startswith("http://localhost:")
    assert get_session().get(location).content == WEIGHTS
    assert get_session().get(location.split("?")[0]).status_code == 403
    assert get_session().put(location, content=b"x").status_code == 403
    assert get_session().get(location, headers=headers).text == "a token was sent to the CDN"
    assert get_session().get(location.replace("localhost", "127.0.0.1")).status_code == 400


# Requests.


def test_requests_of_a_pull(hub, api, tmp_path):
    sha = hub.plant(REPO, FILES)

    def pull(path, revision=None):
        hub.clear_requests()
        hf_hub_download(REPO, path, revision=revision, endpoint=hub.url, cache_dir=tmp_path)
        return [(method, status) for method, _, status in hub.requests]

    assert pull("config.json") == [("HEAD", 200), ("GET", 200)]
    assert pull("model.safetensors") == [("HEAD", 302), ("GET", 200)]
    assert pull("model.safetensors") == [("HEAD", 302)]
    assert pull("config.json") == [("HEAD", 200)]
    assert pull("config.json", sha) == []
    hub.plant(REPO, {"config.json": b"{}"})
    assert pull("config.json") == [("HEAD", 200), ("GET", 200)]
    assert pull("config.json", sha) == []
    # That a file is not in a commit is remembered as well, by its commit.
    with pytest.raises(EntryNotFoundError):
        pull("missing.json")
    assert hub.requests == [("HEAD", f"/{REPO}/resolve/main/missing.json", 404)]
    assert list(tmp_path.glob(f"models--alice--head/.no_exist/{hub.head(REPO)}/missing.json"))


def test_requests_of_a_push(hub, api):
    api.create_repo(REPO)
    hub.clear_requests()
    push(api)
    base, lfs = f"/api/models/{REPO}", f"/{REPO}.git/info/lfs"
    assert hub.requests == [
        ("POST", f"{base}/preupload/main", 200),
        ("POST", f"{lfs}/objects/batch", 200),
        ("PUT", f"/cdn/{REPO}/{sha256(WEIGHTS)}", 200),
        ("POST", f"{lfs}/verify", 200),
        ("POST", f"{base}/commit/main", 200),
    ]
    assert hub.count("POST") == 4 and hub.count(path="/cdn/") == 1
    assert not any(api.token in str(request) for request in hub.requests)


# Faults.


def test_an_upload_that_is_cut(hub, api):
    head = hub.plant(REPO, {})
    fault = hub.faults.cut_upload()
    assert push(api).oid == hub.head(REPO) != head
    assert fault.hits == 1 and [status for method, _, status in hub.requests if method == "PUT"] == [None, 200]
    head, fault = hub.head(REPO), hub.faults.cut_upload(times=None)
    with refused_upload() as caught:
        push(api, {"other.safetensors": WEIGHTS + b"\0" * 2**20})
    assert isinstance(caught.value.__cause__, httpx.TransportError)
    assert fault.hits == 6 and hub.head(REPO) == head


def test_a_push_that_is_refused(hub, api):
    head = hub.plant(REPO, {})
    fault = hub.faults.refuse_upload()
    with refused_upload() as caught:
        push(api, {"model.safetensors": WEIGHTS + b"\0" * 2**20})
    assert caught.value.__cause__.response.status_code == 403 and fault.hits == 1 and hub.head(REPO) == head
    for fault, status in [(hub.faults.forbid(), 403), (hub.faults.server_error(path="/commit/"), 500)]:
        with failed_with(status):
            push(api)
        assert fault.hits == 1 and hub.head(REPO) == head
    assert push(api).oid == hub.head(REPO) != head


def test_faults_wait_and_end(hub, api):
    hub.plant(REPO, FILES)
    fault = hub.faults.server_error(503, method="GET", path="/tree/", after=1, times=2)
    assert [len(api.list_repo_files(REPO)) for _ in range(2)] == [3, 3]
    assert [status for _, _, status in hub.requests] == [200, 503, 503, 200] and fault.hits == 2
    hub.faults.server_error(times=None)
    hub.faults.clear()
    assert api.model_info(REPO).sha == hub.head(REPO)


def test_an_answer_that_is_lost(hub, api):
    head = hub.plant(REPO, {})
    fault = hub.faults.cut_answer()
    with pytest.raises(httpx.TransportError):
        push(api)
    assert fault.hits == 1 and hub.head(REPO) != head and hub.files(REPO) == FILES


def test_somebody_else_commits_in_between(hub, api):
    head = hub.plant(REPO, FILES)
    hub.faults.run(lambda: hub.plant(REPO, {"theirs.txt": b"1"}), path="/commit/")
    with failed_with(412):
        push(api, {"mine.txt": b"1"}, parent_commit=head)
    assert "theirs.txt" in hub.files(REPO) and "mine.txt" not in hub.files(REPO)


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_a_file_that_is_cut_short(hub, path):
    hub.plant(REPO, FILES)
    fault = hub.faults.truncate(path=path)
    assert read(hf_hub_download(REPO, path)) == FILES[path] and fault.hits == 1
    fault = hub.faults.truncate(path=path, times=None)
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        hf_hub_download(REPO, path, force_download=True)
    hub.faults.clear()
    fault = hub.faults.truncate(path=path, declared=False)
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, path, force_download=True)
    assert fault.hits == 1


def test_bytes_that_are_not_those_of_the_etag(hub):
    hub.plant(REPO, FILES)
    fault = hub.faults.wrong_sha(path="model.safetensors")
    wrong = load_file(hf_hub_download(REPO, "model.safetensors"))["weight"].tolist()
    assert fault.hits == 1 and wrong[:5] == [0, 1, 2, 3, 4] and wrong[5] != 5
    hub.faults.wrong_sha(b"[1234.5]", path="config.json")
    assert read(hf_hub_download(REPO, "config.json")) == b"[1234.5]"


def test_a_hub_that_is_down(hub):
    hub.plant(REPO, FILES)
    cached, url = hf_hub_download(REPO, "config.json"), hub.url
    with hub.down():
        assert hf_hub_download(REPO, "config.json") == cached
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(REPO, "model.safetensors")
    assert hub.url == url and hf_hub_download(REPO, "model.safetensors")


def test_evil_paths_and_names_can_be_planted(hub, tmp_path):
    hub.plant("alice/evil", {"../../../../evil.txt": b"evil", "good.txt": b"good"})
    hub.plant("alice/<script>", {})
    assert list_repo_files("alice/evil") == ["../../../../evil.txt", "good.txt"]
    assert {model.id for model in HfApi().list_models()} == {"alice/evil", "alice/<script>"}
    with pytest.raises(ValueError, match=r"cannot contain a '\.\.' path segment"):
        snapshot_download("alice/evil")
    assert not list(tmp_path.rglob("evil.txt"))


# The server and the fixture themselves.


def test_an_error_of_the_server_is_not_a_fault(hub):
    hub.plant(REPO, FILES)
    hub.faults.run(lambda: 1 / 0)
    with failed_with(501):
        HfApi().model_info(REPO)
    assert "ZeroDivisionError" in hub.errors.pop() and not hub.errors


def test_reset_forgets_everything(hub, api):
    hub.plant(REPO, FILES)
    hub.faults.forbid()
    api.model_info(REPO)
    hub.reset()
    assert not hub.requests and not hub.faults.faults
    with failed_with(401):
        api.whoami()
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(REPO)


def test_two_servers_at_once(hub):
    with HubServer() as other:
        other.plant(REPO, {"other.txt": b"1"})
        hub.plant(REPO, FILES)
        assert HfApi(endpoint=other.url).list_repo_files(REPO) == ["other.txt"]
        assert HfApi().list_repo_files(REPO) == sorted(FILES)
        url = other.url
    with pytest.raises(httpx.ConnectError):
        HfApi(endpoint=url).model_info(REPO)


def test_a_subprocess_uses_the_environment(hub, tmp_path):
    hub.plant(REPO, FILES, private=True)
    code = f"from huggingface_hub import hf_hub_download as get; print(get({REPO!r}, 'model.safetensors'))"
    env = {**hub.env, "HF_TOKEN": hub.add_user("alice"), "HTTP_PROXY": "http://127.0.0.1:9"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.startswith(hub.env["HF_HOME"]) and read(out.stdout.strip()) == WEIGHTS
    assert [method for method, _, _ in hub.requests] == ["HEAD", "GET"]


def test_the_client_of_this_process_is_pointed_and_set_back(tmp_path, monkeypatch):
    def state():
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES]
        names = changed_constants(HubServer(), tmp_path)
        copies = {
            (module.__name__, name): vars(module)[name] for module in modules for name in names & vars(module).keys()
        }
        endpoints = {HfApi().endpoint, hf_api.api.endpoint, transformers.utils.hub.hf_api().endpoint}
        return copies, dict(os.environ), get_token(), endpoints

    monkeypatch.setenv("HF_TOKEN", "hf_machine")
    before = state()
    with pytest.MonkeyPatch.context() as inner:
        point_client_at(HubServer(), tmp_path, inner)
        copies, environment, *rest = state()
        assert rest == [None, {"http://127.0.0.1:0"}]
        assert not any(copies[place] == value for place, value in before[0].items() if place[1] == "HF_HUB_CACHE")
        assert "HF_TOKEN" not in environment and "HF_HUB_OFFLINE" not in environment
    assert state() == before
    assert before[2:] == ("hf_machine", {constants.ENDPOINT}) and "127.0.0.1" not in constants.ENDPOINT


def test_without_the_fixture_the_client_is_offline(tmp_path):
    assert constants.is_offline_mode()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "config.json", cache_dir=tmp_path)
