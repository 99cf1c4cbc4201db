"""What `pip install` brings along, beyond what an editable installation finds by itself."""

import configparser
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_every_package_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(config["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT / "src").parts) for path in (ROOT / "src").rglob("__init__.py")}
    assert len(found) > 4 and named == found | {"llama_probe.hub_cards"}
