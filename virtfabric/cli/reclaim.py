"""`virtfabric memory reclaim`: a CXL node's memory called home from the guests that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.cli.screen import print_json, print_lines
from virtfabric.cli.session import DONE, FAILED, ask, run_job
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    import argparse

    Json = dict[str, Any]


def _reclaim(args: argparse.Namespace) -> int:
    wants = {"node": args.node}
    for word in ("size", "deadline"):
        if (value := getattr(args, word)) is not None:
            wants[word] = value
    if args.detach:
        wants["detach"] = "yes"
    if args.dry_run:
        plan = ask(args, "PlanReclaim", wants)
        if args.json:
            print_json(plan)
        else:
            print_lines(plan_lines(plan))
        return DONE
    job = run_job(args, "ReclaimMemory", wants)
    result = job["result"]
    if args.json:
        print_json(job)
    else:
        print_lines(result_lines(result))
    return FAILED if result["out"] else DONE


def plan_lines(plan: Json) -> list[str]:
    """Who would be asked for what."""
    head = (
        f"node {plan['node']}: {Bytes(plan['planned'])} of {Bytes(plan['asked'])} can be asked for"
    )
    return [
        f"{head} (dry run, nothing changed)",
        *(f"  {part['text']}" for part in plan["parts"]),
        *(f"  {one['name']}: empty {one['alias']} is detached" for one in plan["empty"]),
        *(f"  {text}" for text in (*plan["others"], *plan["notes"])),
    ]


def result_lines(result: Json) -> list[str]:
    """What came home, and what is still out."""
    head = f"node {result['node']}: {Bytes(result['freed'])} of {Bytes(result['asked'])} came home"
    if result["out"]:
        head += f", {Bytes(result['out'])} still out"
    return [
        head,
        *(f"  {one['text']}" for one in result["guests"]),
        *(f"  {one['name']}: {one['alias']} is detached" for one in result["detached"]),
        *(f"  left undone: {text}" for text in result["kept"]),
        *(f"  {text}" for text in result["others"]),
    ]


def add_parser(subparsers: Any) -> None:
    """Register `reclaim`, below `memory`."""
    reclaim = subparsers.add_parser(
        "reclaim",
        help="call the memory of a CXL node home from guests",
        description=(
            "Ask the guests that have memory of a CXL node to give it back, the lowest priority\n"
            "first, none below its floor. What comes home stays home, whatever the others do;\n"
            "exit code 1 when some is still out."
        ),
        example="virtfabric memory reclaim 2 --detach",
    )
    reclaim.add_argument("node", metavar="NODE", help="number of the node, see virtfabric memory")
    reclaim.add_argument("--size", metavar="SIZE", help="so much of it (all)")
    reclaim.add_argument("--deadline", metavar="TIME", help="for each guest, like 30s")
    reclaim.add_argument(
        "--detach", action="store_true",
        help="empty memory devices of the node leave their guests: a port and a slot are free",
    )  # fmt: skip
    reclaim.add_argument("--dry-run", action="store_true", help="print who is asked for what")
    reclaim.set_defaults(run=_reclaim)
