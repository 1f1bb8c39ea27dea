"""The charts of the page: which keys of metrics.jsonl, in which order, under which title and unit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.observe.report.record import Record
from megatrain.observe.report.thin import thin

POINTS = 16_000
"""Points of one key over all runs, at most about twice as many; 1,000 shares of a series where the runs are few."""
AXIS_POINTS = 400
MORE = 16
"""Most charts of keys that this version doesn't know."""


@dataclass(frozen=True, slots=True)
class Line:
    """One key as a line of a chart."""

    key: str
    label: str
    smooth: bool = False
    """Whether it is noisy, so that the page draws a smoothed line over it."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. `scale` multiplies the values, for the unit to be right."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    suffix: str = ""
    """What follows a value where there is no room for `unit`."""
    scale: float = 1.0
    log: bool = False
    """Whether it begins with a logarithmic scale."""


CHARTS = (
    Chart("Loss", "nats per token", (Line("train/loss", "training", True), Line("eval/loss", "validation"))),
    Chart("Accuracy", "share of the held-out examples", (Line("eval/accuracy", "validation"),)),
    Chart("Bits per byte", "bits per byte of text", (Line("eval/bits_per_byte", "validation"),)),
    Chart("Gradient norm", "2-norm, before clipping", (Line("train/grad_norm", "gradient norm", True),)),
    Chart("Learning rate", "per step", (Line("train/lr", "learning rate"),)),
    Chart("Throughput", "tokens per second, all devices", (Line("perf/tokens_per_sec", "tokens/s", True),)),
    Chart(
        "Step time",
        "seconds per step",
        (Line("perf/step_time_s", "step", True), Line("perf/data_time_s", "of this, waiting for data", True)),
        suffix=" s",
    ),
    Chart(
        "Memory", "GiB, peak of the first device", (Line("memory/peak_gib", "peak memory"),), suffix=" GiB"
    ),
    Chart(
        "Model FLOPs utilization",
        "% of the device's peak",
        (Line("perf/mfu", "MFU", True),),
        suffix=" %",
        scale=100.0,
    ),
)
NOT_CHARTED = {"train/tokens", "perf/tokens_per_sec_per_device", "perf/tflops_per_device", "perf/mfu_causal"}
"""Keys that say in other units what a chart says; `train/tokens` is one of the horizontal axes."""


def charts_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return every chart for which a run has values, as the page's script takes it."""
    found = [_payload(chart, records) for chart in (*CHARTS, *_others(records))]
    return [chart for chart in found if chart["lines"]]


def axes_of(record: Record) -> dict[str, list[float | None]]:
    """Return steps, and the tokens and seconds that had passed by then, for the horizontal axis."""
    steps = record.metrics.steps
    places = np.unique(np.linspace(0, len(steps) - 1, AXIS_POINTS).astype(int))
    axes = {"step": steps, "tokens": _filled(record, "train/tokens"), "seconds": elapsed_seconds(record)}
    return {name: [float(f"{value:.9g}") for value in values[places]] for name, values in axes.items()}


def elapsed_seconds(record: Record) -> np.ndarray:
    """Return the seconds of training up to each row `(rows,)`: every step once, validations and saves not counted."""
    steps = record.metrics.steps
    seconds = _filled(record, "perf/step_time_s")
    return np.cumsum(seconds * np.diff(steps, prepend=0.0))


def _filled(record: Record, key: str) -> np.ndarray:
    """Return the values of a key in every row, 0 where there is none."""
    values = record.metrics.columns.get(key, np.zeros(len(record.metrics.steps)))
    return np.where(np.isfinite(values), values, 0.0)


def _others(records: Iterable[Record]) -> list[Chart]:
    known = {line.key for chart in CHARTS for line in chart.lines} | NOT_CHARTED
    keys = dict.fromkeys(key for record in records for key in record.metrics.columns if key not in known)
    return [Chart(key, "", (Line(key, key),)) for key in list(keys)[:MORE]]


def _payload(chart: Chart, records: Sequence[Record]) -> dict[str, Any]:
    buckets = min(1000, max(100, POINTS // len(records) // 2))
    lines = []
    for number, record in enumerate(records):
        for place, line in enumerate(chart.lines):
            steps, values = record.metrics.series(line.key)
            if len(values):
                series = thin(steps, values * chart.scale, buckets)
                about = {"run": number, "place": place, "label": line.label, "smooth": line.smooth}
                lines.append(about | series)
    return {
        "title": chart.title,
        "unit": chart.unit,
        "suffix": chart.suffix,
        "log": chart.log,
        "lines": lines,
    }
