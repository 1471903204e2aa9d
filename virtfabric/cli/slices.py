"""`virtfabric cards`, `slices` and `slice`: offload cards as one pool, and what is made of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtfabric.cli.cardtables import card_table, slice_table
from virtfabric.cli.screen import print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, ask, run_job
from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    import argparse

_MOST: int = 1 << 20


def _cards(args: argparse.Namespace) -> int:
    cards = ask(args, "ListCards")
    if args.json:
        print_json(cards)
    else:
        print_tables([card_table(cards)])
    return DONE


def _slices(args: argparse.Namespace) -> int:
    slices = ask(args, "ListSlices")
    if args.json:
        print_json(slices)
    else:
        print_tables([slice_table(slices)])
    return DONE


def _create(args: argparse.Namespace) -> int:
    text, options = _read(args.file), {}
    if args.guest:
        options["guest"] = args.guest
    if args.no_reclaim:
        options["reclaim"] = "no"
    if args.dry_run:
        return _show_plan(args, ask(args, "PlanSlices", text, options))
    job = run_job(args, "CreateSlices", text, options)
    if args.json:
        print_json(job)
        return DONE
    made = job["result"]["slices"]
    lines = [
        f"slice {one['part']['name'] or one['wish']}: {one['card']}/{one['slice']}" for one in made
    ]
    print_lines([*lines, *(f"  step: {step}" for step in job["result"]["steps"])])
    return DONE


def _destroy(args: argparse.Namespace) -> int:
    if args.dry_run:
        return _show_plan(args, ask(args, "PlanSliceEnd", args.slice))
    job = run_job(args, "DestroySlice", args.slice)
    if args.json:
        print_json(job)
    else:
        steps = (f"  step: {step}" for step in job["result"]["steps"])
        print_lines([f"slice {args.slice} is gone", *steps])
    return DONE


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read(_MOST + 1) if name == "-" else Path(name).read_bytes()
        text = data.decode()
    except OSError as error:
        raise InvalidValueError("FILE", name, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidValueError("FILE", name, f"is not UTF-8 at byte {error.start}") from None
    if len(data) > _MOST:
        raise InvalidValueError("FILE", name, f"is larger than {_MOST} bytes")
    return text


def _show_plan(args: argparse.Namespace, plan: dict[str, Any]) -> int:
    if args.json:
        print_json(plan)
    else:
        print_lines([step["text"] for step in plan["steps"]])
    return DONE


def add_parsers(subparsers: Any) -> None:
    """Register `cards`, `slices` and `slice`."""
    cards = subparsers.add_parser(
        "cards",
        help="offload cards: what each has, what is free, how its link is",
        description="Offload cards of the configuration, as each was last told of.",
        example="virtfabric cards",
    )
    cards.set_defaults(run=_cards)
    slices = subparsers.add_parser(
        "slices",
        help="slices of all cards, and who has them",
        description="Slices of all cards, other hosts' too.",
        example="virtfabric slices --json",
    )
    slices.set_defaults(run=_slices)
    one = subparsers.add_parser(
        "slice",
        help="make slices of offload cards, and end them",
        description="Slices: isolated parts of offload cards. What one card does not have is\n"
        "combined from several.",
        example="virtfabric slice create aes.toml --for db",
    )
    commands = one.add_subparsers(dest="slice_command", metavar="COMMAND", required=True)
    create = commands.add_parser(
        "create",
        help="make the slices of a file, all or none",
        description=(
            "Make the slices that a file describes ([[slice]], see docs/card-protocol.md). Slices\n"
            "of a lower priority may have to make way. All of it happens or nothing."
        ),
        example="virtfabric slice create aes.toml --for db --dry-run",
    )
    create.add_argument("file", metavar="FILE", help="TOML; - for standard input")
    create.add_argument("--for", dest="guest", metavar="GUEST", help="who is to have them")
    create.add_argument(
        "--no-reclaim", action="store_true", help="nobody has to make way, whatever the priority"
    )
    create.add_argument("--dry-run", action="store_true", help="print the steps, change nothing")
    create.set_defaults(run=_create)
    destroy = commands.add_parser(
        "destroy",
        help="end a slice, with all its parts",
        description="End a slice of this host. Refused while somebody uses it.",
        example="virtfabric slice destroy aes-for-db",
    )
    destroy.add_argument("slice", metavar="SLICE", help="its name, see virtfabric slices")
    destroy.add_argument("--dry-run", action="store_true", help="print the steps, change nothing")
    destroy.set_defaults(run=_destroy)
