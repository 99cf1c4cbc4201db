"""`generate()`, `forward()` and `classify()` with heads.

A hidden state goes from a hook (`backbone.capture`) to `reader`, which holds it until a group of layers is full, and then to each
head (`heads.probe`). Around that way, by file:

- `modeling`: the classes that users call. `host` loads, attaches, switches and saves heads.
- `session`: one call of `generate`, from the prompt to the output.
- `halting`: rules, their decisions, and what is shown of a reply that may be halted.
- `outputs`: what users get back, with the state for the next turn. `texts`: texts and chats for `classify`.
- `auto`, `pipeline`: what the auto classes do with heads, and pipelines. `export`: a repository without the package.
"""
