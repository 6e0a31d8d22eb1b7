"""What commands print as one message, without a traceback."""


class UserError(ValueError):
    """Something the user gave is wrong: exit code 2. The message names the file, the key or the sample, and says what
    to do."""


class RunError(RuntimeError):
    """A run that cannot go on, though nothing that was given is known to be wrong: exit code 1."""
