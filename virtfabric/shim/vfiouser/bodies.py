"""What is in vfio-user's messages. Pure; every number of a client is checked here or named here."""

from __future__ import annotations

import errno
import json
import struct
from dataclasses import dataclass
from typing import Final

from virtfabric.model.errors import VirtfabricError
from virtfabric.shim.vfiouser.wire import MAX_DATA, MAX_FDS

CONFIG_REGION: Final = 7
REGIONS: Final = 9
"""Six BARs, the ROM, the configuration space, VGA (vfio.h: VFIO_PCI_NUM_REGIONS)."""
MSI_INDEX: Final = 1
INTERRUPTS: Final = 5
"""INTx, MSI, MSI-X, error, request (vfio.h: VFIO_PCI_NUM_IRQS)."""
MAX_MAPPINGS: Final = 65535

_VERSION: Final = struct.Struct("<HH")
_DMA_MAP: Final = struct.Struct("<IIQQQ")
_DMA_UNMAP: Final = struct.Struct("<IIQQ")
_INDEX: Final = struct.Struct("<III")
_ACCESS: Final = struct.Struct("<QII")
_SET_IRQS: Final = struct.Struct("<IIIII")
_MAP_READ, _MAP_WRITE = 1, 2
_UNMAP_ALL: Final = 2
_DEVICE_RESETS, _DEVICE_PCI = 1, 2
_REGION_READ, _REGION_WRITE, _REGION_MMAP = 1, 2, 4
_IRQ_EVENTFD, _IRQ_NORESIZE = 1, 8
_DATA_NONE, _DATA_EVENTFD, _ACTION_TRIGGER = 1, 4, 32
_END: Final = 1 << 64


class InvalidRequestError(VirtfabricError):
    """What the client asks makes no sense; it gets `errno`, and the connection lives."""

    def __init__(self, why: str, number: int = errno.EINVAL) -> None:
        super().__init__(why)
        self.errno = number


@dataclass(frozen=True, slots=True)
class DmaMap:
    """Guest memory from `address` on is what a file has from `offset` on."""

    address: int
    size: int
    offset: int
    readable: bool
    writable: bool


@dataclass(frozen=True, slots=True)
class DmaUnmap:
    """All that is mapped within."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class Access:
    """A read of `count` bytes of a region, or a write of `data`."""

    region: int
    offset: int
    count: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class SetInterrupts:
    """Eventfds for vectors from `start` on; without eventfds those vectors go silent.

    Attributes:
        trigger: raise these vectors, as if the device had.
    """

    index: int
    start: int
    count: int
    trigger: bool


def parse_version(body: bytes) -> tuple[int, int]:
    """Major and minor version of a client."""
    major, minor = _unpack(_VERSION, body)
    text = body[_VERSION.size :].split(b"\0", 1)[0]
    try:
        offered = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        raise InvalidRequestError("the capabilities are not JSON") from None
    if not isinstance(offered, dict):
        raise InvalidRequestError("the capabilities are no object")
    if major:
        raise InvalidRequestError(f"version {major}.{minor}; 0.x is spoken here")
    return major, minor


def format_version(major: int, minor: int) -> bytes:
    """The client's own version, as QEMU 11 wants it, and what this server takes."""
    able = {
        "max_msg_fds": MAX_FDS, "max_data_xfer_size": MAX_DATA, "max_dma_maps": MAX_MAPPINGS,
        "pgsizes": 4096,
    }  # fmt: skip
    text = json.dumps({"capabilities": able}).encode()
    return _VERSION.pack(major, minor) + text + b"\0"


def parse_dma_map(body: bytes) -> DmaMap:
    """Where guest memory is."""
    _, flags, offset, address, size = _unpack(_DMA_MAP, body)
    _check_span(address, size)
    if offset + size > _END >> 1:
        raise InvalidRequestError(f"offset {offset:#x} is in no file")
    readable, writable = bool(flags & _MAP_READ), bool(flags & _MAP_WRITE)
    return DmaMap(address, size, offset, readable, writable)


def parse_dma_unmap(body: bytes) -> DmaUnmap:
    """Where it is no more."""
    _, flags, address, size = _unpack(_DMA_UNMAP, body)
    if flags & _UNMAP_ALL:
        return DmaUnmap(0, _END)
    if flags:
        raise InvalidRequestError(f"unmap flags {flags:#x}", errno.ENOTSUP)
    _check_span(address, size)
    return DmaUnmap(address, size)


def parse_index(body: bytes, most: int) -> int:
    """Which region or interrupt is asked about."""
    _, _, index = _unpack(_INDEX, body)
    if index >= most:
        raise InvalidRequestError(f"index {index} of {most}")
    return int(index)


def parse_access(body: bytes, *, write: bool) -> Access:
    """A read or write of a region."""
    offset, region, count = _unpack(_ACCESS, body)
    data = body[_ACCESS.size :]
    if count > MAX_DATA or len(data) != (count if write else 0):
        raise InvalidRequestError(f"{count} bytes announced, {len(data)} there")
    return Access(region, offset, count, data)


def parse_set_interrupts(body: bytes) -> SetInterrupts:
    """What is to happen with vectors."""
    _, flags, index, start, count = _unpack(_SET_IRQS, body)
    if index >= INTERRUPTS:
        raise InvalidRequestError(f"interrupt index {index}")
    if flags not in (_DATA_EVENTFD | _ACTION_TRIGGER, _DATA_NONE | _ACTION_TRIGGER):
        raise InvalidRequestError(f"interrupt flags {flags:#x}", errno.ENOTSUP)
    return SetInterrupts(index, start, count, trigger=bool(flags & _DATA_NONE) and count > 0)


def format_info() -> bytes:
    """A PCI device that can be reset."""
    return struct.pack("<IIII", 16, _DEVICE_RESETS | _DEVICE_PCI, REGIONS, INTERRUPTS)


def format_region_info(index: int, size: int, *, mapped: bool) -> bytes:
    """A region; size 0 where there is none. `mapped`: its memory goes along as a descriptor."""
    flags = (_REGION_READ | _REGION_WRITE if size else 0) | (_REGION_MMAP if mapped else 0)
    return struct.pack("<IIIIQQ", 32, flags, index, 0, size, 0)


def format_irq_info(index: int, vectors: int) -> bytes:
    """How many vectors an interrupt has."""
    return struct.pack("<IIII", 16, _IRQ_EVENTFD | _IRQ_NORESIZE, index, vectors)


def _check_span(address: int, size: int) -> None:
    if not size or address + size > _END:
        raise InvalidRequestError(f"{size:#x} bytes at {address:#x}")


def _unpack(form: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) < form.size:
        raise InvalidRequestError(f"{len(body)} bytes, not {form.size}")
    return form.unpack_from(body)
