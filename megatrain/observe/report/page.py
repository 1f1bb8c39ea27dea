"""`report.html`: one page that shows a run, or several, and needs neither a network nor a server.

The page forbids itself every request and every script but its own two (a Content Security Policy with their hashes),
so that no text of a run can act, whatever it says.
"""

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

from megatrain.config.errors import UserError
from megatrain.observe.report import parts
from megatrain.observe.report.charts import axes_of, charts_of
from megatrain.observe.report.events import resumed_at
from megatrain.observe.report.record import Record, read_record

REPORT_FILE = "report.html"
METRICS_BYTES = 32 << 20
"""A larger metrics.jsonl is not made into a page at the end of a run: that would take more than half a second."""


def report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the runs in `directories`; return where it is.

    Args:
        out: the file. None: `report.html` in the run's directory, or in the current one if there are several runs.

    Raises:
        UserError: a directory is no run or has no row, or the page can't be written.
    """
    records = [read_record(directory) for directory in directories]
    target = out or (directories[0] if len(directories) == 1 else Path()) / REPORT_FILE
    _write(target, render(records))
    return target


def report_at_end(directory: Path) -> bool:
    """Write the page of a run that has just ended, and tell whether that was done: nothing changes how a run ends."""
    try:
        if (directory / "metrics.jsonl").stat().st_size > METRICS_BYTES:
            return False
        report([directory])
    except Exception:
        return False
    return True


def render(records: Sequence[Record]) -> str:
    """Return the page of the runs in `records`."""
    names = _names(records)
    library, script = _asset("uplot/uPlot.iife.min.js"), _asset("page.js")
    payload = {
        "runs": [
            {"name": name, "axes": axes_of(record), "resumed": resumed_at(record)}
            for name, record in zip(names, records, strict=True)
        ],
        "charts": charts_of(records),
    }
    title = f"{names[0]} · MegaTrain" if len(names) == 1 else f"{len(names)} runs · MegaTrain"
    samples = parts.texts(records, names)
    return Template(_asset("page.html")).substitute(
        title=parts.text(title),
        script_hashes=f"{_source(library)} {_source(script)}",
        style=_asset("uplot/uPlot.min.css") + _asset("page.css"),
        heading=parts.heading(records, names),
        overview=parts.overview(records, names),
        samples=f"<section aria-labelledby='s'><h2 id='s'>What the model writes</h2>{samples}</section>"
        if samples
        else "",
        events=parts.events(records, names),
        config=parts.configs(records, names),
        machine=parts.machines(records, names),
        footer=parts.text(_footer()),
        data=_json(payload),
        library=library,
        script=script,
    )


def _names(records: Sequence[Record]) -> list[str]:
    """Return a name for each run; where two have the same, their directories."""
    names = [record.name for record in records]
    return [
        name if names.count(name) == 1 else str(record.directory)
        for name, record in zip(names, records, strict=True)
    ]


def _asset(name: str) -> str:
    return (files("megatrain.observe.report") / "page" / name).read_text(encoding="utf-8")


def _source(script: str) -> str:
    """Return what the page's policy calls a script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(payload: object) -> str:
    """Return JSON that no HTML parser takes for markup."""
    return (
        json.dumps(payload, separators=(",", ":"), allow_nan=False)
        .replace("<", "\\u003c")
        .replace("&", "\\u0026")
    )


def _footer() -> str:
    try:
        own = f"MegaTrain {version('megatrain')}"
    except PackageNotFoundError:
        own = "MegaTrain"
    return f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by {own}"


def _write(target: Path, page: str) -> None:
    """Put the page in place whole or not at all: a browser that reloads never sees a part.

    Raises:
        UserError: it can't be written.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(page.encode("utf-8", "replace"))
        os.replace(partial, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"{target} can't be written: {error.strerror or error}. Choose another place with --out."
        ) from None
