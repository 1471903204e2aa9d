"""The demo's narrator: acts, commands as typed, what they answered, what the checker found.

Plain text when piped, colours on a terminal. It judges nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from demo.checker import format_cpu_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from subprocess import CompletedProcess

    from demo.checker import Finding, Observation

_WIDTH = 100


class Stage:
    """Tells the story; `quiet` leaves headings and findings only."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Writes to stdout."""
        reconfigure = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")
        width = None if sys.stdout.isatty() else _WIDTH
        self._console = Console(highlight=False, width=width, soft_wrap=True)
        self._quiet = quiet
        self._act = 0

    def act(self, title: str, *story: str) -> None:
        """A new act; `story` is what the reader should know, a line each."""
        self._act += 1
        self._console.print()
        self._console.print(Text(f"{self._act}. {title}", style="bold"))
        for line in story:
            self.say(line)

    def say(self, line: str) -> None:
        """One line of narration."""
        if not self._quiet:
            self._console.print(Text(f"   {line}"))
            sys.stdout.flush()

    def command(self, line: str, done: CompletedProcess[str] | None = None) -> None:
        """A command as typed, with what it printed and, when not 0, its exit code."""
        if self._quiet:
            return
        self._console.print(Text(f"   $ {line}", style="bold cyan"))
        if done is not None:
            self.output(done.stderr, done.stdout)  # progress comes before results
            if done.returncode:
                self._console.print(Text(f"     [exit code {done.returncode}]", style="yellow"))
        sys.stdout.flush()

    def output(self, *texts: str) -> None:
        """What a command printed."""
        for text in texts:
            for line in text.rstrip("\n").splitlines():
                self._console.print(Text(f"     {line}", style="dim"))

    def compare(
        self, before: Mapping[str, Observation] | None, after: Mapping[str, Observation]
    ) -> None:
        """What kernel, libvirt and guest show, before and after (None: only now)."""
        if self._quiet:
            return
        heads = ("guest", "threads on pCPU", "CPU cap", "vCPUs in guest", "virtio-mem", "MemTotal")
        rows = []
        for name, now in after.items():
            new = _cells(now)
            old = _cells(before[name]) if before else new
            rows.append((Text(name), *(_arrow(a, b) for a, b in zip(old, new, strict=True))))
        self.table(heads, rows)

    def table(self, heads: Iterable[str], rows: Iterable[Iterable[str | Text]]) -> None:
        """Columns of text."""
        if self._quiet:
            return
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for head in heads:
            table.add_column(head)
        for row in rows:
            table.add_row(*row)
        self._console.print(Padding(table, (0, 0, 0, 3)))

    def findings(self, findings: Iterable[Finding]) -> None:
        """The checker's verdicts."""
        for ok, text in findings:
            style = "green" if ok else "bold red"
            self._console.print(Text(f"   {'✓' if ok else '✗'} {text}", style=style))
        sys.stdout.flush()

    def end(self, line: str, *, ok: bool) -> None:
        """The last line."""
        self._console.print()
        self._console.print(Text(line, style="bold green" if ok else "bold red"))


def _cells(seen: Observation) -> tuple[str, ...]:
    report = seen.report
    return (
        format_cpu_list(seen.cpus),
        "none" if seen.quota is None else f"{seen.quota}m",
        str(len(report.online)) if report else "?",
        f"{seen.current >> 20} MiB",
        f"{report.memory_mib:.0f} MiB" if report else "?",
    )


def _arrow(old: str, new: str) -> Text:
    return Text(new) if old == new else Text(f"{old} → {new}", style="bold")
