"""The parts of the page that are plain HTML, readable without the script. Every text of a run is escaped here."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from megatrain.observe.report.events import Entry, history, samples
from megatrain.observe.report.figures import Figure, compared, ending, figures_of
from megatrain.observe.report.record import Record

BADGES = {
    "running": "live",
    "finished": "good",
    "stopped": "calm",
    "interrupted": "bad",
    "failed": "bad",
    "unknown": "calm",
}
LONG_KEYS = 400  # keys of a config that are listed, at most


def text(value: object) -> str:
    """Return a value as HTML text, legal in attributes too."""
    return html.escape(str(value), quote=True)


def heading(records: Sequence[Record], names: Sequence[str]) -> str:
    """Return the head of the page: what is shown, and how it stands."""
    if len(records) > 1:
        title = f"{len(records)} runs compared"
        return f"<h1>{title}</h1><p class='sub'>{text(', '.join(names))}</p>"
    (record,) = records
    return f"<h1>{text(names[0])} {_badge(record)}</h1><p class='sub'>{text(_summary(record))}</p>"


def overview(records: Sequence[Record], names: Sequence[str]) -> str:
    """Return the figures: tiles of one run, a table of several."""
    if len(records) == 1:
        tiles = "".join(_tile(figure) for figure in figures_of(records[0]))
        return f"<dl class='tiles'>{tiles}</dl>"
    head = "".join(f"<th scope='col'>{_swatch(n)}{text(name)}</th>" for n, name in enumerate(names))
    rows = [("State", [f"<td>{_badge(each)}<small>{text(_more(each))}</small></td>" for each in records])]
    rows += [(name, [_cell(figure) for figure in row]) for name, row in compared(records)]
    return _table(f"<th scope='col'>Run</th>{head}", rows, "The runs' figures, side by side")


def configs(records: Sequence[Record], names: Sequence[str]) -> str:
    """Return the config of one run; of several, the keys that differ, then each run's own."""
    parts = []
    if len(records) > 1:
        keys = dict.fromkeys(key for record in records for key in record.config)
        differing = [key for key in keys if len({repr(record.config.get(key)) for record in records}) > 1]
        head = "".join(f"<th scope='col'>{_swatch(n)}{text(name)}</th>" for n, name in enumerate(names))
        rows = [(key, [f"<td>{_value(record.config, key)}</td>" for record in records]) for key in differing]
        caption = "Config keys that differ"
        parts.append(
            _table(f"<th scope='col'>Key</th>{head}", rows, caption)
            if rows
            else "<p>The configs are equal.</p>"
        )
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        title = f"{_swatch(number)}Every key of {text(name)}" if len(records) > 1 else "Every key"
        rows = [(key, [f"<td>{_value(record.config, key)}</td>"]) for key in list(record.config)[:LONG_KEYS]]
        table = _table("<th scope='col'>Key</th><th scope='col'>Value</th>", rows, f"Config of {name}")
        parts.append(
            f"<details><summary>{title}</summary>{table if rows else '<p>No config was found.</p>'}</details>"
        )
    return "".join(parts)


def texts(records: Sequence[Record], names: Sequence[str]) -> str:
    """Return the samples of text of each run in the order of their steps; empty if no run has any."""
    parts = []
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        shown, total = samples(record)
        if not shown:
            continue
        cards = "".join(
            f"<li><h3>Step {each.step:,}</h3><pre tabindex='0' aria-label='Sample at step {each.step:,}'>"
            f"<b>{text(each.prompt)}</b>{text(each.text)}</pre></li>"
            for each in shown
        )
        title = f"<h3 class='run'>{_swatch(number)}{text(name)}</h3>" if len(records) > 1 else ""
        some = (
            f"<p class='sub'>{len(shown)} of {total} samples, spread over the run.</p>"
            if total > len(shown)
            else ""
        )
        parts.append(f"{title}{some}<ol class='samples'>{cards}</ol>")
    return "".join(parts)


