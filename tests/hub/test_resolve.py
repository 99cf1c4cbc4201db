"""Names of heads: folders, Hub ids, aliases, lists and dicts."""

import pytest
from conftest import make_lm, make_probe, save_head
from hub_server.heads import plain, plant_model, same_weights
from huggingface_hub.utils import _http
from transformers import AutoModel

from llama_probe import ProbeConfig, ProbeError, ProbeModel
from llama_probe.backbone.loading import read_target
from llama_probe.heads.match import describe
from llama_probe.hub import resolve
from llama_probe.hub.folder import WEIGHTS_NAME
from llama_probe.hub.resolve import ALIASES, Target, bundled_heads, check_name, default_name, resolve_head
from llama_probe.hub.transport import HubOptions
from llama_probe.serving.loading import read_heads


def test_bundled_heads_of_the_demo_backbone_are_readable():
    heads = bundled_heads(Target("HuggingFaceTB/SmolLM2-135M-Instruct", 576, 30, model_type="llama"))
    assert heads.items() <= bundled_heads().items()
    assert {"toxicchat-mha", "emotion-mha", *ALIASES.values()} <= set(heads)
    for head in read_heads(list(heads)).values():
        assert head.config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert not any(name.startswith("LABEL_") for name in head.config.id2label.values())


def test_a_folder_comes_before_an_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_head(make_probe(), tmp_path / "toxicchat-mha")
    assert read_heads("toxicchat-mha")["toxicchat-mha"].config.hidden_size == 32


def test_specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, head = save_head(make_probe(), tmp_path / "h"), make_probe()
    assert list(read_heads({"a": folder, "b": "h"})) == ["a", "b"]
    assert read_heads([]) == {} and read_heads({"mine": head})["mine"] is head
    for spec, words in (
        ("", "names no head"),  # not the current folder: `--probe "$HEAD"` with nothing in HEAD
        ({"head": ""}, "names no head"),
        ([folder, folder], "two heads are called 'h'"),
        ([head, head], "two heads"),
        ({"a.b": folder}, "'a.b' cannot name"),
        ({"type": folder}, "'type' cannot name"),
        ("a/b/c", "'a/b/c' is neither a folder"),
        ("toxicchat-lstm", "'toxicchat-lstm'.*toxicchat-mha"),  # with those there are
        (f"{folder}/{WEIGHTS_NAME}", "is neither a folder"),
    ):
        with pytest.raises(ProbeError, match=words):
            read_heads(spec)


@pytest.mark.parametrize(
    "folder, name", [("mood v1.2", "mood-v1-2"), ("感情", "-"), ("a-b_c", "a-b_c"), ("type", "type-head")]
)
def test_any_folder_has_a_name_that_a_head_may_have(tmp_path, folder, name):
    (tmp_path / folder).symlink_to(tmp_path)  # as `current` of several versions
    assert default_name(tmp_path / folder) == check_name(name)


