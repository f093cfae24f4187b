"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake that the user can mend: one line saying what, where, and what to do.

    The command line prints it as ``error: ...`` and exits with code 2; anything else is a bug and keeps its traceback.
    """


def one_line(error: Exception) -> str:
    """What went wrong, in one line; for other errors than `UserError` their type, which says more than their text."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
