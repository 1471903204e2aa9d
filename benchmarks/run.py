"""`make bench`: all benchmarks, as a table and as benchmarks/results.json.

Figures are ratios within one run, or absolute where the target is absolute; they are never tests.
Exit code 0 says that all ran, not that all targets were met: the table says that. `passthrough` and
`memory` are measured in nested labs; `combination` needs OR-tools (the extra `bench`).
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from benchmarks import (
    bench_card,
    bench_cardlink,
    bench_combination,
    bench_devices,
    bench_host,
    bench_memory,
    bench_policy,
)

RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    """Run everything, or the parts named on the command line."""
    parts = {
        "policy": bench_policy.measure, "card": bench_card.measure,
        "cardlink": bench_cardlink.measure, "hook": bench_host.measure_hook,
        "allocate": bench_host.measure_allocate, "rest": bench_host.measure_rest,
        "passthrough": bench_devices.measure, "memory": bench_memory.measure,
        "combination": bench_combination.measure,
    }  # fmt: skip
    chosen = sys.argv[1:] or list(parts)
    for unknown in set(chosen) - set(parts):
        print(f"there is no benchmark {unknown!r}; there are: {', '.join(parts)}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for name in chosen:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        rows += parts[name]()
    table = Table("what", "measured", "unit", "target", "met")
    for row in rows:
        met = "yes" if row["met"] else "NO"
        bound = ">=" if row.get("at least") else "<="
        table.add_row(row["what"], str(row["value"]), row["unit"], f"{bound} {row['target']}", met)
    Console(width=110).print(table)
    report = {"at": time.time(), "machine": platform.platform(), "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
