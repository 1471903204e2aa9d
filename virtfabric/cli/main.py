"""`virtfabric`: parses the command line, runs one command, turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Final

from virtfabric import __version__
from virtfabric.cli.arguments import CommandParser, join_signed
from virtfabric.cli.screen import note, print_json
from virtfabric.cli.session import FAILED, exit_code
from virtfabric.cli.tables import amounts_text
from virtfabric.dbus.errors import wire_error
from virtfabric.model.errors import Reason, RefusedError, VirtfabricError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

COMMANDS: Final = ("reading", "policy", "ports", "allocating", "trail", "install", "hooks",
                   "doctor", "lab", "devices", "memory", "slices", "card")  # fmt: skip
"""Modules of this package that register commands with `add_parsers(subparsers)`."""
MODULE_OF: Final = {
    **dict.fromkeys(("allocate", "release"), "allocating"),
    **dict.fromkeys(("status", "guests", "grants", "loans", "jobs"), "reading"),
    **dict.fromkeys(("explain", "audit", "drift", "watch"), "trail"),
    "devices": "devices",
}  # fmt: skip
"""Of commands that scripts run often: theirs alone is loaded, which halves the start."""
_EXIT_CODES: Final = (
    "exit codes: 0 done, 1 failed, 2 usage, 3 refused (no capacity or not allowed), "
    "4 agent not reachable"
)


def build_parser(command: str = "") -> CommandParser:
    """The whole command line, or as much of it as `command` needs.

    A command's parser sets `run`: namespace -> exit code.
    """
    parser = CommandParser(
        prog="virtfabric",
        description="Changes the hardware under running libvirt guests, through virtfabricd.",
        epilog=_EXIT_CODES,
    )
    # other names than the commands' own --json and --bus, which would override these
    parser.add_argument("--json", dest="json_first", action="store_true", help="print JSON")
    parser.add_argument("--bus", dest="bus_first", metavar="ADDRESS", help="the agent's bus")
    parser.add_argument("--version", action="version", version=f"virtfabric {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    only = MODULE_OF.get(command)
    for name in (only,) if only else COMMANDS:
        import_module(f"virtfabric.cli.{name}").add_parsers(subparsers)
    return parser


def command_in(argv: Sequence[str]) -> str:
    """The command: the first word that is no option, nor the value of one; empty for none.

    Empty also where help is asked for before it: that is about every command.
    """
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help"):
            return ""
        if word == "--bus":
            next(words, None)
        elif not word.startswith("-"):
            return word
    return ""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args = build_parser(command_in(argv)).parse_args(join_signed(argv))
    args.json = getattr(args, "json", False) or args.json_first
    args.bus = getattr(args, "bus", None) or args.bus_first
    return args


def _tell_refusal(error: RefusedError) -> None:
    no = error.refusal
    if no.reason is Reason.CANCELLED:
        note("virtfabric: cancelled, nothing changed")
        return
    note(f"virtfabric: refused ({no.reason.value}): {no.detail}")
    for line in no.considered:
        note(f"  considered: {line}")
    if no.would_fit:
        note(f"  would fit: {amounts_text(no.would_fit)}")


def _tell(error: VirtfabricError, *, as_json: bool) -> int:
    if as_json:
        print_json({"error": wire_error(error).document})
    if isinstance(error, RefusedError):
        _tell_refusal(error)
    else:
        note(f"virtfabric: {error}")
    if error.advice and error.advice not in str(error):
        note(f"  advice: {error.advice}")
    return exit_code(error)


def _run(args: argparse.Namespace) -> int:
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except VirtfabricError as error:
        return _tell(error, as_json=args.json)
    except KeyboardInterrupt:
        note("virtfabric: interrupted")
        return FAILED
    except BrokenPipeError:
        # `virtfabric audit | head`: nobody reads on; keep the interpreter from saying so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed, 2 usage, 3 refused, 4 the agent does not answer.
    """
    return _run(_parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
