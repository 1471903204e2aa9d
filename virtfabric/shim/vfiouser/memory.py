"""The guest's memory as the device reaches it: mapped pieces of files, and nothing else.

Copies go through pread and pwrite, never through a mapping of this process: a client that cuts its
file short would kill this process by SIGBUS. So the memory has to be an ordinary memfd (hugetlbfs
has no write), and DMA into another device's BAR, which comes without a file, is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from bisect import bisect_right, insort
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import VirtfabricError
from virtfabric.shim.vfiouser.bodies import MAX_MAPPINGS, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtfabric.shim.vfiouser.bodies import DmaMap, DmaUnmap

_NO_FILE: Final = -1
_FileKey = tuple[int, int, int]


class DmaRefusedError(VirtfabricError):
    """An access that the IOMMU would stop; `address` is where."""

    def __init__(self, address: int, why: str) -> None:
        super().__init__(f"DMA at {address:#x}: {why}")
        self.address = address


@dataclass(slots=True)
class _File:
    """One file for however many mappings: behind an IOMMU there may be one for each page."""

    fd: int
    users: int = 0


class GuestMemory:
    """What a client has mapped. Safe for several threads; an unmap waits for a copy under way."""

    def __init__(self, may_reach: Callable[[], bool] = lambda: True) -> None:
        """Begin, with nothing mapped.

        Args:
            may_reach: whether the device is allowed any access now; asked at each. After it has
                changed its mind, `settle` ends those of before.
        """
        self._may_reach = may_reach
        self._lock = Lock()
        self._starts: list[int] = []
        self._mappings: dict[int, tuple[DmaMap, _FileKey | None]] = {}
        self._files: dict[_FileKey, _File] = {}

    def map(self, mapping: DmaMap, fd: int = _NO_FILE) -> None:
        """Add a mapping.

        Args:
            mapping: which touches no other.
            fd: owned by this from now on, also if it fails; -1: nothing can be reached there.

        Raises:
            InvalidRequestError: it overlaps another, or the file is not what it has to be.
        """
        try:
            key = self._key(mapping, fd) if fd != _NO_FILE else None
            with self._lock:
                self._insert(mapping, key, fd)
                if key is not None and self._files[key].fd == fd:
                    fd = _NO_FILE
        finally:
            if fd != _NO_FILE:
                os.close(fd)

    def unmap(self, wanted: DmaUnmap) -> None:
        """Forget all mappings within; none is cut in two.

        Raises:
            InvalidRequestError: one is partly within.
        """
        end = wanted.address + wanted.size
        with self._lock:
            first = bisect_right(self._starts, wanted.address - 1)
            last = bisect_right(self._starts, end - 1)
            if self._straddles(first - 1, wanted.address) or self._straddles(last - 1, end):
                raise InvalidRequestError(f"unmap within a mapping at {wanted.address:#x}")
            for start in self._starts[first:last]:
                self._let_go(self._mappings.pop(start)[1])
            del self._starts[first:last]

    def settle(self) -> None:
        """Wait for a copy under way."""
        with self._lock:
            pass

    def clear(self) -> None:
        """Forget everything; safe to repeat."""
        with self._lock:
            for _, key in self._mappings.values():
                self._let_go(key)
            self._mappings.clear()
            self._starts.clear()

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the guest.

        Raises:
            DmaRefusedError: not all of them are mapped for reading.
        """
        with self._lock:
            pieces = list(self._pieces(address, size, write=False))
            return b"".join(_read(at, fd, place, length) for at, fd, place, length in pieces)

    def write(self, address: int, data: bytes) -> None:
        """Change bytes of the guest; none if they are not all mapped.

        Raises:
            DmaRefusedError: not all of them are mapped for writing.
        """
        with self._lock:
            done = 0
            for at, fd, place, length in list(self._pieces(address, len(data), write=True)):
                _write(at, fd, place, data[done : done + length])
                done += length

    def _pieces(
        self, address: int, size: int, *, write: bool
    ) -> Iterator[tuple[int, int, int, int]]:
        """Address, file, place in it and length, of what lies side by side in the guest."""
        if not self._may_reach():
            raise DmaRefusedError(address, "bus mastering is off")
        at, end = address, address + size
        while at < end:
            found = bisect_right(self._starts, at) - 1
            if not self._reaches(found, at):
                raise DmaRefusedError(at, "not mapped")
            mapping, key = self._mappings[self._starts[found]]
            if key is None or not (mapping.writable if write else mapping.readable):
                raise DmaRefusedError(at, "not for writing" if write else "not for reading")
            length = min(end, mapping.address + mapping.size) - at
            yield at, self._files[key].fd, mapping.offset + at - mapping.address, length
            at += length

    def _reaches(self, index: int, address: int) -> bool:
        """Whether the mapping at an index, which begins no later, has an address in it."""
        if index < 0:
            return False
        mapping, _ = self._mappings[self._starts[index]]
        return address < mapping.address + mapping.size

    def _straddles(self, index: int, address: int) -> bool:
        """Whether a cut at an address would divide the mapping at an index."""
        return self._reaches(index, address) and self._starts[index] < address

    def _key(self, mapping: DmaMap, fd: int) -> _FileKey:
        facts = os.fstat(fd)
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if not stat.S_ISREG(facts.st_mode) or mapping.offset + mapping.size > facts.st_size:
            raise InvalidRequestError("the descriptor is no file of that size")
        if (mapping.readable and mode == os.O_WRONLY) or (mapping.writable and mode != os.O_RDWR):
            raise InvalidRequestError("the file is not open for that", errno.EACCES)
        return facts.st_dev, facts.st_ino, mode

    def _insert(self, mapping: DmaMap, key: _FileKey | None, fd: int) -> None:
        if len(self._starts) >= MAX_MAPPINGS:
            raise InvalidRequestError("too many mappings", errno.ENOSPC)
        before = bisect_right(self._starts, mapping.address) - 1
        after = bisect_right(self._starts, mapping.address + mapping.size - 1) - 1
        if after != before or self._reaches(before, mapping.address):
            raise InvalidRequestError(f"{mapping.address:#x} is mapped already", errno.EEXIST)
        insort(self._starts, mapping.address)
        self._mappings[mapping.address] = (mapping, key)
        if key is not None:
            self._files.setdefault(key, _File(fd)).users += 1

    def _let_go(self, key: _FileKey | None) -> None:
        if key is None:
            return
        file = self._files[key]
        file.users -= 1
        if not file.users:
            os.close(file.fd)
            del self._files[key]


def _read(at: int, fd: int, place: int, length: int) -> bytes:
    try:
        data = os.pread(fd, length, place)
    except OSError as error:
        raise DmaRefusedError(at, str(error.strerror)) from error
    if len(data) != length:
        raise DmaRefusedError(at, "the file became shorter")
    return data


def _write(at: int, fd: int, place: int, data: bytes) -> None:
    try:
        if os.pwrite(fd, data, place) != len(data):
            raise DmaRefusedError(at, "the file takes no more")
    except OSError as error:
        raise DmaRefusedError(at, str(error.strerror)) from error
