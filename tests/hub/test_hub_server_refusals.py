"""The tests' own Hub, proven with the real client: what it refuses, what it counts, and how it fails."""

import os
import subprocess
import sys

import pytest
import transformers.utils.hub
from hub_server import HubServer
from hub_server.client import LIBRARIES, changed_constants, point_client_at
from hub_server.steps import FILES, REPO, WEIGHTS, add, failed_with, push, read, refused_upload, sha256
from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    get_token,
    hf_api,
    hf_hub_download,
    list_repo_files,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors.torch import load_file


@pytest.fixture
def api(hub):
    """The client of alice, who may write."""
    return HfApi(endpoint=hub.url, token=hub.add_user("alice"))


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
