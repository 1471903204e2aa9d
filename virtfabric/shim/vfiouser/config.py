"""Configuration space as data: what a PCIe function says of itself, and what may be written to it.

Offsets and bits: PCI Express Base Specification 6.0, chapter 7; names as in Linux,
include/uapi/linux/pci_regs.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE: Final = 4096
_COMMAND, _CACHE_LINE, _BAR0, _SUBSYSTEM, _FIRST, _LINE = 0x04, 0x0C, 0x10, 0x2C, 0x34, 0x3C
_COMMAND_MASK: Final = 0x0546
"""Memory space, bus master, parity, SERR, INTx disable; there is no I/O space."""
_MEMORY, _MASTER = 0x02, 0x04
_STATUS_CAPABILITIES: Final = 0x10
_CAPABILITIES: Final = 0x40
_EXTENDED: Final = 0x100
_PM, _MSI, _EXPRESS, _ACS, _DESIGNATED = 0x01, 0x05, 0x10, 0x0D, 0x23
_FLR: Final = 0x8000
_GEN4: Final = 4
"""16 GT/s."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a function is."""

    vendor: int
    device: int
    class_code: int
    subsystem_vendor: int = 0
    subsystem: int = 0
    revision: int = 1


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory BAR; `size` is a power of two from 4096 on. A wide one is 64 bits, prefetchable."""

    index: int
    size: int
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability: what follows its header of two bytes (extended: four).

    Attributes:
        mask: bits that software may write, as long as `body`.
    """

    id: int
    body: bytes
    mask: bytes
    extended: bool = False


def express_endpoint(width: int, speed: int = _GEN4) -> Capability:
    """A PCI Express endpoint with function level reset, on a link of so many lanes."""
    link = speed | width << 4
    speeds = ((1 << speed) - 1) << 1
    body = struct.pack(
        "<H IHH IHH 16x IHH IHH 8x",
        *(2, 0x10008000, 0x2810, 0),  # version 2; FLR, role-based errors; the reset value of DEVCTL
        *(link, 0, 0x1000 | link),
        *(0, 0, 0),
        *(speeds, speed, 0),
    )
    mask = struct.pack(
        "<H IHH IHH 16x IHH IHH 8x", 0, 0, 0x78FF, 0, 0, 0x03C3, 0, 0, 0x001F, 0, 0, 0x000F, 0
    )
    return Capability(_EXPRESS, body, mask)


def message_interrupts() -> Capability:
    """MSI with one vector and a 64-bit address.

    Not MSI-X: QEMU 11.1.2 aborts when such a vfio-user function is unplugged.
    """
    return Capability(
        _MSI, struct.pack("<HQH", 0x0080, 0, 0), struct.pack("<HQH", 1, (1 << 64) - 4, 0xFFFF)
    )


def power_management() -> Capability:
    """D0 and D3, without a reset on the way back."""
    return Capability(_PM, struct.pack("<HHH", 3, 8, 0), struct.pack("<HHH", 0, 3, 0))


def access_control() -> Capability:
    """ACS with nothing in it: the function does not reach its neighbours.

    Without it Linux puts all functions of a slot into one IOMMU group.
    """
    return Capability(_ACS, bytes(4), bytes(4), extended=True)


def designated(vendor: int, number: int, payload: bytes, revision: int = 1) -> Capability:
    """A designated vendor-specific capability: meant for devices of other vendors as well."""
    length = 4 + 8 + len(payload)
    body = struct.pack("<HHHH", vendor, length << 4 | revision, number, 0) + payload
    return Capability(_DESIGNATED, body, bytes(len(body)), extended=True)


class ConfigSpace:
    """The configuration space of one function. Safe for several threads."""

    def __init__(
        self, identity: Identity, bars: Sequence[Bar], capabilities: Sequence[Capability]
    ) -> None:
        self._lock = Lock()
        self._at: dict[int, int] = {}
        self._bytes, self._mask = bytearray(SIZE), bytearray(SIZE)
        self._put_header(identity, bars)
        self._chain([one for one in capabilities if not one.extended])
        self._chain_extended([one for one in capabilities if one.extended])
        self._initial = bytes(self._bytes)

    @property
    def may_master(self) -> bool:
        """Whether it may reach memory: bus mastering is on, and it is in D0."""
        with self._lock:
            awake = not self._at.get(_PM) or not self._word(self._at[_PM] + 4) & 3
            return bool(self._word(_COMMAND) & _MASTER) and awake

    @property
    def may_interrupt(self) -> bool:
        """Whether MSI is on; a message is a write to memory, too."""
        with self._lock:
            on = bool(self._word(self._at[_MSI] + 2) & 1)
        return on and self.may_master

    def read(self, offset: int, count: int) -> bytes:
        """Bytes; the caller keeps within `SIZE`."""
        with self._lock:
            return bytes(self._bytes[offset : offset + count])

    def write(self, offset: int, data: bytes) -> bool:
        """Write what may be written; True if that asks for a function level reset."""
        control = self._at[_EXPRESS] + 8
        with self._lock:
            for at, new in enumerate(data, start=offset):
                mask = self._mask[at]
                self._bytes[at] = self._bytes[at] & ~mask | new & mask
            high = control + 1 - offset
            return 0 <= high < len(data) and bool(data[high] << 8 & _FLR)

    def reset(self) -> None:
        """As it was at power-on."""
        with self._lock:
            self._bytes[:] = self._initial

    def _word(self, offset: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + 2], "little")

    def _put_header(self, identity: Identity, bars: Sequence[Bar]) -> None:
        ids = identity.vendor, identity.device, 0, _STATUS_CAPABILITIES
        struct.pack_into("<HHHH", self._bytes, 0, *ids)
        struct.pack_into("<I", self._bytes, 8, identity.class_code << 8 | identity.revision)
        subsystem = identity.subsystem_vendor, identity.subsystem
        struct.pack_into("<HH", self._bytes, _SUBSYSTEM, *subsystem)
        struct.pack_into("<H", self._mask, _COMMAND, _COMMAND_MASK)
        self._mask[_CACHE_LINE] = self._mask[_LINE] = 0xFF
        for bar in bars:
            at = _BAR0 + 4 * bar.index
            form, most, kind = ("<Q", (1 << 64) - 1, 0xC) if bar.wide else ("<I", (1 << 32) - 1, 0)
            struct.pack_into(form, self._bytes, at, kind)
            struct.pack_into(form, self._mask, at, most & ~(bar.size - 1))

    def _chain(self, capabilities: Sequence[Capability]) -> None:
        at, link = _CAPABILITIES, _FIRST
        for one in capabilities:
            self._bytes[link] = at
            self._bytes[at] = one.id
            self._place(one, at, 2)
            link, at = at + 1, at + -(-(2 + len(one.body)) // 4) * 4

    def _chain_extended(self, capabilities: Sequence[Capability]) -> None:
        at = _EXTENDED
        for number, one in enumerate(capabilities, start=1):
            end = at + -(-(4 + len(one.body)) // 4) * 4
            following = end if number < len(capabilities) else 0
            struct.pack_into("<I", self._bytes, at, one.id | 1 << 16 | following << 20)
            self._place(one, at, 4)
            at = end

    def _place(self, one: Capability, at: int, header: int) -> None:
        self._at[one.id] = at
        body = slice(at + header, at + header + len(one.body))
        self._bytes[body], self._mask[body] = one.body, one.mask
