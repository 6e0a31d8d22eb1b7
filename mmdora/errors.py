"""The one exception that means "your input is wrong": commands print it as a single message and exit with code 2."""


class UserError(ValueError):
    """Something the user gave is wrong. The message names the file, the key or the sample, and says what to do."""
