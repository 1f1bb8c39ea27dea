"""List of the checkpoints of a durable tier, without opening a tensor."""

from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.listing import Listed
from megatrain.checkpoint.manifest import MANIFEST_FILE
from megatrain.checkpoint.tier import Tier, misplaced
from megatrain.config.errors import UserError


def list_tier(tier: Tier) -> list[Listed]:
    """Return the checkpoints of a tier by step, those of unfinished uploads too.

    Raises:
        UserError: the tier can't be reached.
    """
    return [_listed(tier, step, files) for step, files in sorted(tier.stored().items())]


def _listed(tier: Tier, step: int, files: dict[str, int]) -> Listed:
    size, place = sum(files.values()), tier.address(step)
    if MANIFEST_FILE not in files:
        return Listed(place, step, "unfinished", size, "")
    try:
        manifest = tier.manifest(step)
    except CorruptCheckpointError as error:
        return Listed(place, step, "damaged", size, "", reason=str(error))
    except UserError as error:
        return Listed(place, step, "unknown", size, "", reason=str(error))
    if reason := misplaced(manifest, files):
        return Listed(place, step, "damaged", size, manifest.created, reason=reason)
    size = sum(record.size for record in manifest.files.values())
    return Listed(place, step, "complete", size, manifest.created, manifest.parent, manifest.info)
