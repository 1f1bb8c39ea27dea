"""Errors that end a run with a message instead of a traceback, and the exit code of each."""


class UserError(Exception):
    """The config or the input is invalid; the message says what is wrong and what to do. Nothing was written."""

    exit_code = 2


class DamagedCheckpointError(UserError):
    """A checkpoint is damaged and no intact one is left."""

    exit_code = 3


class StopRequested(BaseException):
    """A signal asks a run to stop that has nothing to save yet; no more an `Exception` than KeyboardInterrupt is."""

    exit_code = 75

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        """The signal's name."""

    def __str__(self) -> str:
        return (
            f"stopped by {self.reason} before the first step of this attempt; nothing is lost. Start the same command "
            "again to go on."
        )


class StalledError(UserError):
    """Processes waited in vain for another one: each says so itself, since the one that hangs cannot."""

    exit_code = 1
    is_verdict = False
    """Whether the message names the cause, as all ranks' guards found it together."""
