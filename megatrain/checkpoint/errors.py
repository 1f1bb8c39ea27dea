"""Errors of saving and loading a checkpoint."""

from megatrain.config.errors import UserError


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved; earlier ones are untouched."""


class UploadError(UserError):
    """The last checkpoint of a run is not in its durable tier; on this machine it is whole."""

    exit_code = 1


class CheckpointMismatchError(UserError):
    """A checkpoint is intact, but its tensors differ from those requested."""


class UnknownFormatError(UserError):
    """A checkpoint has its right hashes, but a form that this version does not read; nothing is moved."""


class CorruptCheckpointError(Exception):
    """A checkpoint is incomplete or was modified; it is quarantined, and an older one is loaded."""
