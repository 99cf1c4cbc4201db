"""Names of heads: folders, Hub ids, aliases, lists and dicts."""

import json
import math

import pytest
from conftest import make_lm, make_probe, save_head
from hub_server.heads import plain, plant_model, same_weights
from huggingface_hub.utils import _http
from transformers import AutoModel

from llama_probe import ProbeError
from llama_probe.hub.folder import CONFIG_NAME, WEIGHTS_NAME
from llama_probe.hub.resolve import Target, best_head, bundled_heads, check_name, default_name, resolve_head
from llama_probe.hub.transport import HubOptions
from llama_probe.serving.sources import read_heads


def test_bundled_heads_are_readable_and_fit_one_backbone():
    heads = bundled_heads(Target("HuggingFaceTB/SmolLM2-135M-Instruct", 576, 30))
    assert heads == bundled_heads() and {"toxicchat-mha", "toxicchat-gate", "sst2-mha", "emotion-mha"} <= set(heads)
    for alias, head in read_heads(list(heads)).items():
        assert head.config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert not any(name.startswith("LABEL_") for name in head.config.id2label.values())
        assert (heads[alias] / "README.md").is_file()


def test_a_folder_comes_before_an_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_head("toxicchat-mha") == bundled_heads()["toxicchat-mha"]
    save_head(make_probe(), tmp_path / "toxicchat-mha")
    assert read_heads("toxicchat-mha")["toxicchat-mha"].config.hidden_size == 32


@pytest.mark.parametrize("spec", ["", [""], {"head": ""}])
def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, spec):
    """`--probe "$HEAD"` with nothing in HEAD."""
    save_head(make_probe(), tmp_path)
    monkeypatch.chdir(tmp_path)
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
    with pytest.raises(ProbeError, match=f"is a file: give the head's folder, '{folder}'"):
        read_heads(f"{folder}/{file}")


@pytest.mark.parametrize("target", [None, Target("org/tiny", 32, 4)])
def test_an_unknown_alias_lists_the_known_ones(target):
    with pytest.raises(ProbeError, match=r"'toxicchat-lstm'.*toxicchat-mha"):
        resolve_head("toxicchat-lstm", target)
    if target:
        with pytest.raises(ProbeError, match=r"bundled heads: none for hidden_size=32.*LLAMA_PROBE_NAMESPACE"):
            resolve_head("toxicchat-mha", target)


def test_specs(tmp_path):
    folder, head = save_head(make_probe(), tmp_path / "h"), make_probe()
    assert list(read_heads({"a": folder, "b": str(folder)})) == ["a", "b"]
    assert read_heads(None) == {} and read_heads({"mine": head})["mine"] is head
    for spec, words in (
        (7, "int"),
        ([7], "int"),
        ([folder, folder], "two heads are called 'h'"),
        ({"a.b": folder}, "'a.b' cannot name"),
        ({"type": folder}, "'type' cannot name"),
        ([head, head], "two heads"),
        ("a/b/c", "'a/b/c' is neither a folder"),
    ):
        with pytest.raises(ProbeError, match=words):
            read_heads(spec)


@pytest.mark.parametrize(
    "folder, name",
    [
        *[("mood v1.2", "mood-v1-2"), ("größe", "gr-e"), ("感情", "-"), ('"a"', "-a-"), ("a-b_c", "a-b_c")],
        *[("type", "type-head"), ("train", "train-head"), ("training", "training-head"), ("items", "items-head")],
    ],
)
def test_any_folder_has_a_name_that_a_head_may_have(tmp_path, folder, name):
    assert default_name(tmp_path / folder) == check_name(name)


