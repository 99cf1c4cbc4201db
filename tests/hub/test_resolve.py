"""Names of heads: folders, bundled aliases, lists and dicts."""

import json
import math

import pytest
from conftest import make_lm, make_probe, save_head
from hub_server.heads import contents, plain, same_weights
from huggingface_hub.utils import _http
from transformers import AutoModel

from llama_probe import ProbeError
from llama_probe.hub.folder import CONFIG_NAME, WEIGHTS_NAME
from llama_probe.hub.resolve import (
    Target,
    best_head,
    bundled_heads,
    check_name,
    default_name,
    read_heads,
    resolve_head,
)
from llama_probe.hub.transport import HubOptions


def test_bundled_heads_are_readable_and_fit_one_backbone():
    heads = bundled_heads()
    assert {"toxicchat-mha", "toxicchat-gate", "sst2-mha", "emotion-mha"} <= set(heads)
    for alias, folder in heads.items():
        head = read_heads(alias)[alias]
        assert head.config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert (head.config.hidden_size, head.config.num_hidden_layers) == (576, 30)
        assert not any(name.startswith("LABEL_") for name in head.config.id2label.values())
        assert (folder / "README.md").is_file()


def test_a_folder_comes_before_an_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_head("toxicchat-mha") == bundled_heads()["toxicchat-mha"]
    save_head(make_probe(), tmp_path / "toxicchat-mha")
    assert read_heads("toxicchat-mha")["toxicchat-mha"].config.hidden_size == 32


def test_no_name_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch):
    """`--probe "$HEAD"` with nothing in HEAD."""
    save_head(make_probe(), tmp_path)
    monkeypatch.chdir(tmp_path)
    for spec in ("", [""], {"head": ""}):
        with pytest.raises(ProbeError, match="names no head"):
            read_heads(spec)
    assert read_heads({"head": "."})


@pytest.mark.parametrize("file", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("relative", [True, False])
def test_a_file_of_a_head_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, file, relative):
    """`mood/probe_config.json` could be the id of a repository."""
    save_head(make_probe(), tmp_path / "mood")
    monkeypatch.chdir(tmp_path)
    folder = "mood" if relative else str(tmp_path / "mood")
    with pytest.raises(ProbeError, match=rf"is a file: give the head's folder, '{folder}'"):
        read_heads(f"{folder}/{file}")


def test_heads_of_other_backbones_are_listed_by_backbone():
    with pytest.raises(
        ProbeError, match=r"other backbones: beavertails-mha, .*toxicchat-mha.* \(Hug.*=576, num.*=30\)"
    ) as told:
        resolve_head("toxicchat-mha", Target("org/tiny", 32, 4))
    assert str(told.value).count("hidden_size=576") == 1


def test_an_unknown_alias_lists_the_known_ones():
    with pytest.raises(ProbeError, match=r"bundled heads: .*toxicchat-mha"):
        resolve_head("toxicchat-lstm")


def test_one_head_may_serve_under_two_names(tmp_path):
    folder = save_head(make_probe(), tmp_path / "h")
    assert list(read_heads({"a": folder, "b": str(folder)})) == ["a", "b"]
    assert read_heads(None) == {}
    head = make_probe()
    assert read_heads({"mine": head})["mine"] is head


