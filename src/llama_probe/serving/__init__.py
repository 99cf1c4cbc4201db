"""`generate()`, `forward()` and `classify()` with heads.

A hidden state goes from a hook (`backbone.capture`) to `reader`, which holds it until a group of layers is full, and then to each
head (`heads.probe`). Around that way, by file:

- `modeling`: the classes that users call. `host` attaches, switches and saves heads; `sources` loads those of `probe=`.
- `session`: one call of `generate`, with its `arguments`. `prefill` reads the prompts, `reply` the tokens that follow them.
- `halting`: rules. `halting_run` applies them to a call, `halting_words` reads them from a command line.
- `outputs`, `cache`, `streaming`: what users get back. `texts`: texts and chats for `classify`.
- `auto`, `pipeline`: what the auto classes do with heads, and pipelines. `export`, `remote_code`: a repository without the package.
"""

__all__ = [
    "arguments",
    "auto",
    "cache",
    "export",
    "halting",
    "halting_run",
    "halting_words",
    "host",
    "modeling",
    "outputs",
    "pipeline",
    "prefill",
    "reader",
    "remote_code",
    "reply",
    "session",
    "sources",
    "streaming",
    "texts",
]
