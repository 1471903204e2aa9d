"""`virtfabric card`: one card. Local are `provision`, `sign` and `conformance`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtfabric.cli import provisioning
from virtfabric.cli.cardtables import card_lines, slice_table
from virtfabric.cli.screen import Table, print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, FAILED, ask, run_job

if TYPE_CHECKING:
    import argparse


def _show(args: argparse.Namespace) -> int:
    card = ask(args, "ShowCard", args.serial)
    if args.json:
        print_json(card)
        return DONE
    print_lines(card_lines(card))
    print()
    print_tables([slice_table(card["slice_list"])])
    return DONE


def _trust(args: argparse.Namespace) -> int:
    card = ask(args, "TrustCard", args.serial)
    if args.json:
        print_json(card)
    else:
        print_lines([f"card {card['serial']} is trusted anew: {card['condition']}"])
    return DONE


def _program(args: argparse.Namespace) -> int:
    job = run_job(args, "ProgramSlice", args.slice, str(args.image.absolute()))
    if args.json:
        print_json(job)
    else:
        result = job["result"]
        print_lines([f"slice {args.slice} runs image {result['image']}"])
    return DONE


def _conformance(args: argparse.Namespace) -> int:
    # imported late: TLS, and nothing else needs it
    suite = import_module("virtfabric.adapters.cardlink.conformance")
    image = (args.image, args.capability) if args.image else None
    results = suite.run_suite(args.socket, args.credentials, args.serial, image=image)
    failed = [one for one in results if one.outcome == suite.Outcome.FAILED]
    if args.json:
        print_json({"results": [one.to_json() for one in results], "failed": len(failed)})
    else:
        rows = tuple((one.area, one.name, one.outcome.value, one.detail) for one in results)
        print_tables([Table("conformance", ("area", "the card", "outcome", "detail"), rows)])
        skipped = sum(one.outcome == suite.Outcome.SKIPPED for one in results)
        print_lines([f"{len(results)} checks, {skipped} skipped, {len(failed)} failed"])
    return FAILED if failed else DONE


def add_parsers(subparsers: Any) -> None:
    """Register `card` and its commands."""
    card = subparsers.add_parser(
        "card",
        help="one offload card: show, program, trust, provision, conformance",
        description="Offload cards: see docs/card.md.",
        example="virtfabric card show C-1",
    )
    commands = card.add_subparsers(dest="card_command", metavar="COMMAND", required=True)
    show = commands.add_parser(
        "show", help="one card with its slices", description="One card with its slices.",
        example="virtfabric card show C-1",
    )  # fmt: skip
    show.add_argument("serial", metavar="SERIAL", help="see virtfabric cards")
    show.set_defaults(run=_show)
    program = commands.add_parser(
        "program",
        help="load an image into a slice",
        description=(
            "Load a signed image into all parts of a slice that have accelerators.\n"
            "IMAGE.manifest lies beside it (virtfabric card sign). Until it runs, and after any\n"
            "failure, what ran before runs on. The agent reads the file: it is on its host."
        ),
        example="virtfabric card program aes-for-db aes.img",
    )
    program.add_argument("slice", metavar="SLICE", help="its name, see virtfabric slices")
    program.add_argument("image", type=Path, metavar="IMAGE", help="the image's file")
    program.set_defaults(run=_program)
    trust = commands.add_parser(
        "trust",
        help="believe a card again that was distrusted",
        description=(
            "Believe a card again that said what cannot be true, or that was replaced. What it\n"
            "says from now on counts; slices that it does not have any more are made anew where\n"
            "there is room."
        ),
        example="virtfabric card trust C-1",
    )
    trust.add_argument("serial", metavar="SERIAL", help="see virtfabric cards")
    trust.set_defaults(run=_trust)
    conformance = commands.add_parser(
        "conformance",
        help="check a card against the protocol",
        description=(
            "Check whether a card keeps to docs/card-protocol.md: greeting, versions, refusals,\n"
            "replay, truncated frames, promises, images. The card must be in nobody's use: slices\n"
            "are made and ended. Needs no agent. Exit code 1 if a check fails."
        ),
        example="virtfabric card conformance C-1.sock --serial C-1 --credentials host-a",
    )
    conformance.add_argument("socket", type=Path, metavar="SOCKET", help="where the card listens")
    conformance.add_argument("--serial", required=True, metavar="SERIAL", help="of the card")
    conformance.add_argument(
        "--credentials", type=Path, required=True, metavar="DIR",
        help="of a host, made by virtfabric card provision --host",
    )  # fmt: skip
    conformance.add_argument(
        "--image", type=Path, metavar="FILE", help="a signed image, for the checks of images"
    )
    conformance.add_argument(
        "--capability", default="crypto.aes", metavar="WORD", help="of the image (%(default)s)"
    )
    conformance.set_defaults(run=_conformance)
    provisioning.add_parsers(commands)
