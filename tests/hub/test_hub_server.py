"""The tests' own Hub, proven with the real client: what it takes, and what it gives."""

import json

import pytest
import torch
from conftest import make_lm, make_probe, read_head, save_head
from hub_server.steps import FILES, REPO, WEIGHTS, add, failed_with, push, read, refused_upload, sha256
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    hf_hub_download,
    list_repo_files,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llama_probe.hub.folder import CONFIG_NAME, WEIGHTS_NAME


@pytest.fixture
def api(hub):
    """The client of alice, who may write."""
    return HfApi(endpoint=hub.url, token=hub.add_user("alice"))


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
