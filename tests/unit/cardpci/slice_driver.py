"""A driver of a slice's function, written from docs/card-protocol.md: it shares no code with it."""

import struct
import time

PAGE = 4096
RAM = 0x4000_0000
SIZE = 8 << 20
RING, DONE, DATA = RAM, RAM + 0x10000, RAM + 0x100000
STATE, IRQ_STATUS, IRQ_MASK, FAULT = 0x0C, 0x10, 0x14, 0x20
DMA_READ, DMA_WRITTEN, DMA_REFUSED = 0x128, 0x130, 0x138
SEAL, OPEN, COMPRESS, DECOMPRESS = 0x10, 0x11, 0x20, 0x21
STORE, LOAD, SEND, RECEIVE = 1, 2, 0x30, 0x31


def text(data):
    return data.rstrip(b"\0").decode()


class SliceDriver:
    def __init__(self, client, queue=0, entries=8, *, ram=None):
        self.client = client
        self.at = 0x200 + 0x40 * queue
        self.ring, self.done = RING + 0x20000 * queue, DONE + 0x20000 * queue
        self.entries = entries
        self.ram = ram or client.guest(RAM, SIZE)
        self.event = client.eventfd()
        client.enable()
        self.sent = 0
        self.start()

    def start(self):
        client, at = self.client, self.at
        client.put64(at, self.ring)
        client.put64(at + 0x08, self.done)
        client.put(at + 0x10, self.entries)
        client.put(at + 0x14, 1)
        self.sent = 0
        self.poke(self.done, bytes(16 * self.entries))

    def stop(self):
        self.client.put(self.at + 0x14, 0)

    @property
    def status(self):
        return self.client.get(self.at + 0x18)

    def peek(self, address, size):
        return self.ram.bytes[address - RAM : address - RAM + size]

    def poke(self, address, data):
        self.ram.bytes[address - RAM : address - RAM + len(data)] = data

    def key(self, number=0):
        self.client.put(0x38, number)
        return self.client.get(0x3C)

    def piece(self, number=0):
        self.client.put(0x104, number)
        return self.client.get64(0x108), self.client.get64(0x110)

    def describe(self, operation, *, key=0, source=(0, 0), target=(0, 0), parameter=(0, 0),
                 card=(0, 0), flags=0, cookie=0, reserved=0):  # fmt: skip
        data = struct.pack(
            "<HHIQQQQIIIIII", operation, flags, key, source[0], target[0], parameter[0], card[0],
            source[1], target[1], parameter[1], card[1], cookie, reserved,
        )  # fmt: skip
        place = self.sent % self.entries
        self.poke(self.ring + 64 * place, data)
        self.sent += 1

    def ring_doorbell(self):
        self.client.put(self.at + 0x1C, self.sent)

    def wait(self, number=None, timeout=20):
        """The completion of the operation with that number, from 1 on: status, written, cookie."""
        number = number or self.sent
        at = self.done + 16 * ((number - 1) % self.entries)
        deadline = time.monotonic() + timeout
        while struct.unpack("<I", self.peek(at + 12, 4))[0] != number:
            assert time.monotonic() < deadline, f"operation {number} does not end"
            time.sleep(0.0005)
        return struct.unpack("<III", self.peek(at, 12))

    def do(self, operation, **more):
        self.describe(operation, **more)
        self.ring_doorbell()
        status, written, _ = self.wait()
        return status, written

    def store(self, address, data, key=None):
        self.poke(DATA, data)
        key = self.key() if key is None else key
        return self.do(STORE, key=key, source=(DATA, len(data)), card=(address, 0))

    def compute(self, operation, source, *, parameter=b"", card=(0, 0), key=None, room=None):
        """Status and result; everything goes through the guest's memory."""
        room = min(len(source) + 4096, 1 << 20) if room is None else room
        places = DATA + 0x100000, DATA + 0x300000, DATA + 0x500000
        self.poke(places[0], source)
        self.poke(places[2], parameter)
        key = self.key() if key is None else key
        status, written = self.do(
            operation, key=key, source=(places[0], len(source)), target=(places[1], room),
            parameter=(places[2], len(parameter)), card=card,
        )  # fmt: skip
        return status, self.peek(places[1], written)
