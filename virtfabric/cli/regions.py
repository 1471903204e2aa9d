"""`virtfabric memory region`: CXL regions made and taken down through the agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.cli.screen import print_json, print_lines
from virtfabric.cli.session import DONE, ask, run_job
from virtfabric.model.cxl import Serial
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    import argparse


def _create(args: argparse.Namespace) -> int:
    members = [str(Serial.parse(text, field="--memdev")) for text in args.memdev]
    wants = {"window": args.window, "memdevs": ",".join(members)}
    for word in ("ways", "granularity", "size"):
        if (value := getattr(args, word)) is not None:
            wants[word] = value
    if args.normal:
        wants["use"] = "normal"
    if args.dry_run:
        return _show_plan(args, ask(args, "PlanRegion", wants))
    job = run_job(args, "CreateRegion", wants)
    if args.json:
        print_json(job)
    else:
        print_lines(_created_lines(job["result"]))
    return DONE


def _created_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['region']}: {Bytes(result['size'])}"]
    for node in result["nodes"]:
        why = f" ({node['withheld']})" if node["withheld"] else ""
        lines.append(f"  node {node['node']}: {Bytes(node['grantable'])} may be granted{why}")
    return [*lines, *(f"  step: {step}" for step in result["steps"])]


def _destroy(args: argparse.Namespace) -> int:
    if args.dry_run:
        return _show_plan(args, ask(args, "PlanRegionEnd", args.region))
    job = run_job(args, "DestroyRegion", args.region)
    if args.json:
        print_json(job)
    else:
        steps = (f"  step: {step}" for step in job["result"]["steps"])
        print_lines([f"{args.region} is gone", *steps])
    return DONE


def _show_plan(args: argparse.Namespace, plan: dict[str, Any]) -> int:
    if args.json:
        print_json(plan)
    else:
        print_lines([step["text"] for step in plan["steps"]])
    return DONE


def add_parsers(subparsers: Any) -> None:
    """Register `region` and its commands, below `memory`."""
    region = subparsers.add_parser(
        "region",
        help="make CXL regions, and take them down",
        description="Regions of CXL memory: each becomes a NUMA node, or part of one.",
        example="virtfabric memory region create --window decoder0.0 --memdev 0x100",
    )
    commands = region.add_subparsers(dest="region_command", metavar="COMMAND", required=True)
    create = commands.add_parser(
        "create",
        help="make a region and bring its memory online",
        description=(
            "Make a volatile region of memdevs in a window, and bring its memory online, movable\n"
            "so that it can be taken back. All of it happens or nothing."
        ),
        example="virtfabric memory region create --window 0x150000000 --memdev 0x100 0x101",
    )
    create.add_argument(
        "--window", required=True, metavar="W", help="base or decoder, see virtfabric memory"
    )
    create.add_argument(
        "--memdev", required=True, nargs="+", action="extend", metavar="SERIAL",
        help="serials; more than one are interleaved, in the order that the window needs",
    )  # fmt: skip
    create.add_argument("--ways", metavar="N", help="how many memdevs there must be, as a check")
    create.add_argument(
        "--granularity", metavar="BYTES", help="before the next memdev's turn (the window's)"
    )
    create.add_argument("--size", metavar="SIZE", help="of the whole region (all of the memdevs)")
    create.add_argument(
        "--normal", action="store_true",
        help="let the kernel put its own data there: the memory can never be taken back",
    )  # fmt: skip
    create.add_argument("--dry-run", action="store_true", help="print the steps, change nothing")
    create.set_defaults(run=_create)
    destroy = commands.add_parser(
        "destroy",
        help="take a region's memory offline and destroy it",
        description=(
            "Take a region down that this agent made. Refused while a guest has memory there or\n"
            "a plan is about to give it some."
        ),
        example="virtfabric memory region destroy region0",
    )
    destroy.add_argument("region", metavar="NAME", help="see virtfabric memory")
    destroy.add_argument("--dry-run", action="store_true", help="print the steps, change nothing")
    destroy.set_defaults(run=_destroy)
