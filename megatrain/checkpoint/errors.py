"""What can be wrong with a checkpoint."""

from megatrain.config.errors import UserError


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved. What was committed before is untouched."""


class CheckpointMismatchError(UserError):
    """A good checkpoint of another model: its tensors are not those that were asked for."""


class Damage(Exception):
    """Why one checkpoint is not to be loaded; it is put aside and an older one is taken."""
