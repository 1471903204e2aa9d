"""A vfio-user client, written from the specification and not from the server.

It plays the part of QEMU: guest memory in memfds, eventfds for interrupts. It imports nothing of
virtfabric.
"""

import json
import mmap
import os
import select
import socket
import struct
from pathlib import Path

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, REGION_INFO, IO_FDS, IRQ_INFO, SET_IRQS = range(1, 9)
REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET = range(9, 14)
CONFIG = 7
MSI = 1


class VfioError(Exception):
    def __init__(self, errno):
        super().__init__(os.strerror(errno))
        self.errno = errno


class Client:
    def __init__(self, path, *, greet=True):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.number = 0
        if greet:
            self.version = self.greet()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.sock.close()

    def post(self, command, body=b"", fds=(), flags=0):
        self.number = (self.number + 1) % 65536
        message = struct.pack("<HHIII", self.number, command, 16 + len(body), flags, 0) + body
        socket.send_fds(self.sock, [message], list(fds))
        return self.number

    def take(self):
        """The next answer: number, command, errno, body, descriptors."""
        head, fds, _, _ = socket.recv_fds(self.sock, 16, 4)
        if not head:
            raise EOFError
        head += self.exactly(16 - len(head))
        number, command, size, flags, errno = struct.unpack("<HHIII", head)
        assert flags & 0xF == 1, "an answer"
        assert bool(flags & 0x20) == bool(errno)
        return number, command, errno, self.exactly(size - 16), fds

    def exactly(self, size):
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def ask(self, command, body=b"", fds=()):
        number = self.post(command, body, fds)
        got, same, errno, answer, self.fds = self.take()
        assert (got, same) == (number, command)
        if errno:
            raise VfioError(errno)
        return answer

    def greet(self, major=0, minor=1, text=b'{"capabilities":{"max_msg_fds":8}}\0'):
        answer = self.ask(VERSION, struct.pack("<HH", major, minor) + text)
        assert answer.endswith(b"\0")
        return (*struct.unpack("<HH", answer[:4]), json.loads(answer[4:-1])["capabilities"])

    # -- regions ----------------------------------------------------------------------------

    def read(self, region, offset, size):
        answer = self.ask(REGION_READ, struct.pack("<QII", offset, region, size))
        assert struct.unpack("<QII", answer[:16]) == (offset, region, size)
        assert len(answer) == 16 + size
        return answer[16:]

    def write(self, region, offset, data):
        self.ask(REGION_WRITE, struct.pack("<QII", offset, region, len(data)) + data)

    def get(self, offset, region=0):
        return struct.unpack("<I", self.read(region, offset, 4))[0]

    def put(self, offset, value, region=0):
        self.write(region, offset, struct.pack("<I", value))

    def get64(self, offset):
        return struct.unpack("<Q", self.read(0, offset, 8))[0]

    def put64(self, offset, value):
        self.write(0, offset, struct.pack("<Q", value))

    def region_info(self, index):
        body = struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0)
        _, flags, same, _, size, offset = struct.unpack("<IIIIQQ", self.ask(REGION_INFO, body))
        assert same == index
        return flags, size, offset

    # -- configuration space ----------------------------------------------------------------

    def config(self, offset, form="<H"):
        return struct.unpack(form, self.read(CONFIG, offset, struct.calcsize(form)))[0]

    def set_config(self, offset, value, form="<H"):
        self.write(CONFIG, offset, struct.pack(form, value))

    def capability(self, wanted):
        at = self.config(0x34, "<B")
        while at:
            if self.config(at, "<B") == wanted:
                return at
            at = self.config(at + 1, "<B")
        return 0

    def extended(self, wanted):
        at = 0x100
        while at:
            head = self.config(at, "<I")
            if head & 0xFFFF == wanted:
                return at
            at = head >> 20
        return 0

    def enable(self, *, master=True, msi=True):
        self.set_config(4, 0x2 | (0x4 if master else 0))
        self.set_config(self.capability(5) + 2, int(msi))

    # -- memory and interrupts --------------------------------------------------------------

    def map(self, address, size, fd=None, offset=0, flags=3):
        fds = () if fd is None else (fd,)
        self.ask(DMA_MAP, struct.pack("<IIQQQ", 32, flags, offset, address, size), fds)

    def unmap(self, address, size, flags=0):
        self.ask(DMA_UNMAP, struct.pack("<IIQQ", 24, flags, address, size))

    def guest(self, address, size):
        memory = Memory(size)
        self.map(address, size, memory.fd)
        return memory

    def irqs(self, flags, index, start, count, fds=(), data=b""):
        body = struct.pack("<IIIII", 20 + len(data), flags, index, start, count) + data
        self.ask(SET_IRQS, body, fds)

    def eventfd(self):
        event = Event()
        self.irqs(4 | 32, MSI, 0, 1, (event.fd,))
        return event


class Memory:
    def __init__(self, size):
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)


class Event:
    def __init__(self):
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)

    def wait(self, timeout=10):
        """How often it was raised since the last look; 0 when the time is over."""
        if not select.select([self.fd], [], [], timeout)[0]:
            return 0
        return os.eventfd_read(self.fd)


def held(fd):
    """How many descriptors of this process are of the same file as this one, itself included."""
    found, wanted = 0, os.fstat(fd)
    for entry in Path("/proc/self/fd").iterdir():
        try:
            facts = entry.stat()
        except FileNotFoundError:
            continue
        found += (facts.st_dev, facts.st_ino) == (wanted.st_dev, wanted.st_ino)
    return found
