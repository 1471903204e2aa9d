"""NVMe admin commands that give a controller's flexible queues and interrupts to its VFs.

One ioctl on the PF's character device, without nvme-cli.

Source: NVM Express Base 2.0, 5.25 (Virtualization Management), 5.17.2.12/13 (Identify 14h, 15h) and
8.26; include/uapi/linux/nvme_ioctl.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

_IDENTIFY: Final = 0x06
_VIRT_MGMT: Final = 0x1C
_PAGE: Final = 4096
_TIMEOUT_MS: Final = 10_000


class _PassthruCommand(ctypes.Structure):
    _fields_ = (
        ("opcode", ctypes.c_uint8), ("flags", ctypes.c_uint8), ("rsvd1", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32), ("cdw2", ctypes.c_uint32), ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64), ("addr", ctypes.c_uint64),
        ("metadata_len", ctypes.c_uint32), ("data_len", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32), ("cdw11", ctypes.c_uint32), ("cdw12", ctypes.c_uint32),
        ("cdw13", ctypes.c_uint32), ("cdw14", ctypes.c_uint32), ("cdw15", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32), ("result", ctypes.c_uint32),
    )  # fmt: skip


# _IOWR('N', 0x41, struct nvme_passthru_cmd)
_ADMIN_COMMAND: Final = 3 << 30 | ctypes.sizeof(_PassthruCommand) << 16 | ord("N") << 8 | 0x41


class Resource(IntEnum):
    """What is given to a VF."""

    QUEUES = 0
    INTERRUPTS = 1


class _Action(IntEnum):
    PRIMARY = 0x1
    OFFLINE = 0x7
    ASSIGN = 0x8
    ONLINE = 0x9


@dataclass(frozen=True, slots=True)
class Flexible:
    """One resource of a primary controller: in all, with its VFs, with itself, most for one VF."""

    total: int
    with_vfs: int
    with_primary: int
    most: int

    @property
    def free(self) -> int:
        """What nobody has."""
        return self.total - self.with_vfs - self.with_primary


@dataclass(frozen=True, slots=True)
class Secondary:
    """A VF's controller; `number` is the VF's, from 0."""

    controller: int
    online: bool
    number: int
    queues: int
    interrupts: int


class NvmeAdmin:
    """One primary controller, by its character device."""

    def __init__(self, device: Path) -> None:
        """`device` is `/dev/nvme0`; opened for each command."""
        self._device = device

    def read_flexible(self) -> tuple[int, dict[Resource, Flexible]]:
        """The primary's own id, and what there is to distribute."""
        page = self._identify(0x14)
        (own,) = struct.unpack_from("<H", page, 0)
        found = {}
        for resource, at in ((Resource.QUEUES, 32), (Resource.INTERRUPTS, 64)):
            total, with_vfs, primary, _private, most = struct.unpack_from("<IIHHH", page, at)
            found[resource] = Flexible(total, with_vfs, primary, most)
        return own, found

    def read_secondaries(self) -> tuple[Secondary, ...]:
        """One entry for each VF that the controller can have, by number."""
        page = self._identify(0x15)
        found = []
        for index in range(page[0]):
            controller, _, state, number, queues, interrupts = struct.unpack_from(
                "<HHB3xHHH", page, 32 * (index + 1)
            )
            found.append(Secondary(controller, bool(state & 1), number - 1, queues, interrupts))
        return tuple(sorted(found, key=lambda one: one.number))

    def take_from_primary(self, controller: int, resource: Resource) -> None:
        """Let the primary keep its private resources only, once it has been reset."""
        self._manage(_Action.PRIMARY, controller, resource, 0)

    def assign(self, controller: int, resource: Resource, count: int) -> None:
        """Give a VF's controller so many; it has to be offline."""
        self._manage(_Action.ASSIGN, controller, resource, count)

    def bring_online(self, controller: int) -> None:
        """Let a VF's controller work."""
        self._manage(_Action.ONLINE, controller, Resource.QUEUES, 0)

    def take_offline(self, controller: int) -> None:
        """Stop a VF's controller; it may be given other resources then."""
        self._manage(_Action.OFFLINE, controller, Resource.QUEUES, 0)

    def _manage(self, action: _Action, controller: int, resource: Resource, count: int) -> None:
        word = controller << 16 | resource << 8 | action
        self._submit(_PassthruCommand(opcode=_VIRT_MGMT, cdw10=word, cdw11=count))

    def _identify(self, structure: int) -> bytes:
        page = ctypes.create_string_buffer(_PAGE)
        self._submit(
            _PassthruCommand(
                opcode=_IDENTIFY, addr=ctypes.addressof(page), data_len=_PAGE, cdw10=structure
            )
        )
        return page.raw

    def _submit(self, command: _PassthruCommand) -> None:
        command.timeout_ms = _TIMEOUT_MS
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
            try:
                status = fcntl.ioctl(descriptor, _ADMIN_COMMAND, command)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DeviceError(f"{self._device}: {error.strerror}") from error
        if status:
            raise DeviceError(
                f"{self._device}: NVMe command {command.opcode:#x} (dword 10: {command.cdw10:#x}) "
                f"ended with status {status:#x}"
            )
