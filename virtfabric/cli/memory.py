"""`virtfabric memory`: NUMA nodes and CXL memory. `record` is local and needs no agent."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtfabric.cli import reclaim, regions
from virtfabric.cli.memorytables import memory_tables, memory_tree_lines, problem_lines
from virtfabric.cli.screen import print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, ask, run_job

if TYPE_CHECKING:
    import argparse


def _memory(args: argparse.Namespace) -> int:
    memory = ask(args, "GetMemory")
    if args.json:
        print_json(memory)
        return DONE
    if args.tree:
        print_lines(memory_tree_lines(memory))
    else:
        print_tables(memory_tables(memory))
    print_lines(problem_lines(memory))
    return DONE


def _release(args: argparse.Namespace) -> int:
    job = run_job(args, "ReleaseMemory", args.subject)
    if args.json:
        print_json(job)
    else:
        print(f"{args.subject} is out of quarantine; it was there because {job['result']['was']}")
    return DONE


def _record(args: argparse.Namespace) -> int:
    # imported late: no other command reads memory by itself
    record = import_module("virtfabric.adapters.cxl.record")
    found = record.record_memory(Path(args.directory), sys=args.sys, proc=args.proc)
    if args.json:
        counts = {"memdevs": len(found.memdevs), "regions": len(found.regions)}
        print_json({"directory": args.directory, **counts})
    else:
        print(
            f"{len(found.memdevs)} memdevs and {len(found.regions)} regions recorded in "
            f"{args.directory}"
        )
    return DONE


def add_parsers(subparsers: Any) -> None:
    """Register `memory` and its commands."""
    memory = subparsers.add_parser(
        "memory",
        help="NUMA nodes and CXL memory of the host",
        description=(
            "Memory of every kind: NUMA nodes by tier, what can be taken offline and why the rest\n"
            "cannot, huge pages; CXL windows, regions, memdevs with their health and poison."
        ),
        example="virtfabric memory --tree",
    )
    memory.add_argument("--tree", action="store_true", help="CXL ports with what is behind them")
    memory.set_defaults(run=_memory)
    commands = memory.add_subparsers(dest="memory_command", metavar="COMMAND")
    regions.add_parsers(commands)
    text = "let memory out of quarantine"
    release = commands.add_parser(
        "release",
        help=text,
        description=f"Ask the memdevs anew and {text}: it is granted again. It stays where a\n"
        "memdev lists poison still, or a node has memory that nothing answers for.",
        example="virtfabric memory release 0x100",
    )
    release.add_argument(
        "subject", metavar="SERIAL|NODE", help="a memdev's serial, or node2; see virtfabric memory"
    )
    release.set_defaults(run=_release)
    reclaim.add_parser(commands)
    record = commands.add_parser(
        "record",
        help="record this host's memory as test data",
        description=(
            "Records what the inventory reads of this host: nodes, zones, huge pages, CXL devices\n"
            "with their serial numbers, windows, regions. Needs no agent."
        ),
        example="virtfabric memory record my-server",
    )
    record.add_argument("directory", metavar="DIR", help="a new or empty directory")
    for name in ("sys", "proc"):
        record.add_argument(
            f"--{name}", type=Path, default=Path(f"/{name}"), metavar="ROOT",
            help=f"read there (default: /{name})",
        )  # fmt: skip
    record.set_defaults(run=_record)
