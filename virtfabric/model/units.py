"""Quantities and sets that parse and print themselves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Self

from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SUFFIX: Final = {
    "": 1, "B": 1,
    "K": 1 << 10, "KIB": 1 << 10, "M": 1 << 20, "MIB": 1 << 20,
    "G": 1 << 30, "GIB": 1 << 30, "T": 1 << 40, "TIB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,16})(?:\.([0-9]{1,6}))?\s*([A-Za-z]{0,3})")
_CPU = re.compile(r"(?:([0-9]{1,6})(?:\.([0-9]{1,3}))?|([0-9]{1,9})m)")

MAX_BYTES: Final = 1 << 50
"""1 PiB: no host of today has more, so a larger amount is a typing error."""
MAX_MILLICPU: Final = 8192 * 1000
"""NR_CPUS_MAXSMP of Linux x86-64 (arch/x86/Kconfig), in milli-CPU."""

_SHORT: Final = 8
"""Characters of a size that a table takes as it is: `1088MiB`, `-1.25GiB`."""

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30


class Bytes(int):
    """An amount of memory in bytes. Parses `512MiB`, `512M`, `4G`, `1.5GiB`, `1048576`."""

    @classmethod
    def parse(cls, text: str, *, field: str = "size") -> Self:
        """Read an amount; K, M, G, T and KiB... are powers of 1024, KB... powers of 1000.

        Raises:
            InvalidValueError: malformed, negative or above 1 PiB.
        """
        match = _SIZE.fullmatch(text.strip())
        factor = _SUFFIX.get(match[3].upper()) if match else None
        if match is None or factor is None:
            raise InvalidValueError(
                field, text, "is not a size", advice="write it like 512MiB, 4G or 1073741824"
            )
        fraction = match[2] or ""
        value = int(match[1]) * factor + (
            int(fraction) * factor // 10 ** len(fraction) if fraction else 0
        )
        if value > MAX_BYTES:
            raise InvalidValueError(field, text, "is more than 1 PiB")
        return cls(value)

    def __str__(self) -> str:
        """Exact: in the largest binary unit that takes at most two decimals (`1.5GiB`, `1025KiB`).

        An amount in a message must never look like another one.
        """
        for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            hundredths, rest = divmod(abs(self) * 100, size)
            if abs(self) >= size and not rest:
                whole, part = divmod(hundredths, 100)
                fraction = f".{part:02}".rstrip("0") if part else ""
                return f"{'-' * (self < 0)}{whole}{fraction}{unit}"
        return f"{int(self)}B"

    def rounded(self) -> str:
        """For a column of a table: exact where that is short, else `~31.3GiB`."""
        exact = str(self)
        if len(exact) <= _SHORT:
            return exact
        for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if abs(self) >= size:
                return f"~{round(int(self) / size, 1):.10g}{unit}"
        return exact


class MilliCpu(int):
    """CPU time in thousandths of one pCPU. Parses `2`, `0.5`, `500m`."""

    @classmethod
    def parse(cls, text: str, *, field: str = "cpu") -> Self:
        """Read an amount of CPU.

        Raises:
            InvalidValueError: malformed, negative or above 8192 CPUs.
        """
        match = _CPU.fullmatch(text.strip())
        if match is None:
            raise InvalidValueError(
                field, text, "is not an amount of CPU", advice="write it like 2, 0.5 or 500m"
            )
        if match[3]:
            value = int(match[3])
        else:
            value = int(match[1]) * 1000 + int((match[2] or "").ljust(3, "0"))
        if value > MAX_MILLICPU:
            raise InvalidValueError(field, text, "is more than 8192 CPUs")
        return cls(value)

    def __str__(self) -> str:
        """`2` for whole CPUs, `1.5` otherwise."""
        return f"{int(self) / 1000:g}"

    @property
    def whole(self) -> int:
        """CPUs, rounded up: how many vCPUs it takes to use this much."""
        return -(-int(self) // 1000)


_MAX_NAMED: Final = 1 << 17
"""Numbers in a list: all that there can be, twice. A short text must not be long work."""
_SHOWN: Final = 60


class CpuSet(frozenset[int]):
    """A set of pCPU (or node) numbers in the kernel's list format: `0-3,8`."""

    @classmethod
    def parse(cls, text: str, *, field: str = "cpus") -> Self:
        """Read `0-3,8`; `^3` excludes as libvirt has it; an empty text is the empty set.

        Raises:
            InvalidValueError: not a CPU list, a number above 65535, or far too many.
        """
        chosen: set[int] = set()
        named = 0
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            match = re.fullmatch(r"(\^?)([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
            if match is None:
                raise InvalidValueError(field, text, "is not a CPU list", advice="like 0-3,8")
            first, last = int(match[2]), int(match[3] or match[2])
            if last < first or last > 0xFFFF:
                raise InvalidValueError(field, text, f"has an impossible range {part}")
            numbers = range(first, last + 1)
            named += len(numbers)
            if named > _MAX_NAMED:
                raise InvalidValueError(field, text[:_SHOWN], f"names more than {_MAX_NAMED}")
            (chosen.difference_update if match[1] else chosen.update)(numbers)
        return cls(chosen)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Self:
        """A set of these numbers."""
        return cls(numbers)

    def sorted(self) -> list[int]:
        """The numbers in ascending order."""
        return sorted(frozenset.__iter__(self))

    def __iter__(self) -> Iterator[int]:
        return iter(self.sorted())

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for number in self.sorted():
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

    def __repr__(self) -> str:
        return f"CpuSet({str(self)!r})"
