"""`generate()`, `forward()` and `classify()` with heads.

A hidden state goes from a hook (`backbone.capture`) to `reader`, which holds it until a group of layers is full, and then to each
head (`heads.probe`). Around that way, by file:

- `modeling`: the classes that users call. `auto`: such a class for any backbone.
- `host`: attaches, switches and saves heads. `loading`: loads them, with or without their backbone.
- `session`: one call of `generate`, from the prompt to the output.
- `halting`: rules, their decisions, and what is shown of a reply that may be halted.
- `outputs`: what users get back. `cache`: the state of the heads for the next turn. `texts`: texts and chats for `classify`.
- `pipeline`: a pipeline of transformers. `export`: a repository without the package.
"""
