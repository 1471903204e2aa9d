"""A card's management function as sysfs shows it: `enable`, `resource0` and `resource2` are files.

A thread carries what is written into the registers to the function, and what it shows back. It can
be pulled out, as a function is: who has it mapped then gets SIGBUS.
"""

import os
import threading
import time

CONTROL, SHOWN, WRITTEN = 0x10, (0x0C, 0x2C, 0x38, 0x14), (0x28, 0x3C)


class SysfsFunction:
    def __init__(self, directory, client, window):
        directory.mkdir(parents=True)
        self.directory, self.client = directory, client
        (directory / "enable").write_text("0\n")
        (directory / "resource2").symlink_to(f"/proc/{os.getpid()}/fd/{window}")
        self.registers = directory / "resource0"
        self.registers.write_bytes(client.read(0, 0, 0x80).ljust(4096, b"\0"))
        self.file = self.registers.open("r+b", buffering=0)
        self.known = dict.fromkeys(WRITTEN, 0)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._carry)
        self.thread.start()

    def get(self, at):
        return int.from_bytes(os.pread(self.file.fileno(), 4, at), "little")

    def put(self, at, value):
        os.pwrite(self.file.fileno(), value.to_bytes(4, "little"), at)

    def _carry(self):
        while not self.ended.is_set():
            if order := self.get(CONTROL):
                self.put(CONTROL, 0)
                for at in WRITTEN:
                    self.known[at] = 0
                    self.put(at, 0)
                self.client.put(CONTROL, order)
            for at in WRITTEN:
                if (value := self.get(at)) != self.known[at]:
                    self.known[at] = value
                    self.client.put(at, value)
            for at in SHOWN:
                self.put(at, self.client.get(at))
            time.sleep(0.0005)

    def close(self):
        self.ended.set()
        self.thread.join()
        self.file.close()

    def pull_out(self):
        self.close()
        os.truncate(self.registers, 0)
        self.registers.unlink()
