"""Where output goes: tables on a terminal, aligned text in a pipe, one JSON document on demand."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Show = Callable[[float, str], None]


class Table(NamedTuple):
    """A titled table of text; `right` names columns of numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    empty: str = "none"


def clean(text: str) -> str:
    """Without control characters: names come from guests' owners, the terminal is ours."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def format_plain(table: Table) -> str:
    """Aligned columns, two blanks apart."""
    if not table.rows:
        return f"{table.title}: {table.empty}"
    rows = [table.columns, *(tuple(clean(c) for c in row) for row in table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if name in table.right else cell.ljust(width)
            for name, cell, width in zip(table.columns, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([f"{table.title}:", *lines])


def _print_rich(table: Table) -> None:
    # imported here: a third of the start-up time, and a pipe does not need it
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    if not table.rows:
        console.print(Text(f"{table.title}: {table.empty}"))
        return
    drawn = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in table.columns:
        drawn.add_column(name, justify="right" if name in table.right else "left")
    for row in table.rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))  # Text: no markup in names
    console.print(drawn)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2))


def print_tables(tables: Iterable[Table]) -> None:
    """Tables on a terminal, else plain text with blank lines between."""
    if sys.stdout.isatty():
        for table in tables:
            _print_rich(table)
    else:
        print("\n\n".join(format_plain(t) for t in tables))


def print_lines(lines: Sequence[str]) -> None:
    """Plain lines, cleaned."""
    for line in lines:
        print(clean(line))


def note(text: str) -> None:
    """A remark for the person at the terminal; never mixes with the result."""
    print(clean(text), file=sys.stderr, flush=True)


class ProgressLine:
    """Live progress on stderr: one line that is redrawn on a terminal, else a line per text."""

    def __init__(self, *, quiet: bool) -> None:
        """`quiet` shows nothing."""
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._last = ""

    def __call__(self, fraction: float, text: str) -> None:
        """Show how far it is."""
        if self._quiet or not text:
            return
        if self._live:
            line = f"{fraction:4.0%} {clean(text)}"[:100]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif text != self._last:
            print(f"{fraction:4.0%} {clean(text)}", file=sys.stderr, flush=True)
        self._last = text

    def end(self) -> None:
        """Clear the line."""
        if self._live and self._last:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
