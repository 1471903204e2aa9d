"""`virtfabric devices`: PCIe functions. `record` is a local command: it needs no agent."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtfabric.cli.screen import note, print_json
from virtfabric.cli.session import DONE

if TYPE_CHECKING:
    import argparse


def _record(args: argparse.Namespace) -> int:
    # imported late: no other command reads devices by itself
    record = import_module("virtfabric.adapters.pci.record")
    count = record.record_machine(Path(args.directory), sys=args.sys, proc=args.proc)
    if os.geteuid() != 0:
        note("not root: what ACS isolates could not be read and is not in the record")
    if args.json:
        print_json({"directory": args.directory, "functions": count})
    else:
        print(f"{count} functions recorded in {args.directory}")
    return DONE


def add_parsers(subparsers: Any) -> None:
    """Register `devices` and its commands."""
    devices = subparsers.add_parser(
        "devices",
        help="PCIe functions of the host",
        description="PCIe functions: what there is, who has it, why one cannot be assigned.",
    )
    commands = devices.add_subparsers(dest="devices_command", required=True, metavar="COMMAND")
    record = commands.add_parser(
        "record",
        help="record this host's functions as test data",
        description=(
            "Records what the inventory reads of this host: ids, drivers, IOMMU groups, links,\n"
            "ACS, names of interfaces and block devices, mount points, swap. Serial numbers, MAC\n"
            "addresses and vital product data are left out. Needs no agent; ACS needs root."
        ),
        example="virtfabric devices record my-server",
    )
    record.add_argument("directory", metavar="DIR", help="a new or empty directory")
    for name in ("sys", "proc"):
        record.add_argument(
            f"--{name}", type=Path, default=Path(f"/{name}"), metavar="ROOT",
            help=f"read there (default: /{name})",
        )  # fmt: skip
    record.set_defaults(run=_record)
