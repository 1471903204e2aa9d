"""What is read out of a function's configuration space; bytes -> values, no I/O.

Sources: PCI Local Bus Specification 3.0, 6.1 and 6.7; PCI Express Base Specification 6.0, 7.5.3,
7.6 and 7.7.8;
Linux include/uapi/linux/pci_regs.h. Only root reads more than the first 64 bytes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from virtfabric.model.badge import Badge

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE: Final = 4096
_HEADER: Final = 64
_HEADER_TYPE: Final = 0x0E
_BRIDGE_HEADERS: Final = (1, 2)
_EXTENDED: Final = 0x100
_ACS: Final = 0x000D
ACS_BYTES: Final = 8
_ACS_NEEDED: Final = 0x01 | 0x04 | 0x08 | 0x10
"""Source validation, request redirect, completion redirect, upstream forwarding."""
_FIRST: Final = 0x34
_EXPRESS: Final = 0x10
EXPRESS_BYTES: Final = 0x34
_LINK_CONTROL_2: Final = 0x30
_DESIGNATED: Final = 0x0023
"""DVSEC: of a vendor, for anybody's devices (PCI Express Base Specification 6.0, 7.9.6)."""
_OURS: Final = 0xF0CA
"""Not assigned to anybody as far as we know."""
_CODE, _SERIAL, _TEXT = 8, 24, 64
BADGE_BYTES: Final = 4 + _SERIAL + 2 * _TEXT
_NAME: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SPEEDS: Final = (2_500, 5_000, 8_000, 16_000, 32_000, 64_000)
"""MT/s of the generations 1 to 6."""


def parse_bridge(config: bytes) -> bool | None:
    """Whether the header is a bridge's; None where it was not read."""
    if len(config) <= _HEADER_TYPE:
        return None
    return config[_HEADER_TYPE] & 0x7F in _BRIDGE_HEADERS


def is_silent(config: bytes) -> bool:
    """Whether nothing answered: the space of a device that is off or in a reset is all ones."""
    return not config[:_HEADER].strip(b"\xff")


def find_acs(config: bytes) -> int | None:
    """Where the ACS capability is; None without one to read."""
    for offset, number in _extended_capabilities(config):
        if number == _ACS and len(config) >= offset + ACS_BYTES:
            return offset
    return None


def find_express(config: bytes) -> int | None:
    """Where the PCI Express capability is; None without one to read."""
    for offset, number in _capabilities(config):
        if number == _EXPRESS and len(config) >= offset + EXPRESS_BYTES:
            return offset
    return None


def parse_acs(capability: bytes) -> bool | None:
    """Whether ACS isolates what is behind the function; None where this is no such capability.

    A control that the capability does not offer counts as hard-wired, as the kernel has it
    (drivers/pci/pci.c: pci_acs_flags_enabled).
    """
    if len(capability) < ACS_BYTES or int.from_bytes(capability[:2], "little") != _ACS:
        return None
    offered = int.from_bytes(capability[4:6], "little")
    enabled = int.from_bytes(capability[6:8], "little")
    needed = offered & _ACS_NEEDED
    return enabled & needed == needed


def parse_badge(config: bytes) -> Badge | None:
    """Which slice of which card the function says to be; None where it says nothing readable.

    Layout: docs/card-protocol.md, "Which function is which slice".
    """
    for offset, number in _extended_capabilities(config):
        body = config[offset + 4 : offset + BADGE_BYTES]
        if number != _DESIGNATED or not _is_badge(body):
            continue
        texts = [body[at : at + _TEXT].rstrip(b"\0") for at in (_SERIAL, _SERIAL + _TEXT)]
        if all(_NAME.fullmatch(text) for text in texts):
            card, name = (text.decode() for text in texts)
            return Badge(card, name, body[_CODE:_SERIAL].hex())
    return None


def _is_badge(body: bytes) -> bool:
    """The headers of a designated capability say whose it is, and which one of theirs."""
    if len(body) < BADGE_BYTES - 4:
        return False
    vendor, revision = body[0] | body[1] << 8, body[2] & 0xF
    length = int.from_bytes(body[2:4], "little") >> 4
    number = int.from_bytes(body[4:6], "little")
    return (vendor, revision, number) == (_OURS, 1, 1) and length >= BADGE_BYTES


def parse_target_speed(capability: bytes) -> int | None:
    """MT/s that software lets the link below a port be trained to; None where that is not told.

    Link Control 2 is there from version 2 of the capability on, and may be hard-wired to 0.
    """
    if len(capability) < EXPRESS_BYTES or capability[0] != _EXPRESS:
        return None
    target = capability[_LINK_CONTROL_2] & 0xF
    version = capability[2] & 0xF
    return SPEEDS[target - 1] if version >= 2 and 0 < target <= len(SPEEDS) else None


def choose_recorded(config: bytes) -> dict[int, bytes]:
    """The pieces that the functions above look at, by offset.

    The rest stays out of a record: it holds the device's serial number and its vital product data.
    """
    pieces = {0: config[:_HEADER]}
    for offset, number in _capabilities(config):
        size = EXPRESS_BYTES if number == _EXPRESS else 2
        pieces[offset] = config[offset : offset + size]
    for offset, number in _extended_capabilities(config):
        size = {_ACS: ACS_BYTES, _DESIGNATED: BADGE_BYTES}.get(number, 4)
        pieces[offset] = config[offset : offset + size]
    return pieces


def _capabilities(config: bytes) -> Iterator[tuple[int, int]]:
    """Offset and number of each of the first 256 bytes; ends as the extended ones do."""
    offset = config[_FIRST] & 0xFC if len(config) > _FIRST else 0
    seen = set[int]()
    while offset >= _HEADER and offset not in seen and len(config) >= offset + 2:
        seen.add(offset)
        yield offset, config[offset]
        offset = config[offset + 1] & 0xFC


def _extended_capabilities(config: bytes) -> Iterator[tuple[int, int]]:
    """Offset and number of each; ends at a loop or at the first that cannot be."""
    offset, seen = _EXTENDED, set()
    while offset >= _EXTENDED and offset not in seen and len(config) >= offset + 4:
        seen.add(offset)
        header = int.from_bytes(config[offset : offset + 4], "little")
        if header in (0, 0xFFFFFFFF):
            return
        yield offset, header & 0xFFFF
        offset = header >> 20 & 0xFFC
