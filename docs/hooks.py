"""For the site: links that leave docs/ become plain words."""

import re


def on_page_markdown(markdown: str, **_) -> str:
    """Return a page without its links to other folders of the repository."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
