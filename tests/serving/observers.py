"""What tests of serving look at: streams, passes of the LM, and hooks in it."""

from transformers.generation.streamers import BaseStreamer


class Recorder(BaseStreamer):
    """Keeps what it is given: the prompt, then the tokens of the reply."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.ended += 1

    @property
    def reply(self):
        return [token for part in self.tokens[1:] for token in part]


def passes_of(model):
    """A list that gets the number of columns of each pass of the LM."""
    widths = []

    def look(module, args, kwargs):
        given = args[0] if args else kwargs.get("input_ids")
        widths.append((kwargs["inputs_embeds"] if given is None else given).shape[1])

    model.model.register_forward_pre_hook(look, with_kwargs=True)  # a pass of `classify` may end early
    return widths


def hooks_in_passes(model):
    """A list that gets the number of hooks on the layers and the final norm in each pass of the LM."""
    found = []

    def count(*_):
        modules = [*model.model.layers, model.model.norm]
        found.append(sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules))

    model.model.rotary_emb.register_forward_hook(count)
    return found


def assert_no_hooks(model):
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
