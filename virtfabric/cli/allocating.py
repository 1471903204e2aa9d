"""`allocate` and `release`: change what a running guest has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.cli.arguments import CPU_WANT, DEVICE_WANT, DURATION, MEMORY_WANT, TIER
from virtfabric.cli.screen import print_json, print_lines
from virtfabric.cli.session import DONE, ask, run_job
from virtfabric.cli.tables import outcome_lines, plan_lines

if TYPE_CHECKING:
    import argparse


def _wants(args: argparse.Namespace) -> dict[str, str]:
    given = {
        "cpu": args.cpu, "memory": args.memory, "for": args.lease, "deadline": args.deadline,
        "key": args.key, "tier": args.tier, "partial": "yes" if args.partial else None,
    }  # fmt: skip
    devices = dict(args.device or ())
    return {name: value for name, value in given.items() if value is not None} | devices


def _allocate(args: argparse.Namespace) -> int:
    if args.cpu is None and args.memory is None and not args.device:
        args.parser.error("give --cpu, --memory or --device")
    if args.tier is not None and args.memory is None:
        args.parser.error("--tier goes with --memory")
    if args.device and len(dict(args.device)) < len(args.device):
        args.parser.error("one --device for each capability: net.vf:+2, not net.vf twice")
    wants = _wants(args)
    if args.dry_run:
        plan = ask(args, "Plan", args.guest, wants)
        if args.json:
            print_json(plan)
        else:
            print_lines(plan_lines(args.guest, plan))
        return DONE
    return _tell(args, args.guest, run_job(args, "Allocate", args.guest, wants))


def _release(args: argparse.Namespace) -> int:
    return _tell(args, f"release of {args.grant}", run_job(args, "Release", args.grant))


def _tell(args: argparse.Namespace, subject: str, job: dict[str, Any]) -> int:
    if args.json:
        print_json(job)
    else:
        print_lines(outcome_lines(subject, job["result"] or {}))
    return DONE


def add_parsers(subparsers: Any) -> None:
    """Register the commands."""
    parser = subparsers.add_parser(
        "allocate",
        help="give a running guest more, or take from it",
        description="Bring a running guest to an amount, or change it by one. Free capacity is\n"
        "used first, then guests of lower priority pay. All or nothing, unless\n"
        "--partial. Ctrl-C cancels and undoes.",
        example="virtfabric allocate db --cpu +2 --memory +4G --device net.vf --for 10m",
    )
    parser.add_argument("guest", help="name or UUID")
    parser.add_argument("--cpu", type=CPU_WANT, metavar="N|+N|-N", help="CPUs: 2, +1, -0.5, +500m")
    parser.add_argument(
        "--memory", type=MEMORY_WANT, metavar="SIZE|+SIZE|-SIZE", help="memory: 4G, +64M, -512MiB"
    )
    parser.add_argument(
        "--tier", type=TIER, metavar="TIER",
        help="what kind of memory --memory is of: dram (default) or cxl; whole blocks only then",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=DEVICE_WANT, action="append", metavar="CAP[:N|:+N|:-N]",
        help="PCIe functions: net.vf (one more), net.vf:2 (two in all), net.vf:-1; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--for", dest="lease", type=DURATION, metavar="TIME",
        help="a lease: it ends by itself after 90s, 10m, 2h...",
    )  # fmt: skip
    parser.add_argument("--partial", action="store_true", help="take what fits")
    parser.add_argument(
        "--deadline", type=DURATION, metavar="S", help="seconds for the whole request (30)"
    )
    parser.add_argument("--key", help="idempotency key: repeating it gives the first outcome")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, change nothing")
    parser.set_defaults(run=_allocate, parser=parser)

    text = "end a grant; what others paid for it goes home"
    parser = subparsers.add_parser(
        "release", help=text, description=text, example="virtfabric release g-1f2e3d4c"
    )
    parser.add_argument("grant", help="id, see virtfabric grants")
    parser.set_defaults(run=_release)
