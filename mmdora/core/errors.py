"""Errors that the CLI reports in one line, without a traceback."""


class UserError(ValueError):
    """Invalid input: a config, a file, a sample or an option. The command exits with 2.

    The message names the key, file or sample and says what to do.
    """


class RunError(RuntimeError):
    """A run that cannot continue although its input is valid. The command exits with 1."""
