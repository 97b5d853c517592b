"""The exception that a caller's mistake raises, and the one that the end of another process raises."""

_LONGEST = 300


class InputError(ValueError):
    """Something that was given cannot be used; the message names the cause and the remedy.

    The command line prints the message and ends with exit status 2.
    """


def reason(error: Exception) -> str:
    """What an error says, in a line that is not too long, for a message of ours."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


class PeerLost(RuntimeError):
    """Another process of the job is gone; this one cannot go on alone."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this job is gone, so the job ends here. Start it again: prepare goes on from the "
            "last shard that was written, fit from the beginning."
        )
