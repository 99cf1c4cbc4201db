"""Checks a wheel in an environment that holds nothing else. Run by `make package`; no test module."""

from importlib.metadata import entry_points, files, metadata, requires


found = metadata("llama_probe")
assert found["Name"] == "llama_probe" and found["License-Expression"] == "Apache-2.0", found.keys()
assert found["Description-Content-Type"] == "text/markdown" and found["Project-URL"], found.keys()
words = found["Description"]
assert "](docs/" not in words and "## Train" in words, "nothing that is not there"
assert {"train", "demo", "plots", "vllm"} <= set(found.get_all("Provides-Extra"))
assert any(need.startswith("torch") for need in requires("llama_probe"))
names = {str(path) for path in files("llama_probe")}
for needed in (
    "py.typed",
    "hub/card_template.md",
    "modeling/modeling_llama_probe.py",
    "recipes/safety.yaml",
    "serving/export_card.md",
    "vllm/plugin.py",
    "hub_cards/safety-multimax/probe_model.safetensors",
):
    assert f"llama_probe/{needed}" in names, needed
assert not any(name.startswith(("tests/", "examples/")) for name in names)
(script,) = entry_points(group="console_scripts", name="llama-probe")
assert script.value == "llama_probe.cli:main"
print(f"{len(names)} files, {found['Version']}")
