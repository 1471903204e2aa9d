"""Moves bytes between a card's mailbox and a stream, until one of both ends. A program of its own.

    python3 -I -S mailboxbridge.py /sys/bus/pci/devices/0000:01:00.0 SERIAL 0<>SOCKET

Owns the driver's half of the mailbox (docs/card-protocol.md, "The mailbox"), in user space through
sysfs, by looking: without a driver in the kernel there are no interrupts. It understands nothing of
what it carries. The standard library alone, and little of it: it is started at each try to reach a
card. It says why it ended on stderr.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import sys
import time

PULLED_OUT = int(signal.SIGBUS)
"""What kills this process when the function goes while it is in use."""

MAGIC, STATUS, CONTROL, SESSION, TX, RX, SERIAL = 0x000, 0x00C, 0x010, 0x014, 0x020, 0x030, 0x040
"""Registers; of a ring: where it is, its size, its head, its tail, four bytes each."""
_MAGIC = 0x4D434656
_OPEN = 3
_SERIAL_BYTES = 64
_MODULO = 1 << 32
_OPEN_S = 5.0
_READ = 16 << 10
_BUSY_S = 0.2
"""So long after something came it is looked at often."""
_LOOK_S, _GLANCE_S = 0.001, 0.25


class GoneError(Exception):
    """There is no mailbox to be used here (any more)."""


class Mailbox:
    """The driver of one."""

    def __init__(self, directory: str) -> None:
        """Begin to use a function.

        Raises:
            GoneError: another process does.
            OSError: it cannot be mapped.
        """
        with open(f"{directory}/enable", "r+") as enable:  # noqa: PTH123
            if enable.read().strip() == "0":
                enable.seek(0)
                enable.write("1")
        registers = _map(f"{directory}/resource0")
        # a register is read and written whole: bytes of a mapping are copied in any pieces
        self._registers = memoryview(registers).cast("I")
        self._window = _map(f"{directory}/resource2")
        self._tx = self._rx = (0, 0)
        self._sent = self._taken = 0

    @property
    def serial(self) -> str:
        """Of the card; empty if this is none."""
        if self.get(MAGIC) != _MAGIC:
            return ""
        words = (self.get(SERIAL + at) for at in range(0, _SERIAL_BYTES, 4))
        text = b"".join(word.to_bytes(4, "little") for word in words)
        return text.rstrip(b"\0").decode("ascii", "replace")

    def get(self, offset: int) -> int:
        """A register."""
        return self._registers[offset // 4]

    def put(self, offset: int, value: int) -> None:
        """Into a register."""
        self._registers[offset // 4] = value

    def open(self) -> None:
        """A session with empty rings.

        Raises:
            GoneError: the card does not open one.
        """
        before = self.get(SESSION)
        self.put(CONTROL, 1)
        until = time.monotonic() + _OPEN_S
        while self.get(SESSION) == before or self.get(STATUS) != _OPEN:
            if time.monotonic() > until:
                raise GoneError(f"it opens no session (STATUS {self.get(STATUS):#x})")
            time.sleep(_LOOK_S)
        self._tx, self._rx = self._look_at_ring(TX), self._look_at_ring(RX)
        self._sent = self._taken = 0

    def _look_at_ring(self, register: int) -> tuple[int, int]:
        start, size = self.get(register), self.get(register + 4)
        if not size or start + size > len(self._window):
            raise GoneError("its rings are not in its window")
        return start, size

    def close(self) -> None:
        """No session."""
        self.put(CONTROL, 2)

    def send(self, data: bytes) -> int:
        """As much as there is room for; how many bytes that was."""
        start, size = self._tx
        waiting = (self._sent - self.get(TX + 12)) % _MODULO
        count = min(len(data), max(0, size - waiting))
        if count:
            at = self._sent % size
            first = min(count, size - at)
            self._window[start + at : start + at + first] = data[:first]
            self._window[start : start + count - first] = data[first:count]
            self._sent = (self._sent + count) % _MODULO
            self.put(TX + 8, self._sent)
        return count

    def receive(self) -> bytes | None:
        """What has come; None when the session has ended and all was read.

        Raises:
            GoneError: what is there is no mailbox any more.
        """
        start, size = self._rx
        status = self.get(STATUS)  # before the ring: an ended session adds nothing to it
        head = self.get(RX + 8)
        count = (head - self._taken) % _MODULO
        if count > size:
            raise GoneError(f"its ring cannot be (STATUS {status:#x}): the card is gone")
        if not count:
            return b"" if status == _OPEN else None
        at = self._taken % size
        first = min(count, size - at)
        data = self._window[start + at : start + at + first]
        data += self._window[start : start + count - first]
        self._taken = head
        self.put(RX + 12, head)
        return data


def _map(path: str) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise GoneError("another process uses it") from None
    # stays open: it holds the lock
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size)


def carry(mailbox: Mailbox, stream: socket.socket) -> None:
    """Both ways, until the stream or the session ends."""
    to_card = to_stream = b""
    busy_until = 0.0
    while True:
        came = mailbox.receive() if not to_stream else b""
        if came is None:
            return
        to_stream = to_stream or came
        sent = mailbox.send(to_card) if to_card else 0
        to_card = to_card[sent:]
        now = time.monotonic()
        if came or sent:
            busy_until = now + _BUSY_S
        look_s = _LOOK_S if now < busy_until else _GLANCE_S
        readable, writable, _ = select.select(
            [] if to_card else [stream], [stream] if to_stream else [], [],
            0 if came or sent else look_s,
        )  # fmt: skip
        if writable:
            to_stream = to_stream[stream.send(to_stream) :]
        if readable:
            to_card = stream.recv(_READ)
            if not to_card:
                return


def main(argv: list[str]) -> int:
    """Serve one session; 0 when it ended in order."""
    _, directory, serial = argv
    try:
        mailbox = Mailbox(directory)
        if (found := mailbox.serial) != serial:
            told = f"it is that of card {found}" if found else "it does not answer"
            raise GoneError(told)
        mailbox.open()
        gone = (BrokenPipeError, ConnectionResetError)
        with socket.socket(fileno=0) as stream, contextlib.suppress(*gone):
            carry(mailbox, stream)
        mailbox.close()
    except (GoneError, OSError) as error:
        sys.stderr.write(f"{getattr(error, 'strerror', None) or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
