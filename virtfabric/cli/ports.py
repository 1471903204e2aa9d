"""`ports` and `ports add`: where functions can be plugged, and more room for the next boot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.screen import Table, print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, ask
from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    import argparse

    Json = dict[str, Any]

_ADD: Final = "add"
_NEXT_BOOT: Final = (
    "they are there once the guest was shut down and started; a reboot is too little"
)


def port_table(title: str, side: Json) -> Table:
    """The ports of one definition, by index."""
    rows = [
        (str(p["index"]), p["address"] or "-", p["model"], ", ".join(p["users"]) or _idle(p))
        for p in side["ports"]
    ]
    heading = f"{title}: {len(rows)} ports, {side['free']} free"
    return Table(heading, ("bus", "address", "model", "used by"), tuple(rows))


def _idle(port: Json) -> str:
    return "free" if port["free"] else "no hot-plug"


def _tables(document: Json) -> list[Table]:
    sides = (("live", "now"), ("persistent", "next boot"))
    return [port_table(title, document[key]) for key, title in sides if document[key] is not None]


def _run(args: argparse.Namespace) -> int:
    adding = len(args.words) == 2 and args.words[0] == _ADD
    if len(args.words) != 1 and not adding:
        args.parser.error("give a guest, or `add` and a guest")
    if adding != (args.count is not None):
        args.parser.error("--count N goes with `add`" if args.count is not None else "give --count")
    guest = args.words[-1]
    document = ask(args, "AddPorts", guest, _count(args.count)) if adding else _show(args, guest)
    if args.json:
        print_json(document)
        return DONE
    if adding:
        added = len(document["added"])
        print_lines([f"{document['name']}: {added} root ports added; {_NEXT_BOOT}", ""])
    print_tables(_tables(document))
    return DONE


def _show(args: argparse.Namespace, guest: str) -> Any:
    return ask(args, "ListPorts", guest)


def _count(count: int) -> int:
    """What the bus can carry; the agent says what fits."""
    if not 1 <= count < 1 << 32:
        raise InvalidValueError("--count", count, "is not at least 1")
    return count


def add_parsers(subparsers: Any) -> None:
    """Register the command."""
    text = "PCIe ports of a guest: used and free, now and at the next boot; add more"
    parser = subparsers.add_parser(
        "ports",
        help=text,
        description=f"{text}. Adding edits the guest's persistent definition; the addresses of "
        "its devices stay as they are.",
        example="virtfabric ports add db --count 4",
    )
    parser.add_argument("words", nargs="+", metavar="[add] GUEST", help="name or UUID")
    parser.add_argument("--count", type=int, metavar="N", help="with `add`: how many more")
    parser.set_defaults(run=_run, parser=parser)
