"""The one exception for a user's mistake."""


class InputError(ValueError):
    """A wrong input that its user can mend: a flag, a path, a file's content.

    The message is one line that names the field, its value and the remedy. The command line prints it without a
    traceback and exits with 2. Bugs of ours raise anything else and keep their traceback.
    """


def install_extra(extra: str) -> str:
    """The command that installs an optional group of packages; hardviews is on no package index."""
    return f"in a checkout of hardviews: pip install '.[{extra}]'"
