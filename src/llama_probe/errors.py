"""The one error that the package raises at its borders, and what it quotes of others."""

# A message may quote a file or a server's answer. Longer ones are cut.
_LONGEST, _SHORT = 1000, 300


class ProbeError(ValueError):
    """Something a user can mend: a wrong config value, a bad head file, a combination that cannot be scored.

    The message says what was wrong, what is allowed and how to mend it. It is a `ValueError`, so code that guards
    transformers calls with `except ValueError` guards these as well.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_SHORT]}... ({len(text)} characters)")


def first_line(error: Exception) -> str:
    """Return the first line of an error that says something, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
