"""The pictures of the pages: what `docs/pictures.py` draws is what the pages show."""

import runpy
import xml.etree.ElementTree as ET

import pytest
from repository import ROOT


DRAWN = runpy.run_path(str(ROOT / "docs/pictures.py"))
PICTURES = DRAWN["PICTURES"]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_that_the_script_draws(name):
    assert (ROOT / f"docs/{name}.svg").read_text(encoding="utf-8") == PICTURES[name](), "make pictures draws it again"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_have_a_text_and_dark_colours(name):
    file = ET.parse(ROOT / f"docs/{name}.svg").getroot()
    assert len(file.find("{*}title").text) > 40
    assert "prefers-color-scheme: dark" in file.find("{*}style").text
