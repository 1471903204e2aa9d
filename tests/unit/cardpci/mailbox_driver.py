"""A driver of the mailbox, written from docs/card-protocol.md: registers and a window."""

import mmap
import time

STATUS, CONTROL, SESSION, IRQ_STATUS, IRQ_MASK = 0x0C, 0x10, 0x14, 0x18, 0x1C
TX_OFFSET, TX_SIZE, TX_HEAD, TX_TAIL = range(0x20, 0x30, 4)
RX_OFFSET, RX_SIZE, RX_HEAD, RX_TAIL = range(0x30, 0x40, 4)
READY, OPEN, ENDED, BROKEN = 1, 2, 4, 8


class MailboxDriver:
    def __init__(self, client):
        self.client = client
        _, size, _ = client.region_info(2)
        (fd,) = client.fds
        self.window = mmap.mmap(fd, size)
        self.tx = client.get(TX_OFFSET), client.get(TX_SIZE)
        self.rx = client.get(RX_OFFSET), client.get(RX_SIZE)

    def open(self):
        before = self.client.get(SESSION)
        self.client.put(CONTROL, 1)
        self.until(lambda: self.status & OPEN and self.client.get(SESSION) != before)
        self.head = self.tail = 0

    @property
    def status(self):
        return self.client.get(STATUS)

    def until(self, condition, timeout=20):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    def send(self, data):
        """All of it, as room comes."""
        offset, size = self.tx
        while data:
            room = size - (self.head - self.client.get(TX_TAIL)) % 2**32
            for byte in data[:room]:
                self.window[offset + self.head % size] = byte
                self.head = (self.head + 1) % 2**32
            data = data[room:]
            self.client.put(TX_HEAD, self.head)

    def receive(self):
        """What is there."""
        offset, size = self.rx
        head = self.client.get(RX_HEAD)
        data = bytearray()
        while self.tail != head:
            data.append(self.window[offset + self.tail % size])
            self.tail = (self.tail + 1) % 2**32
        self.client.put(RX_TAIL, self.tail)
        return bytes(data)
