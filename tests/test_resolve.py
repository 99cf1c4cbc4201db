"""Names of heads: folders, bundled aliases, lists and dicts."""

import pytest
from conftest import make_probe

from llama_probe import ProbeError
from llama_probe.files import save_head
from llama_probe.resolve import bundled_heads, read_heads, resolve_head


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


def test_an_unknown_alias_lists_the_known_ones():
    with pytest.raises(ProbeError, match=r"bundled heads: .*toxicchat-mha"):
        resolve_head("toxicchat-lstm")


def test_one_head_may_serve_under_two_names(tmp_path):
    folder = save_head(make_probe(), tmp_path / "h")
    assert list(read_heads({"a": folder, "b": str(folder)})) == ["a", "b"]
    assert read_heads(None) == {}
    head = make_probe()
    assert read_heads({"mine": head})["mine"] is head
