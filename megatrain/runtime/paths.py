"""Where things are kept between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return $MEGATRAIN_CACHE, or ~/.cache/megatrain. It need not exist yet."""
    return Path(os.environ.get("MEGATRAIN_CACHE") or Path.home() / ".cache" / "megatrain")
