"""The simplest function: a register that does DMA. Offset 0 address, 8 length, 12 go, 16 result."""

import os
import struct
import threading

from virtfabric.shim.vfiouser import config as pci
from virtfabric.shim.vfiouser.function import Region
from virtfabric.shim.vfiouser.memory import DmaRefusedError

SIZE = 4096
DONE, REFUSED = 1, 0xFFFFFFFF


class Reverser:
    """Turns bytes of the guest's memory round, at once, in the thread that asks."""

    def __init__(self, *, width=4, window=True):
        self.config = pci.ConfigSpace(
            pci.Identity(0xF0CA, 0x1234, 0x120000, 0xF0CA, 7),
            [pci.Bar(0, SIZE), pci.Bar(2, 1 << 20, wide=True)],
            [pci.power_management(), pci.message_interrupts(), pci.express_endpoint(width),
             pci.access_control()],
        )  # fmt: skip
        self.fd = os.memfd_create("window")
        os.ftruncate(self.fd, 1 << 20)
        self.regions = {0: Region(SIZE)} | ({2: Region(1 << 20, self.fd)} if window else {})
        self.memory = bytearray(SIZE)
        self.bus = None
        self.resets = 0
        self.gone = threading.Event()

    def plug(self, bus):
        self.gone.clear()
        self.bus = bus

    def unplug(self):
        self.bus = None
        self.gone.set()

    def reset(self):
        self.resets += 1
        self.memory[:] = bytes(SIZE)

    def read(self, region, offset, count):
        return bytes(self.memory[offset : offset + count])

    def write(self, region, offset, data):
        self.memory[offset : offset + len(data)] = data
        if offset == 12:
            address, length = struct.unpack_from("<QI", self.memory)
            try:
                self.bus.write(address, self.bus.read(address, length)[::-1])
                result = DONE
            except DmaRefusedError:
                result = REFUSED
            struct.pack_into("<I", self.memory, 16, result)
            self.bus.interrupt()