def events(records: Sequence[Record], names: Sequence[str]) -> str:
    """Return the history of each run as a table."""
    parts = []
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        rows = "".join(_event(entry) for entry in history(record))
        head = "<th scope='col'>Time (UTC)</th><th scope='col'>Step</th><th scope='col'>Event</th>"
        table = (
            f"<div class='wide' tabindex='0' role='region' aria-label='Events of {text(name)}'><table class='events'>"
            f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
        table = table if rows else "<p>No events were recorded.</p>"
        title = f"{_swatch(number)}{text(name)}: {text(ending(record))}"
        parts.append(f"<details><summary>{title}</summary>{table}</details>" if len(records) > 1 else table)
    return "".join(parts)


def machines(records: Sequence[Record], names: Sequence[str]) -> str:
    """Return where each run was trained, with which versions, and where its files are."""
    facts = [_facts(record) for record in records]
    keys = dict.fromkeys(key for each in facts for key in each)
    if len(records) == 1:
        rows = [(key, [f"<td>{text(value)}</td>"]) for key, value in facts[0].items()]
        return _table("", rows, "Machine and versions")
    head = "".join(f"<th scope='col'>{_swatch(n)}{text(name)}</th>" for n, name in enumerate(names))
    rows = [(key, [f"<td>{text(each.get(key, ''))}</td>" for each in facts]) for key in keys]
    return _table(f"<th scope='col'>What</th>{head}", rows, "Machine and versions")


def _summary(record: Record) -> str:
    cfg = record.config
    shape = (
        f"{cfg.get('model.n_layers')} layers of {cfg.get('model.hidden_size')}"
        if "model.n_layers" in cfg
        else ""
    )
    batch = (
        f"batches of {cfg['global_batch_size']} x {cfg.get('seq_len')} tokens"
        if "global_batch_size" in cfg
        else ""
    )
    facts = [
        cfg.get("model.kind"),
        shape,
        cfg.get("train.precision"),
        batch,
        _more(record),
    ]
    return " · ".join(str(fact) for fact in facts if fact)


def _more(record: Record) -> str:
    """Return how the run ended, where the badge's one word doesn't say it."""
    end = ending(record)
    return "" if end == record.state else end


def _facts(record: Record) -> dict[str, str]:
    machine = record.last("resume", "machine") or record.last("start", "machine")
    versions = record.last("resume", "versions") or record.last("start", "versions")
    facts: dict[str, Any] = {}
    if isinstance(machine, dict):
        facts |= {
            "Host": machine.get("host"),
            "Device": machine.get("device"),
            "Processes": machine.get("processes"),
        }
    if isinstance(versions, dict):
        facts |= {f"Version of {name}": version for name, version in versions.items()}
    facts["Attempts"] = record.attempts
    facts["Checkpoints"] = (
        f"{len(record.checkpoints)}, up to {record.checkpoints[-1]}" if record.checkpoints else "none"
    )
    facts["Directory"] = record.directory.absolute()
    if record.metrics.torn:
        facts["Damaged lines"] = f"{record.metrics.torn:,} of metrics.jsonl, left out"
    return {key: str(value) for key, value in facts.items() if value is not None}


def _tile(figure: Figure) -> str:
    return f"<div><dt>{text(figure.name)}</dt><dd>{text(figure.value)}<small>{text(figure.note)}</small></dd></div>"


def _cell(figure: Figure | None) -> str:
    return (
        "<td>–</td>" if figure is None else f"<td>{text(figure.value)}<small>{text(figure.note)}</small></td>"
    )


def _value(config: dict[str, Any], key: str) -> str:
    if key not in config:
        return "–"
    value = config[key]
    return text("null" if value is None else str(value).lower() if isinstance(value, bool) else value)


def _badge(record: Record) -> str:
    return f"<span class='badge {BADGES[record.state]}'>{text(record.state)}</span>"


def _swatch(number: int) -> str:
    return f"<i class='swatch' data-run='{number}' aria-hidden='true'></i>"


def _event(entry: Entry) -> str:
    return (
        f"<tr class='{entry.kind}'><td>{text(entry.time)}</td><td class='number'>{text(entry.step)}</td>"
        f"<td>{text(entry.text)}</td></tr>"
    )


def _table(head: str, rows: Iterable[tuple[str, Sequence[str]]], label: str) -> str:
    """Return a table that scrolls by itself where it is too wide."""
    body = "".join(f"<tr><th scope='row'>{text(name)}</th>{''.join(cells)}</tr>" for name, cells in rows)
    return (
        f"<div class='wide' tabindex='0' role='region' aria-label='{text(label)}'><table>"
        f"{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table></div>"
    )
