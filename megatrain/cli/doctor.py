"""`megatrain doctor`: hardware and software of this machine, what is missing for which feature, and how to get it."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatrain.cli import doctor_cluster, machine
from megatrain.cli.machine import Row
from megatrain.cli.options import Parser
from megatrain.config.errors import UserError

PARTS: dict[str, Callable[[], list[Row]]] = {
    "versions": machine.versions,
    "cpu": machine.cpu,
    "cuda": machine.cuda,
    "memory": machine.memory,
    "compiler": machine.compiler,
    "network": machine.network,
    "paths": machine.paths,
    "features": machine.features,
}


def run(argv: list[str]) -> int:
    """Check every part and print the findings; return 1 if something that every run needs is broken, else 0."""
    parser = Parser("doctor")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--unfit", type=Path)
    options = parser.parse_args(argv)
    if options.unfit is not None and not options.cluster:
        raise UserError("--unfit FILE is for --cluster, which compares machines.")
    if options.cluster:
        return doctor_cluster.run(as_json=options.json, unfit=options.unfit)
    found = {part: _look(function) for part, function in PARTS.items()}
    broken = [f"{part}: {row.name}" for part, rows in found.items() for row in rows if row.state == "broken"]
    if options.json:
        parts = {part: [asdict(row) for row in rows] for part, rows in found.items()}
        print(json.dumps({"ok": not broken, **parts}, indent=2))
    else:
        _show(found)
        print(f"\nBroken: {', '.join(broken)}" if broken else "\nEverything that a run needs is available.")
    return 1 if broken else 0


def _look(function: Callable[[], list[Row]]) -> list[Row]:
    """Check one part; report a failed check as broken."""
    try:
        return function()
    except Exception as error:
        return [Row(function.__name__, f"the check failed: {type(error).__name__}: {error}", "broken")]


def _show(found: dict[str, list[Row]]) -> None:
    """Print a coloured table on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Column, Table
        except ImportError:
            pass
        else:
            table = Table("", "", Column(overflow="fold"), show_header=False, box=None, padding=(0, 1))
            for part, rows in found.items():
                table.add_row(f"[bold]{part}[/bold]")
                for row in rows:
                    colour = {"ok": "green", "missing": "yellow", "broken": "red"}[row.state]
                    text = escape(row.value) + (f"\n[dim]-> {escape(row.fix)}[/dim]" if row.fix else "")
                    table.add_row(f"  {escape(row.name)}", f"[{colour}]{row.state}[/{colour}]", text)
            Console().print(table)
            return
    for part, rows in found.items():
        print(part)
        for row in rows:
            print(
                f"  {row.name:<15} {row.state:<8} {row.value}"
                + (f"\n{'':<27}-> {row.fix}" if row.fix else "")
            )
