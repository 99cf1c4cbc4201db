"""A head type of one's own: registered by an import or an entry point, never by the head."""

from importlib.metadata import EntryPoint

import pytest
import torch
from conftest import expected_logits, make_prompts, probed

from llama_probe import ProbeError, ProbeModel
from llama_probe.heads import Aggregator, import_head_types, probe_types, register_probe_type, registry


def test_an_unknown_type_says_what_to_do(own_type):
    assert {path.suffix for path in own_type.iterdir()} == {".json", ".safetensors", ".md"}
    for load in (ProbeModel.from_pretrained, probed().load_probe):
        with pytest.raises(ProbeError, match=r"probe_type='top' is not known.*--import FILE.py") as raised:
            load(own_type)
        assert "\n" not in str(raised.value) and "top" not in probe_types()


def test_an_imported_type_serves(own_type):
    import_head_types(own_type.parent / "top.py")
    model = probed()
    model.load_probe(own_type)
    ids = make_prompts()
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    expected = expected_logits(model.probes["head"], ids, mask)
    for kwargs in ({}, {"prefill_chunk_size": 2}):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=2, **kwargs)
        torch.testing.assert_close(out.probe_logits["head"], expected, atol=1e-5, rtol=0)
    assert model.classify(ids, output_attentions=True)["head"].token_weights is None


@pytest.fixture
def install(monkeypatch):
    """Pretend that a package with an entry point is installed."""

    def pretend(module):
        entry = EntryPoint("mine", module, registry.ENTRY_POINTS)
        monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == entry.group else [])
        registry._load_entry_points.cache_clear()

    return pretend


def test_a_type_of_an_installed_package_is_found_when_it_is_asked_for(own_type, install, monkeypatch):
    monkeypatch.syspath_prepend(own_type.parent)
    install("top")
    assert "top" not in probe_types()
    assert ProbeModel.from_pretrained(own_type).config.probe_type == "top"


def test_imports_that_break(own_type, install, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    for file, words in (("broken.py", "ZeroDivisionError: division by zero"), ("nowhere.py", "FileNotFoundError")):
        with pytest.raises(ProbeError, match=f"{file} cannot be imported: {words}"):
            import_head_types(tmp_path / file)
    install("no_such_module")
    with pytest.raises(ProbeError, match=r"no_such_module, which registers head types .*cannot be loaded: No module"):
        ProbeModel.from_pretrained(own_type)


def test_code_in_a_head_folder_is_refused_and_not_run(own_type):
    """Heads of earlier versions could carry the code of their type."""
    code = own_type / "probe_kind.py"
    (own_type.parent / "top.py").rename(code)
    with pytest.raises(ProbeError, match=r"probe_kind\.py is code, and a head is never code: move it out"):
        ProbeModel.from_pretrained(own_type)
    assert code.exists() and "top" not in probe_types()


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'mha' is taken by AttentionAggregator"):
        register_probe_type("mha")(type("Other", (Aggregator,), {}))
