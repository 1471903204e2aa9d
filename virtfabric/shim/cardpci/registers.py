"""Register maps as data, and a file of registers that obeys one.

Registers are 32 bits wide, little-endian, and are read and written whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from threading import Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WORD: Final = 4
ONES: Final = 0xFFFFFFFF
TEXT_SIZE: Final = 64
"""Bytes of a text in registers: UTF-8, zeros behind it."""


class Access(StrEnum):
    """What software may do with a register."""

    READ = "ro"
    WRITE = "wo"
    BOTH = "rw"
    CLEAR = "w1c"
    """Reads as it is; a bit that is written as 1 becomes 0."""


@dataclass(frozen=True, slots=True)
class Register:
    """One register, or several words that belong together.

    Attributes:
        words: of 32 bits; 2 are a 64-bit value, its low half first.
        reset: value at power-on and after a reset; None: what the card, or the slice, has.
    """

    offset: int
    name: str
    access: Access
    meaning: str
    reset: int | None = 0
    words: int = 1


class RegisterMap:
    """Registers that do not overlap."""

    def __init__(self, registers: Iterable[Register]) -> None:
        self.registers = tuple(registers)
        self.by_name = {one.name: one for one in self.registers}
        self.by_offset = {
            one.offset + WORD * word: (one, word)
            for one in self.registers
            for word in range(one.words)
        }

    def __iter__(self) -> Iterator[Register]:
        return iter(self.registers)


class RegisterFile:
    """Values of the registers of one function. Safe for several threads."""

    def __init__(self, layout: RegisterMap) -> None:
        self._map = layout
        self._lock = Lock()
        self._values = {one.name: one.reset or 0 for one in layout}

    def reset(self) -> None:
        """All that have a reset value have it again."""
        with self._lock:
            self._values |= {one.name: one.reset for one in self._map if one.reset is not None}

    def get(self, name: str) -> int:
        """The whole value of a register."""
        with self._lock:
            return self._values[name]

    def put(self, name: str, value: int) -> None:
        """Set it, from the device's side."""
        with self._lock:
            self._values[name] = value

    def put_text(self, name: str, text: str) -> None:
        """Set a text, cut to what fits."""
        data = text.encode()[:TEXT_SIZE]
        self.put(name, int.from_bytes(data, "little"))

    def raise_bits(self, name: str, bits: int) -> int:
        """Set bits; those that were not set before."""
        with self._lock:
            before = self._values[name]
            self._values[name] = before | bits
            return bits & ~before

    def read(self, offset: int, count: int) -> bytes:
        """As software reads: all ones where there is no whole register, nor a run of them."""
        if offset % WORD or count % WORD:
            return b"\xff" * count
        return b"".join(self._read(at) for at in range(offset, offset + count, WORD))

    def write(self, offset: int, data: bytes) -> list[str]:
        """As software writes; names of the registers that took it, in order."""
        if offset % WORD or len(data) % WORD:
            return []
        words = range(0, len(data), WORD)
        taken = (self._write(offset + at, data[at : at + WORD]) for at in words)
        return [name for name in taken if name]

    def _read(self, offset: int) -> bytes:
        found = self._map.by_offset.get(offset)
        if found is None or found[0].access == Access.WRITE:
            return b"\xff" * WORD if found is None else bytes(WORD)
        return (self.get(found[0].name) >> 32 * found[1] & ONES).to_bytes(WORD, "little")

    def _write(self, offset: int, data: bytes) -> str:
        register, word = self._map.by_offset.get(offset, (None, 0))
        if register is None or register.access == Access.READ:
            return ""
        value, shift = int.from_bytes(data, "little"), 32 * word
        with self._lock:
            before = self._values[register.name]
            if register.access == Access.CLEAR:
                after = before & ~(value << shift)
            else:
                after = before & ~(ONES << shift) | value << shift
            self._values[register.name] = after
        return register.name
