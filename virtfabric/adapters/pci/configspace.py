"""What is read out of a function's configuration space; bytes -> values, no I/O.

Sources: PCI Local Bus Specification 3.0, 6.1; PCI Express Base Specification 6.0, 7.6 and 7.7.8;
Linux include/uapi/linux/pci_regs.h. Only root reads more than the first 64 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE: Final = 4096
_HEADER: Final = 64
_HEADER_TYPE: Final = 0x0E
_BRIDGE_HEADERS: Final = (1, 2)
_EXTENDED: Final = 0x100
_ACS: Final = 0x000D
_ACS_BYTES: Final = 8
_ACS_NEEDED: Final = 0x01 | 0x04 | 0x08 | 0x10
"""Source validation, request redirect, completion redirect, upstream forwarding."""


def parse_bridge(config: bytes) -> bool | None:
    """Whether the header is a bridge's; None where it was not read."""
    if len(config) <= _HEADER_TYPE:
        return None
    return config[_HEADER_TYPE] & 0x7F in _BRIDGE_HEADERS


def parse_acs(config: bytes) -> bool | None:
    """Whether ACS isolates what is behind the function; None without such a capability to read.

    A control that the capability does not offer counts as hard-wired, as the kernel has it
    (drivers/pci/pci.c: pci_acs_flags_enabled).
    """
    for offset, number in _extended_capabilities(config):
        if number == _ACS and len(config) >= offset + _ACS_BYTES:
            offered = int.from_bytes(config[offset + 4 : offset + 6], "little")
            enabled = int.from_bytes(config[offset + 6 : offset + 8], "little")
            needed = offered & _ACS_NEEDED
            return enabled & needed == needed
    return None


def choose_recorded(config: bytes) -> dict[int, bytes]:
    """The pieces that the functions above look at, by offset.

    The rest stays out of a record: it holds the device's serial number and its vital product data.
    """
    pieces = {0: config[:_HEADER]}
    for offset, number in _extended_capabilities(config):
        size = _ACS_BYTES if number == _ACS else 4
        pieces[offset] = config[offset : offset + size]
    return pieces


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
