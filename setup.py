"""The packages, and the README for an index page, where links to files of the repository become plain words. The rest is in setup.cfg."""

import re
from pathlib import Path

from setuptools import find_packages, setup


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n", "", readme)  # pictures
readme = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", readme)
# Folders without Python modules, and those that lie outside src; see `package_dir`.
folders = ["llama_probe.hub_cards", "llama_probe.modeling", "llama_probe.recipes"]
setup(long_description=readme, packages=[*find_packages("src"), *folders])