class TestAliasesWithoutAKind:
    """`toxicchat` is the best of `toxicchat-gate`, `toxicchat-mha`, ... by validation."""

    @pytest.fixture
    def heads(self, tmp_path):
        """A function that makes the head folders of a backbone: (alias, kind, validation score, metric)."""

        def make(*rows):
            for alias, kind, score, metric in rows:
                folder = save_head(make_probe(probe_type=kind), tmp_path / alias)
                if score is not None:
                    summary = {
                        "validation": {metric: {"mean": score, "std": 0.0}},
                        "test": {metric: {"mean": 1 - score}},
                    }
                    results = {"recipe": {"metric": metric}, "summary": summary, "num_parameters": 10 + len(kind)}
                    (folder / "results.json").write_text(json.dumps(results))
            return {alias: tmp_path / alias for alias, *_ in rows}

        return make

    def test_the_best_by_validation(self, heads):
        found = heads(
            ("mood-gate", "gate", 0.7, "f1"), ("mood-mha", "mha", 0.8, "f1"), ("other-mha", "mha", 0.9, "f1")
        )
        assert best_head("mood", found).name == "mood-mha"
        assert best_head("other", found).name == "other-mha"
        assert best_head("mo", found) is None and best_head("mood-mha", found) is None

    def test_of_equal_ones_the_smaller(self, heads):
        found = heads(("mood-pooling", "pooling", 0.7, "f1"), ("mood-mha", "mha", 0.7, "f1"))
        assert best_head("mood", found).name == "mood-mha"

    def test_what_cannot_be_compared_is_left_out(self, heads):
        found = heads(
            ("mood-pooling", "pooling", None, ""),
            ("mood-gate", "gate", 0.9, "auprc"),
            ("mood-mha", "mha", 0.6, "f1"),
            ("mood-attentive", "attentive", 0.5, "f1"),
            ("mood-large", "mha", 0.99, "f1"),
        )
        assert best_head("mood", found).name == "mood-mha", "`large` is no kind, and auprc is not f1"
        assert best_head("mood", {"mood-pooling": found["mood-pooling"]}) is None

    @pytest.mark.parametrize("score, parameters", [(math.nan, 1), (math.inf, 1), (0.9, math.inf), (0.9, math.nan)])
    def test_what_is_no_number_is_left_out(self, heads, score, parameters):
        found = heads(("mood-gate", "gate", 0.7, "f1"), ("mood-mha", "mha", score, "f1"))
        path = found["mood-mha"] / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_parameters": parameters}))
        for order in (found, dict(reversed(found.items()))):
            assert best_head("mood", order).name == "mood-gate"

    def test_bundled_ones(self):
        for alias in ("toxicchat", "sst2", "emotion"):
            rivals = {name: folder for name, folder in bundled_heads().items() if name.startswith(f"{alias}-")}
            assert resolve_head(alias) == best_head(alias, rivals)
            assert list(read_heads(alias)) == [alias], "the head is called as it was asked for"

    @pytest.mark.parametrize("alias", ["toxicchat", "toxicchat-mha"])
    def test_bundled_ones_have_no_revisions(self, alias):
        with pytest.raises(ProbeError, match=f"^probe='{alias}' is a bundled head, and has no revisions such as 'v2'"):
            resolve_head(alias, options=HubOptions("v2"))

    def test_beside_the_backbone(self, heads, tmp_path, backbone_folder, monkeypatch):
        heads(("mood-gate", "gate", 0.7, "f1"), ("mood-mha", "mha", 0.6, "f1"))
        make_lm().save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path, probe="mood")
        assert model.probes["mood"].config.probe_type == "gate"
        with pytest.raises(ProbeError, match="; beside the backbone: mood-gate, mood-mha"):
            model.load_probe("weather")


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
        assert "on the Hub in alice/tiny-probes: mood, topic" in message and "toxicchat-multimax (Hugging" in message
        with pytest.raises(ProbeError, match=r"LLAMA_PROBE_NAMESPACE.*user/tiny-probes"):
            AutoModel.from_pretrained(plain(hub), probe="weather")

    def test_a_head_in_the_backbones_own_repository(self, hub, named, tmp_path):
        backbone = plain(hub)
        files = contents(make_probe(seed=6), tmp_path / "own")
        hub.plant(backbone, {f"mine/{name}": data for name, data in files.items()})
        model = AutoModel.from_pretrained(backbone, probe="mine")
        assert same_weights(model.probes["mine"], make_probe(seed=6))
        with pytest.raises(
            ProbeError, match=r"; beside the backbone: mine; .*probe_namespace= \(namespace= of load_probe\)"
        ):
            model.load_probe("weather")

    def test_where_the_hub_is_out_of_reach_it_is_asked_once(self, hub, named, monkeypatch, tmp_path):
        backbone = plain(hub)
        hub.plant(backbone, {f"mine/{name}": data for name, data in contents(make_probe(), tmp_path / "own").items()})
        target = Target(backbone, 32, 3)
        cached = resolve_head("mood", target, namespace="alice")
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: pytest.fail("the client repeats its request"))
        with hub.down():
            assert resolve_head("mood", target, namespace="alice") == cached
            for alias in ("moood", "mine"):
                with pytest.raises(
                    ProbeError, match="the Hub, where org/tiny may have more, was not asked or not reached"
                ):
                    resolve_head(alias, target, namespace="alice")
        assert resolve_head("mine", target, namespace="alice").name == "mine"

    def test_damaged_settings(self, hub, named):
        named.parent.mkdir(parents=True)
        for text in ("[", '"x"', '{"namespace": "a/b"}', '{"namespace": 3}'):
            named.write_text(text)
            with pytest.raises(ProbeError, match=r"namespace"):
                AutoModel.from_pretrained(plain(hub), probe="mood")


@pytest.mark.parametrize(
    "folder, name",
    [
        *[("mood v1.2", "mood-v1-2"), ("größe", "gr-e"), ("感情", "-"), ('"a"', "-a-"), ("a-b_c", "a-b_c")],
        *[("type", "type-head"), ("train", "train-head"), ("training", "training-head"), ("items", "items-head")],
    ],
)
def test_any_folder_has_a_name_that_a_head_may_have(tmp_path, folder, name):
    save_head(make_probe(), tmp_path / folder)
    assert default_name(tmp_path / folder) == check_name(name)
