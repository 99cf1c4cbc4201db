"""The one error that the package raises at its borders."""


class ProbeError(ValueError):
    """Something a user can mend: a wrong config value, a bad head file, a combination that cannot be scored.

    The message says what was wrong, what is allowed and how to mend it. It is a `ValueError`, so code that guards
    transformers calls with `except ValueError` guards these as well.
    """
