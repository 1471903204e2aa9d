"""Reading of argument values and the parser that all commands share; no I/O."""

from __future__ import annotations

import argparse
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from virtfabric.daemon.intake import parse_policy_changes, parse_wish
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import Bytes, MilliCpu
from virtfabric.model.want import DEVICE, parse_device, parse_duration, parse_tier, parse_want

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_SIGNED: Final = ("--cpu", "--memory")
_NEGATIVE: Final = re.compile(r"-\.?[0-9].*")
_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]+)?")


class CommandParser(argparse.ArgumentParser):
    """A parser whose commands all know `--json` and `--bus`, wherever they stand."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        """As `ArgumentParser`; `example` ends the help text."""
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
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


def _checked(check: Callable[[str], T]) -> Callable[[str], T]:
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


def _wish(text: str) -> tuple[str, str]:
    """`net.vf`, `net.vf:2`, `net.vf:2:reclaimable`, `net.vf:0`: key and value of a change.

    A capability alone asks for one.
    """
    capability, _, wish = text.partition(":")
    key, value = f"{DEVICE}{capability}", wish if ":" in text else "1"
    parse_wish(key, value, None)
    return key, value


def _duration(text: str) -> str:
    parse_duration(text, field="")
    return text


def parse_since(text: str, now: float) -> float:
    """`10m` (ago), UNIX seconds, or a date and time as ISO 8601 has it (local without a zone).

    Raises:
        InvalidValueError: none of these.
    """
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except (ValueError, OverflowError):
        pass
    try:
        return max(0.0, now - parse_duration(text, field="--since"))
    except InvalidValueError:
        raise InvalidValueError(
            "--since", text, "is not a time", advice="like 10m, 2026-01-31T12:00 or UNIX seconds"
        ) from None


def check_policy(changes: dict[str, str]) -> None:
    """Find what is malformed before anything is sent.

    Raises:
        InvalidValueError: names the field and the value.
    """
    parse_policy_changes(None, changes)


CPU_WANT: Final = _checked(_cpu)
MEMORY_WANT: Final = _checked(_memory)
TIER: Final = _checked(_tier)
DEVICE_WANT: Final = _checked(_device)
DEVICE_WISH: Final = _checked(_wish)
DURATION: Final = _checked(_duration)
