"""For the site: links that leave docs/ become plain words."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page without its links to other folders of the repository."""
    up = "\\.\\./" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({up}[^)]*\)", r"\1", markdown)
