"""`virtfabric devices`: PCIe functions. `record` is a local command and needs no agent."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtfabric.cli.devicetables import device_table, device_tree_lines
from virtfabric.cli.screen import note, print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, ask, run_job
from virtfabric.model.device import PciAddress

if TYPE_CHECKING:
    import argparse


def _devices(args: argparse.Namespace) -> int:
    functions = ask(args, "ListDevices")
    if args.json:
        print_json(functions)
    elif args.tree:
        print_lines(device_tree_lines(functions))
    else:
        print_tables([device_table(functions)])
    return DONE


def _release(args: argparse.Namespace) -> int:
    address = PciAddress.parse(args.address, field="ADDRESS")
    job = run_job(args, "ReleaseDevice", address)
    if args.json:
        print_json(job)
    else:
        steps = (job["result"] or {}).get("steps") or []
        print_lines([f"{address} is out of quarantine", *(f"  step: {s}" for s in steps)])
    return DONE


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
        example="virtfabric devices --tree",
    )
    devices.add_argument("--tree", action="store_true", help="ports with what is behind them")
    devices.set_defaults(run=_devices)
    commands = devices.add_subparsers(dest="devices_command", metavar="COMMAND")
    text = "let a function out of quarantine"
    release = commands.add_parser(
        "release",
        help=text,
        description=f"Look at a function again and {text}: it is reset and goes back to the\n"
        "driver that it had. It stays where a guest has it still, the host uses it, or the\n"
        "reset fails.",
        example="virtfabric devices release 0000:3b:10.1",
    )
    release.add_argument("address", metavar="ADDRESS", help="see virtfabric devices")
    release.set_defaults(run=_release)
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
