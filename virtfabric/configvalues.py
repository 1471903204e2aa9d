"""Checks of single values of the configuration: what TOML gives, into the type that it means.

Each takes a value and returns it checked; what is wrong is a `WrongValueError`, to which `Source`
adds file and key. Which keys there are is for the sections to know.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtfabric.model.errors import ConfigError, InvalidValueError
from virtfabric.model.units import Bytes, CpuSet, MilliCpu

Check = Callable[[Any], Any]


class WrongValueError(Exception):
    """A value is wrong; the message continues `file: key = value`."""


def check_text(value: Any, *, choices: Sequence[str] = (), empty: bool = False) -> str:
    """Text; one of `choices` if given."""
    if not isinstance(value, str):
        raise WrongValueError("is not text")
    if not value and not empty:
        raise WrongValueError("is empty")
    if choices and value not in choices:
        raise WrongValueError(f"is not one of {', '.join(choices)}")
    return value


def check_path(value: Any) -> Path:
    """An absolute path."""
    path = Path(check_text(value))
    if not path.is_absolute():
        raise WrongValueError("is not an absolute path")
    return path


def check_switch(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise WrongValueError("is not true or false")
    return value


def check_seconds(value: Any, *, least: float, most: float) -> float:
    """A number of seconds, bounds included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongValueError("is not a number of seconds")
    if not least <= value <= most:
        raise WrongValueError(f"is not between {least:g} and {most:g} seconds")
    return float(value)


def check_priority(value: Any) -> int:
    """0 to 100."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100:
        raise WrongValueError("is not a whole number from 0 to 100")
    return value


def check_parsed(value: Any, parse: Callable[[str], Any]) -> Any:
    """Text that `parse` of a model type reads."""
    try:
        return parse(check_text(value))
    except InvalidValueError as error:
        _, _, problem = str(error).partition(repr(error.value) + " ")
        advice = f" ({error.advice})" if error.advice else ""
        raise WrongValueError(f"{problem or error}{advice}") from None


def check_size(value: Any, *, zero: bool = False) -> Bytes:
    """Bytes: text with a unit, or a plain number."""
    # A plain number of bytes is a size too; TOML writes it without quotes.
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    size: Bytes = check_parsed(text, Bytes.parse)
    if not size and not zero:
        raise WrongValueError("must be above 0")
    return size


def check_cpu(value: Any) -> MilliCpu:
    """Milli-CPU: text or a number of CPUs."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    amount: MilliCpu = check_parsed(f"{value:g}" if number else value, MilliCpu.parse)
    if not amount:
        raise WrongValueError("must be above 0")
    return amount


def check_cpus(value: Any) -> CpuSet:
    """A set of pCPUs that is not empty."""
    cpus: CpuSet = check_parsed(value, CpuSet.parse)
    if not cpus:
        raise WrongValueError("names no CPU")
    return cpus


def check_command(value: Any) -> tuple[str, ...]:
    """A command and its arguments, run without a shell; an empty list for none."""
    if not isinstance(value, list):
        raise WrongValueError("is not a list of words")
    words = tuple(check_text(word) for word in value)
    if words:
        check_path(words[0])
    return words


def check_group(value: Any) -> str:
    """A group's name or gid; empty for none."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    return check_text(value, empty=True)


def check_user(value: Any) -> str:
    """A user's name or uid, or `*`."""
    text = check_group(value)
    if not text:
        raise WrongValueError("is empty")
    return text


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from (a file, or the options): checks them, and names it in errors."""

    name: str

    def fail(self, key: str, value: Any, problem: str, *, advice: str = "") -> ConfigError:
        """The error for one key of it."""
        shown = repr(value) if not isinstance(value, dict) else "{...}"
        return ConfigError(f"{self.name}: {key} = {shown} {problem}", advice=advice)

    def check(self, key: str, value: Any, check: Check) -> Any:
        """The checked value.

        Raises:
            ConfigError: names source, key and value.
        """
        try:
            return check(value)
        except WrongValueError as error:
            raise self.fail(key, value, str(error)) from None

    def known(self, key: str, name: str, value: Any, known: Mapping[str, Any]) -> Any:
        """What `known` has under this name.

        Raises:
            ConfigError: nothing; it tells of the nearest name there is.
        """
        if name in known:
            return known[name]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise self.fail(key, value, f"is not a known key; {advice}", advice=advice)

    def tables(self, key: str, value: Any) -> list[dict[str, Any]]:
        """The entries of `[[key]]`.

        Raises:
            ConfigError: written as something else.
        """
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.fail(key, value, f"is not a list of tables; write [[{key}]]")
        return value

    def table(self, place: str, entry: Any, known: Mapping[str, Check]) -> dict[str, Any]:
        """The values of one table, each checked.

        Raises:
            ConfigError: not a table, an unknown key, or a wrong value.
        """
        if not isinstance(entry, dict):
            raise self.fail(place, entry, "is not a table; write {key = value}")
        return {
            name: self.check(
                f"{place}.{name}", value, self.known(f"{place}.{name}", name, value, known)
            )
            for name, value in entry.items()
        }
