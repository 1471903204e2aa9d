"""An ivshmem client and a driver of the mailbox, written from QEMU's specification and
docs/card-protocol.md. It imports nothing of virtfabric.
"""

import mmap
import os
import select
import socket
import struct
import time

STATUS, WANTED, SESSION = 0x2000C, 0x20010, 0x20014
TX_HEAD, TX_TAIL, RX_HEAD, RX_TAIL = 0x20028, 0x2002C, 0x20038, 0x2003C
READY, OPEN, ENDED, BROKEN = 1, 2, 4, 8
CARD = 0


class IvshmemClient:
    """Plays QEMU: takes the files that the server sends."""

    def __init__(self, path, *, greet=True):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.fds = []
        if greet:
            self.version, fd = self.take()
            assert fd is None
            self.id, fd = self.take()
            assert fd is None
            minus_one, memory = self.take()
            assert minus_one == -1
            self.memory_fd = memory
            self.size = os.fstat(memory).st_size
            self.memory = mmap.mmap(memory, self.size)
            self.peers, self.own = {}, []
            while not self.own:
                number, fd = self.take()
                assert fd is not None
                (self.own if number == self.id else self.peers.setdefault(number, [])).append(fd)

    def take(self):
        """The next message: a number and a file or None."""
        data, fds, _, _ = socket.recv_fds(self.sock, 8, 4)
        if not data:
            raise EOFError
        assert len(data) == 8, "a message is whole"
        assert len(fds) <= 1
        self.fds += fds
        return struct.unpack("<q", data)[0], fds[0] if fds else None

    def ring(self, peer=CARD, vector=0):
        os.write(self.peers[peer][vector], struct.pack("=Q", 1))

    def rung(self, timeout=20):
        """Whether it was rung; forgets it."""
        if not select.select([self.own[0]], [], [], timeout)[0]:
            return False
        os.read(self.own[0], 8)
        return True

    def ends(self):
        """Whether the server has ended it."""
        try:
            while True:
                self.take()
        except (EOFError, ConnectionResetError):
            return True

    def close(self):
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class SharedDriver:
    """Of the mailbox."""

    def __init__(self, client):
        self.client, self.memory = client, client.memory
        self.words = memoryview(self.memory).cast("I")  # whole ones, as a processor writes
        assert bytes(self.memory[0x20000:0x20004]) == b"VFCM"
        self.tx, self.rx = (
            (self.get(at), self.get(at + 4)) for at in (0x20020, 0x20030)
        )  # fmt: skip

    def get(self, at):
        return self.words[at // 4]

    def put(self, at, value):
        self.words[at // 4] = value

    @property
    def status(self):
        return self.get(STATUS)

    def want(self, session):
        self.put(TX_HEAD, 0)
        self.put(RX_TAIL, 0)
        self.put(WANTED, session)
        self.client.ring()
        self.until(lambda: self.get(SESSION) == session)
        self.head = self.tail = 0

    def open(self):
        taken = 0, self.get(WANTED), self.get(SESSION)
        self.want(next(n for n in range(1, 4) if n not in taken))
        assert self.status == READY | OPEN

    def until(self, condition, timeout=20):
        deadline = time.monotonic() + timeout
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0
            self.client.rung(0.05)  # not all that is waited for rings

    def send(self, data):
        """All of it, as room comes."""
        offset, size = self.tx
        while data:
            room = size - (self.head - self.get(TX_TAIL)) % 2**32
            if not room:
                self.client.rung(1)
            for byte in data[:room]:
                self.memory[offset + self.head % size] = byte
                self.head = (self.head + 1) % 2**32
            data = data[room:]
            self.put(TX_HEAD, self.head)
            self.client.ring()

    def receive(self):
        """What is there."""
        offset, size = self.rx
        head = self.get(RX_HEAD)
        data = bytearray()
        while self.tail != head:
            data.append(self.memory[offset + self.tail % size])
            self.tail = (self.tail + 1) % 2**32
        if data:
            self.put(RX_TAIL, self.tail)
            self.client.ring()
        return bytes(data)
