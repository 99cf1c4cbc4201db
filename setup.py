"""The rest is in setup.cfg. An index page shows the README, but has no files beside it: links to these become plain words."""

import re
from pathlib import Path

from setuptools import setup


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n(?:.+\n)+", "", readme)  # pictures, with the words below
setup(long_description=re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", readme))
