"""Series of any length as at most a few thousand points, in which no peak and no non-finite value vanishes."""

from itertools import pairwise
from typing import Any

import numpy as np

MARKS = 200
"""Most non-finite steps of a series that are listed one by one; all of them are counted."""


def thin(steps: np.ndarray, values: np.ndarray, buckets: int) -> dict[str, Any]:
    """Return a series as the page draws it.

    A series of more than `2 * buckets` values is cut into `buckets` shares of equally many. Of each, the smallest and
    the largest value stay, at their steps, and the mean beside them.

    Args:
        steps: `(values,)`, rising. values: `(values,)`, inf where one is not finite.

    Returns:
        x, y: the points, y None where a value is not finite; mean_x, mean_y: the means, if there are shares;
        n: number of values; bad: number of those that are not finite; bad_x: the steps of up to `MARKS` of them.
    """
    finite = np.isfinite(values)
    bad = steps[~finite]
    if len(values) <= 2 * buckets:
        points = {"x": _plain(steps), "y": _plain(values)}
    else:
        points = _envelope(steps, values, finite, buckets)
    marks = bad if len(bad) <= MARKS else bad[np.linspace(0, len(bad) - 1, MARKS).astype(int)]
    return {**points, "n": len(values), "bad": len(bad), "bad_x": _plain(marks)}


def _envelope(
    steps: np.ndarray, values: np.ndarray, finite: np.ndarray, buckets: int
) -> dict[str, list[float | None]]:
    cuts = np.linspace(0, len(values), buckets + 1).astype(int)
    kept: list[int] = []
    mean_x: list[float] = []
    mean_y: list[float] = []
    for begin, end in pairwise(cuts):
        inside = np.flatnonzero(finite[begin:end]) + begin
        places = set()
        if len(inside):
            places |= {int(inside[values[inside].argmin()]), int(inside[values[inside].argmax()])}
            mean_x.append(steps[inside].mean())
            mean_y.append(values[inside].mean())
        if len(inside) < end - begin:
            places.add(int(begin + np.argmin(finite[begin:end])))  # the first that is not finite
        kept += sorted(places)
    if kept[0] != 0:
        kept.insert(0, 0)
    if kept[-1] != len(values) - 1:
        kept.append(len(values) - 1)
    return {
        "x": _plain(steps[kept]),
        "y": _plain(values[kept]),
        "mean_x": _plain(np.array(mean_x)),
        "mean_y": _plain(np.array(mean_y)),
    }


def _plain(values: np.ndarray) -> list[float | None]:
    """Return numbers as JSON has them, with six significant digits; whole ones keep all."""
    return [_short(float(value)) for value in values]


def _short(value: float) -> float | int | None:
    if not np.isfinite(value):
        return None
    if value == int(value) and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.6g}")
