"""The target that a loaded backbone is for aliases of heads."""

from torch import nn

from ..hub.resolve import Target
from .capture import find_decoder


def target_of(lm: nn.Module) -> Target:
    """Return name and sizes of a loaded causal LM."""
    decoder = find_decoder(lm)
    return Target(decoder.name_or_path, decoder.hidden_size, decoder.num_hidden_layers)