class TestBundledAliases:
    """An alias names the head of the backbone that is loaded: by its name, or else by sizes, type and fingerprint."""

    @pytest.fixture
    def bundle(self, tmp_path, monkeypatch):
        """Heads for org/Demo, in another folder for org/Twin of the same sizes, and for org/Small."""
        bundle = tmp_path / "bundle"
        for seed, (place, sizes) in enumerate({"": {}, "twin/": {}, "small/": {"hidden_size": 16}}.items()):
            base = f"org/{place.strip('/').title() or 'Demo'}"
            config = ProbeConfig(probe_type="gate", base_model_name_or_path=base)
            save_head(ProbeModel(describe(make_lm(seed, **sizes), config)), bundle / f"{place}safety-multimax")
        monkeypatch.setattr(resolve, "BUNDLE", bundle)
        assert list(bundled_heads()) == ["safety-multimax", "small/safety-multimax", "twin/safety-multimax"]
        return bundle

    def test_a_head_is_called_as_it_was_asked_for(self):
        assert {name: resolve_head(name) for name in bundled_heads()} == bundled_heads()
        assert list(read_heads("toxicchat")) == ["toxicchat"]
        with pytest.raises(ProbeError, match=r"^probe='toxicchat' is a bundled head and has no revision 'v2'"):
            resolve_head("toxicchat", options=HubOptions("v2"))

    @pytest.mark.parametrize(
        "target, folder",
        [
            (None, "safety-multimax"),
            (Target("me/demo", 32, 4), "safety-multimax"),
            (Target("org/Twin-GGUF", 32, 4, model_type="llama"), "twin/safety-multimax"),
            (Target("/models/twin-Q4_K_M.gguf", 32, 4), "twin/safety-multimax"),
            (Target("me/renamed", 16, 4, model_type="llama"), "small/safety-multimax"),
            (Target(None, 16, 4), "small/safety-multimax"),
            (read_target("/models/Small.Q4_1.gguf"), "small/safety-multimax"),
        ],
    )
    def test_the_head_of_the_backbone(self, bundle, target, folder):
        for alias in ("safety", "safety-multimax"):
            assert resolve_head(alias, target) == bundle / folder

    @pytest.mark.parametrize(
        "target",
        [
            Target("org/llama-8b", 64, 4),
            Target("org/small", 32, 3),
            Target("me/renamed", 32, 4),  # of two backbones
            Target("renamed.gguf", None, None),
            Target("org/small", 16, 4, model_type="qwen2"),
        ],
    )
    def test_another_backbone_is_refused_with_the_command_that_makes_a_head(self, bundle, target):
        name = target.name_or_path
        for alias in ("safety", "safety-multimax"):
            with pytest.raises(ProbeError) as raised:
                resolve_head(alias, target, HubOptions(local_files_only=True))
            command = f"train safety --backbone {name} --output DIR"
            for words in (f"no bundled head for {name}", "Demo, Small, Twin", command):
                assert words in str(raised.value) and "\n" not in str(raised.value)

    def test_an_unrelated_model_of_the_same_sizes_is_refused(self, bundle, tmp_path):
        make_lm(seed=5, hidden_size=16).save_pretrained(tmp_path / "other")
        refused = r"no bundled head for .* train safety --backbone"
        with pytest.raises(ProbeError, match=refused):
            AutoModel.from_pretrained(tmp_path / "other", probe="safety")
        with pytest.raises(ProbeError, match=refused):
            ProbeModel.from_pretrained("safety", make_lm(seed=5, hidden_size=16))
        explicit = AutoModel.from_pretrained(tmp_path / "other", probe=bundle / "small" / "safety-multimax")
        assert explicit.active_probes == ["safety-multimax"], "it was asked for by its folder"


class TestAliasesOfTheBackbonesOwnHeads:
    """A head that lies in the folder or in the repository of a backbone has its name as an alias there."""

    @pytest.mark.parametrize("start", ["", "probes/"])  # the second is where a backbone saves its heads
    @pytest.mark.parametrize("place", ["folder", "repository"])
    def test_in_its_place(self, hub, tmp_path, place, start):
        backbone = plain(hub)
        plant_model(hub, backbone, make_probe(seed=6), f"{start}mine/")
        if place == "folder":
            save_head(make_probe(seed=6), tmp_path / start / "mine")
            make_lm().save_pretrained(backbone := tmp_path)
        model = AutoModel.from_pretrained(backbone, probe="mine")
        assert model.active_probes == ["mine"] and same_weights(model.probes["mine"], make_probe(seed=6))
        with pytest.raises(ProbeError, match=rf"in (it|/.*): (org/tiny(@[0-9a-f]+)?:{start})?mine$"):
            model.load_probe("weather")

    def test_a_hub_out_of_reach_is_asked_once(self, hub, monkeypatch):
        backbone = plain(hub)
        plant_model(hub, backbone, make_probe(), "mood/")
        target = Target(backbone, 32, 4)
        cached = resolve_head("mood", target)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: pytest.fail("the client repeats its request"))
        with hub.down():
            assert resolve_head("mood", target) == cached
            for source, words in (("moood", "org/tiny:moood is not a head"), ("a/b:moood", "a/b:moood cannot be")):
                with pytest.raises(ProbeError, match=words):
                    resolve_head(source, target)
