"""Errors of saving and loading a checkpoint."""

from megatrain.config.errors import UserError


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved; those committed before are untouched."""


class CheckpointMismatchError(UserError):
    """An intact checkpoint of another model: its tensors are not the requested ones."""


class CorruptCheckpointError(Exception):
    """A checkpoint is incomplete or was changed: it is quarantined, and an older one is loaded."""
