"""An HTML page with the tokens that a head looked at. It needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined

from ..heads.decision import threshold_of
from .reading import CONTINUATION, Reading, printable


_TEMPLATE = Path(__file__).with_name("page.html")


def reading_page(reading: Reading) -> str:
    """Return an HTML page: the label, the probabilities, the text colored by token weight, and the layers.

    All that comes from the text, the head or the tokenizer is escaped. The content security policy of the page allows
    its own script alone.
    """
    page = _TEMPLATE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    config, is_value = reading.config, reading.config.problem_type == "regression"
    scores = [(*item, threshold_of(config, index)) for index, item in enumerate(reading.probabilities.items())]

    def levels(weights: np.ndarray) -> list[int]:
        """Return the color of each token, 0 to 100: the root of what exceeds an even share, as in the heat map."""
        above = np.clip(weights - reading.even_share, 0, None)
        return np.rint(100 * np.sqrt(above / (reading.scale_end(weights) - reading.even_share))).astype(int).tolist()

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"printable": printable, "share": "{:.1%}".format}
    return environment.from_string(page).render(
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        reading=reading,
        config=config,
        is_value=is_value,
        scores=scores if is_value else sorted(scores, key=lambda item: -item[1]),
        combined=reading.token_weights,
        counted=np.array(reading.counted),
        levels=levels,
        colors=levels(reading.token_weights),
        continuation=CONTINUATION,
    )
