"""A small guest with empty ports, in QEMU by TCG, for functions of a card in this process."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.extend(
    str(Path(__file__).parents[1] / "unit" / room)
    for room in ("cardpci", "vfiouser", "card", "trust")
)

from card_guest.image import ensure_card_guest
from card_rig import Rig

from virtfabric.model.errors import VirtfabricError
from virtfabric.shim.lab.outer import choose_outer
from virtfabric.shim.topology.needs import DeviceNeed

__all__ = ["Machine", "Rig"]
VFIO_USER = DeviceNeed("vfio-user-pci", frozenset({"socket"}))
PORTS = ("management", "slice0", "slice1")


class Machine:
    """A small guest with empty ports, and the slots of a card that is plugged there by QMP."""

    def __init__(self, path, words, need=VFIO_USER):
        self.console, self.path = path / "console", path
        image = ensure_card_guest()
        outer = choose_outer([need], print)
        ports = [
            part
            for number, name in enumerate(PORTS)
            for part in ("-device", f"pcie-root-port,id={name},chassis={number + 1},"
                         f"addr=10.{number},multifunction=on")
        ]  # fmt: skip
        self.log = (path / "qemu.log").open("wb")
        self.process = subprocess.Popen(
            ["nice", "-n", "19", *outer.argv, "-nodefaults", "-display", "none", "-no-reboot",
             "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "512M",
             "-machine", "q35,memory-backend=ram",
             "-object", "memory-backend-memfd,id=ram,size=512M,share=on",
             "-device", "intel-iommu,intremap=on,caching-mode=on", *ports,
             "-kernel", str(image.kernel), "-initrd", str(image.initrd),
             "-append", f"{image.cmdline} {words}",
             "-serial", f"file:{self.console}", "-qmp", f"unix:{path / 'qmp'},server=on,wait=off"],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        self.seats, self.elsewhere = {}, set()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def tell(self):
        console = self.console.read_text(errors="replace") if self.console.exists() else ""
        return (self.path / "qemu.log").read_text(errors="replace") + console

    def told(self):
        """What the guest has told so far, by name."""
        return dict(re.findall(r"^VFCARD ([\w-]+)=(.*?)\r?$", self.tell(), re.MULTILINE))

    def wait_for(self, name, timeout=90):
        self.wait_until(lambda: name in self.told(), timeout)

    def wait_until(self, condition, timeout=90):
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.tell()
            assert "failed" not in self.told(), self.tell()
            assert time.monotonic() < deadline, self.tell()
            time.sleep(0.1)

    def qmp(self, command, **arguments):
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rw") as file:
            sock.settimeout(30)
            sock.connect(str(self.path / "qmp"))
            file.readline()
            for name, given in (("qmp_capabilities", {}), (command, arguments)):
                file.write(json.dumps({"execute": name, "arguments": given}) + "\n")
                file.flush()
                while "event" in (answer := json.loads(file.readline())):
                    pass
                if "error" in answer:
                    raise VirtfabricError(answer["error"]["desc"])
        return answer["return"]

    def has(self, name):
        return any(one["name"] == name for one in self.qmp("qom-list", path="/machine/peripheral"))

    # -- `Slots` ----------------------------------------------------------------------------

    def plug(self, name, path):
        if name in self.elsewhere:
            return
        port = next(port for port in PORTS if port not in self.seats.values())
        self.seats[name] = port
        self.qmp("device_add", driver="vfio-user-pci", id=f"f-{name}", bus=port,
                 socket={"type": "unix", "path": str(path)})  # fmt: skip

    def unplug(self, name):
        if self.process.poll() is not None or name not in self.seats:
            return
        self.qmp("device_del", id=f"f-{name}")
        gone = time.monotonic() + 150
        while self.has(f"f-{name}"):
            if time.monotonic() > gone:
                raise VirtfabricError("the guest does not let go of it")
            time.sleep(0.1)
        del self.seats[name]
