"""Paths and settings of the repository that tests read."""

from configparser import ConfigParser
from pathlib import Path


ROOT = Path(__file__).parents[1]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
