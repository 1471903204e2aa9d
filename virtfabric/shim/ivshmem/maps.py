"""The shared memory of ivshmem: two rings, then registers. docs/card-protocol.md has the same.

These registers are memory and nothing else: whoever does not own one may change it all the same,
and misleads only the other end of that memory, which is itself.
"""

from __future__ import annotations

from typing import Final

from virtfabric.shim.cardpci import maps
from virtfabric.shim.cardpci.mailbox import WINDOW
from virtfabric.shim.cardpci.registers import Access, Register, RegisterMap

SIZE: Final = 256 << 10
"""A power of two: QEMU makes a BAR of it."""
REGISTERS: Final = WINDOW
"""Where they begin."""
REGISTERS_SIZE: Final = 4096

_CARD, _HOST = Access.READ, Access.BOTH
_SAME: Final = (
    "MAGIC", "VERSION", "BOOT", "TX_OFFSET", "TX_SIZE", "TX_TAIL", "RX_OFFSET", "RX_SIZE",
    "RX_HEAD", "SERIAL",
)  # fmt: skip

SHARED: Final = RegisterMap(sorted((
    *(maps.MANAGEMENT.by_name[name] for name in _SAME),
    Register(0x00C, "STATUS", _CARD, "1 ready, 2 session open, 4 it ended, 8 broken index; 0 gone",
             None),
    Register(0x010, "WANTED", _HOST, "0 no session; any other number, when it changes, a new one"),
    Register(0x014, "SESSION", _CARD, "the WANTED that STATUS and the indices are about"),
    Register(0x028, "TX_HEAD", _HOST, "bytes put in by the host, modulo 2^32"),
    Register(0x03C, "RX_TAIL", _HOST, "bytes taken out by the host"),
), key=lambda one: one.offset))  # fmt: skip
