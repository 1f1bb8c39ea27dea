"""Measurements; run from the repository's root. A regular package, since opacus installs one of the same name."""
