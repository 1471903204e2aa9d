"""Commands that only read: status, guests, host, grants, loans, jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.cli import tables
from virtfabric.cli.cardtables import arbiter_lines, card_table
from virtfabric.cli.screen import print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, ask

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from virtfabric.cli.screen import Table


def _status(args: argparse.Namespace) -> int:
    status = ask(args, "GetStatus")
    if args.json:
        print_json(status)
        return DONE
    host, guests = status["host"], status["guests"]
    print_lines(tables.capacity_lines(host))
    print_lines(arbiter_lines(status["arbiter"]) if "arbiter" in status else [])
    print_lines([f"alert: {a}" for a in status["alerts"]])
    print()
    print_tables(
        [
            tables.pcpu_map(host, guests),
            tables.memory_table(host),
            tables.guest_table(guests),
            *filter(None, [tables.held_memory_table(guests)]),
            tables.loan_table(status["loans"]),
            *([card_table(status["cards"])] if status.get("cards") else []),
        ]
    )
    return DONE


def _host(args: argparse.Namespace) -> int:
    host = ask(args, "GetHost")
    if args.json:
        print_json(host)
        return DONE
    print_lines([f"host {host['host_id']}", *tables.capacity_lines(host)])
    print()
    print_tables([tables.cpu_table(host), tables.memory_table(host)])
    return DONE


def _listing(method: str, table: Callable[[Any], Table]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        listed = ask(args, method)
        if args.json:
            print_json(listed)
        else:
            print_tables([table(listed)])
        return DONE

    return run


def add_parsers(subparsers: Any) -> None:
    """Register the commands."""
    commands: tuple[tuple[str, str, Callable[[argparse.Namespace], int]], ...] = (
        ("status", "who is on which pCPU, memory by node, guests, loans", _status),
        ("guests", "guests with what they hold", _listing("ListGuests", tables.guest_table)),
        ("host", "every pCPU and node of the machine", _host),
        ("grants", "open grants", _listing("ListGrants", tables.grant_table)),
        ("loans", "open loans: who paid for whom", _listing("ListLoans", tables.loan_table)),
        ("jobs", "running and recent jobs", _listing("ListJobs", tables.job_table)),
    )
    for name, text, run in commands:
        parser = subparsers.add_parser(
            name, help=text, description=text, example=f"virtfabric {name} --json"
        )
        parser.set_defaults(run=run)
