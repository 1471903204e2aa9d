"""Reading of argument values and the parser that all commands share; no I/O."""

from __future__ import annotations

import argparse
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import Bytes, MilliCpu
from virtfabric.model.want import DEVICE, parse_device, parse_duration, parse_tier, parse_want

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_HelpText: Final = argparse.RawDescriptionHelpFormatter
_WIDTH: Final = 80
"""Until help is asked for: argparse makes a formatter for each option that is added, and one that
looks for the terminal's width loads shutil with all its compressors."""
_SIGNED: Final = ("--cpu", "--memory")
_NEGATIVE: Final = re.compile(r"-\.?[0-9].*")


class CommandParser(argparse.ArgumentParser):
    """A parser whose commands all know `--json` and `--bus`, wherever they stand.

    But for `lab run`, to which all that follows LAB is the command.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        """As `ArgumentParser`; `example` ends the help text."""
        kwargs.setdefault("formatter_class", partial(_HelpText, width=_WIDTH))
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("conflict_handler", "resolve")
        if example:
            kwargs["epilog"] = f"example:\n  {example}"
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document"
        )
        self.add_argument(
            "--bus", metavar="ADDRESS", default=argparse.SUPPRESS,
            help="D-Bus address of the agent's bus (default: the system bus)",
        )  # fmt: skip

    def format_help(self) -> str:
        """As wide as the terminal."""
        self.formatter_class = _HelpText
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Usage errors end with code 2 and point to the help."""
        self.exit(2, f"{self.prog}: {message}\nsee {self.prog} --help\n")


def join_signed(argv: Sequence[str]) -> list[str]:
    """`--memory -64M` -> `--memory=-64M`: argparse takes `-64M` for an option."""
    joined: list[str] = []
    for token in argv:
        if joined and joined[-1] in _SIGNED and _NEGATIVE.fullmatch(token):
            joined[-1] = f"{joined[-1]}={token}"
        else:
            joined.append(token)
    return joined


def checked(check: Callable[[str], T]) -> Callable[[str], T]:
    """A `type` for argparse that keeps our message; argparse names the option itself."""

    def read(text: str) -> T:
        try:
            return check(text)
        except InvalidValueError as error:
            advice = f" ({error.advice})" if error.advice else ""
            message = f"{error}{advice}"
            raise argparse.ArgumentTypeError(message.removeprefix(": ")) from None

    return read


def _cpu(text: str) -> str:
    parse_want(text, MilliCpu.parse, field="")
    return text


def _memory(text: str) -> str:
    parse_want(text, Bytes.parse, field="")
    return text


def _tier(text: str) -> str:
    parse_tier(text, field="")
    return text


def _device(text: str) -> tuple[str, str]:
    """`net.vf`, `net.vf:2`, `net.vf:-1`: key and value of what is wanted."""
    capability, colon, amount = text.partition(":")
    key, want = f"{DEVICE}{capability}", amount if colon else "+1"
    parse_device(key, want)
    return key, want


def _duration(text: str) -> str:
    parse_duration(text, field="")
    return text


CPU_WANT: Final = checked(_cpu)
MEMORY_WANT: Final = checked(_memory)
TIER: Final = checked(_tier)
DEVICE_WANT: Final = checked(_device)
DURATION: Final = checked(_duration)
