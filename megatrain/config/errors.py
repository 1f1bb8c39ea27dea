"""Errors that end a run with a message instead of a traceback, and the exit code of each."""


class UserError(Exception):
    """The config or the input is invalid; the message says what is wrong and what to do. Nothing was written."""

    exit_code = 2


class DamagedCheckpointError(UserError):
    """A checkpoint is damaged and no intact one is left."""

    exit_code = 3


class StalledError(UserError):
    """Processes waited in vain for another one: each says so itself, since the one that hangs cannot."""

    exit_code = 1
    is_verdict = False
    """Whether the message names the cause, as all ranks' guards found it together."""