class TestAliasesWithoutAKind:
    """`toxicchat` is the best of `toxicchat-gate`, `toxicchat-mha`, ... by validation."""

    @pytest.fixture
    def heads(self, tmp_path):
        """A function that makes the head folders of a backbone: (alias, kind, validation score, metric)."""

        def make(*rows):
            for alias, kind, score, metric in rows:
                folder = save_head(make_probe(probe_type=kind), tmp_path / alias)
                if score is not None:
                    summary = {"validation": {metric: {"mean": score}}, "test": {metric: {"mean": 1 - score}}}
                    results = {"recipe": {"metric": metric}, "summary": summary, "num_parameters": 10 + len(kind)}
                    (folder / "results.json").write_text(json.dumps(results))
            return {alias: tmp_path / alias for alias, *_ in rows}

        return make

    def test_the_best_by_validation(self, heads):
        rows = ("mood-gate", "gate", 0.7, "f1"), ("mood-mha", "mha", 0.8, "f1"), ("other-mha", "mha", 0.9, "f1")
        found = heads(*rows, ("other-pooling", "pooling", 0.9, "f1"))
        assert best_head("mood", found).name == "mood-mha"
        assert best_head("other", found).name == "other-mha", "of equal ones the smaller"
        assert best_head("mo", found) is None and best_head("mood-mha", found) is None

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

    @pytest.mark.parametrize("score", [math.nan, math.inf])
    def test_what_is_no_number_is_left_out(self, heads, score):
        found = heads(("mood-gate", "gate", 0.7, "f1"), ("mood-mha", "mha", score, "f1"))
        for order in (found, dict(reversed(found.items()))):
            assert best_head("mood", order).name == "mood-gate"

    @pytest.mark.parametrize("alias", ["toxicchat", "sst2", "emotion"])
    def test_bundled_ones(self, alias):
        rivals = {name: folder for name, folder in bundled_heads().items() if name.startswith(f"{alias}-")}
        assert resolve_head(alias) == best_head(alias, rivals)
        assert list(read_heads(alias)) == [alias], "the head is called as it was asked for"
        for name in (alias, f"{alias}-mha"):
            with pytest.raises(ProbeError, match=f"^probe='{name}' is a bundled head and has no revision 'v2'"):
                resolve_head(name, options=HubOptions("v2"))

    def test_beside_the_backbone(self, heads, tmp_path):
        heads(("mood-gate", "gate", 0.7, "f1"), ("mood-mha", "mha", 0.6, "f1"))
        make_lm().save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path, probe="mood")
        assert model.probes["mood"].config.probe_type == "gate"
        with pytest.raises(ProbeError, match=r"in .*: mood-gate, mood-mha"):
            model.load_probe("weather")


class TestAliases:
    @pytest.fixture
    def named(self, hub):
        """Alice's heads for org/tiny."""
        for alias in ("mood", "toxicchat-mha"):  # the second is bundled for another backbone
            plant_model(hub, "alice/tiny-probes", make_probe(seed=4), f"{alias}/")
        return "alice"

    @pytest.mark.parametrize("how", ["argument", "variable"])
    def test_a_namespace(self, hub, named, how, monkeypatch):
        arguments = {"probe_namespace": named} if how == "argument" else {}
        if how == "variable":
            monkeypatch.setenv("LLAMA_PROBE_NAMESPACE", named)
        lm = AutoModel.from_pretrained(plain(hub), probe=["mood", "toxicchat-mha"], **arguments)
        assert lm.active_probes == ["mood", "toxicchat-mha"]
        assert same_weights(lm.probes["toxicchat-mha"], make_probe(seed=4))
        for namespace in ("a/b", 3):
            with pytest.raises(ProbeError, match="namespace="):
                AutoModel.from_pretrained(plain(hub), probe="mood", probe_namespace=namespace)

    def test_one_alias_is_another_head_on_another_backbone(self, hub, named, monkeypatch, tmp_path):
        monkeypatch.setenv("LLAMA_PROBE_NAMESPACE", named)
        make_lm(hidden_size=16).save_pretrained(tmp_path / "small")
        plant_model(hub, "alice/small-probes", make_probe(hidden_size=16), "mood/")
        assert AutoModel.from_pretrained(tmp_path / "small", probe="mood").probes["mood"].config.hidden_size == 16
        assert AutoModel.from_pretrained(plain(hub), probe="mood").probes["mood"].config.hidden_size == 32

    def test_a_head_in_the_backbones_own_repository(self, hub, named):
        backbone = plain(hub)
        plant_model(hub, backbone, make_probe(seed=6), "mine/")
        model = AutoModel.from_pretrained(backbone, probe="mine")
        assert same_weights(model.probes["mine"], make_probe(seed=6))
        with pytest.raises(ProbeError, match=r"heads in it: org/tiny:mine$"):
            model.load_probe("weather")
        with pytest.raises(ProbeError, match=r"alice/tiny-probes:mood, .*org/tiny:mine"):
            model.load_probe("weather", namespace=named)
        assert hub.count("GET", "/api/models/alice/tiny-probes") == 1, "names of heads are asked for once"

    def test_a_hub_out_of_reach_is_asked_once(self, hub, named, monkeypatch):
        backbone = plain(hub)
        plant_model(hub, backbone, make_probe(), "mine/")
        target = Target(backbone, 32, 4)
        cached = resolve_head("mood", target, namespace=named)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: pytest.fail("the client repeats its request"))
        with hub.down():
            assert resolve_head("mood", target, namespace=named) == cached
            for alias in ("moood", "mine"):
                with pytest.raises(ProbeError, match=r"org/tiny:mine is not in the cache|org/tiny:moood is not in"):
                    resolve_head(alias, target, namespace=named)
            with pytest.raises(ProbeError, match=r"alice/tiny-probes:moood is not in"):
                resolve_head("alice/tiny-probes:moood")
        assert resolve_head("mine", target, namespace=named).name == "mine"
