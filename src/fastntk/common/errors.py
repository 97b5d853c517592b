"""The one exception that a caller's mistake raises."""


class InputError(ValueError):
    """Something that was given cannot be used; the message names the cause and the remedy.

    The command line prints the message and ends with exit status 2.
    """
