"""A slice's function in a real guest: QEMU plugs it, Linux and vfio see a device, AES comes right.

The card runs in this process; the guest has an IOMMU and drives the ring through vfio from inside
(`card_guest/vfcard.c`), waits for MSI, and is judged by what it tells on its console, against
published vectors and against what the card says of itself.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.extend(
    str(Path(__file__).parents[1] / "unit" / room)
    for room in ("cardpci", "vfiouser", "card", "trust")
)

from card_guest.image import ensure_card_guest
from card_rig import Rig
from slice_world import spec

from virtfabric.model.errors import VirtfabricError
from virtfabric.protocol import messages as m
from virtfabric.shim.cardpci.card import NoSlots
from virtfabric.shim.lab.outer import choose_outer
from virtfabric.shim.topology.needs import DeviceNeed

PORTS = ("management", "slice0", "slice1")


class Machine:
    """A small guest with empty ports, and the slots of a card that is plugged there by QMP."""

    def __init__(self, path, words):
        self.console, self.path = path / "console", path
        image = ensure_card_guest()
        outer = choose_outer([DeviceNeed("vfio-user-pci", frozenset({"socket"}))], print)
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
        gone = time.monotonic() + 200
        while self.has(f"f-{name}"):
            if time.monotonic() > gone:
                raise VirtfabricError("the guest does not let go of it")
            time.sleep(0.1)
        del self.seats[name]


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_a_guest_computes_through_a_slice(tmp_path, rig):
    rig.runner.close()
    other = rig.bench.make("r-other", spec(cores=1, memory=1))
    seat = other.seat
    machine = Machine(tmp_path, f"vfcard.key={seat.keys[0]} vfcard.start={seat.memory[0].start}")
    try:
        machine.wait_for("ready")
        rig.slots = machine
        machine.elsewhere = {other.id}
        rig.run()
        machine.wait_for("window-reads-per-second")
        name = rig.aes()
        machine.wait_for("end")
        check_device(machine.told())
        check_mailbox(machine.told())
        check_results(machine.told())
        check_refusals(rig, machine.told(), seat)
        check_card_agrees(rig, machine.told(), name)
        rig.ask(m.Assign(name, ""))
        rig.release(name)
        machine.wait_for("gone")
        assert machine.process.poll() is None
        assert rig.told == []
    finally:
        print(machine.tell()[-8000:])
        machine.close()


def test_a_card_that_dies_is_replaced(tmp_path, rig):
    """Its sockets end without a word; the guest lives, and the same ports take it again."""
    rig.runner.close()
    machine = Machine(tmp_path, "vfcard.key=99 vfcard.start=0")
    try:
        machine.wait_for("ready")
        rig.slots = machine
        rig.run()
        machine.wait_for("window-reads-per-second")
        name = rig.aes()
        machine.wait_for("end")
        die(rig)
        assert machine.qmp("query-status")["status"] == "running"
        for function in (name, "management"):
            t=time.monotonic(); machine.unplug(function); print("UNPLUG", function, time.monotonic()-t)
        machine.wait_until(lambda: machine.tell().count("VFCARD gone=1") == 2)
        rig.bench.cut_power()
        rig.slots = machine
        rig.run("boot-2")
        machine.wait_until(lambda: machine.tell().count("VFCARD end=0") == 2)
        assert rig.told == []
    finally:
        print(machine.tell()[-8000:])
        machine.close()


def die(rig):
    """As a process that is killed: nothing is unplugged first."""
    device = rig.runner.device
    device._slots = NoSlots()
    rig.runner.close()


def check_device(told):
    assert told["management-device"] == "0x0c01"
    assert told["slice-device"] == "0x0c02"
    assert told["slice-class"] == "0x108000"
    assert (told["slice-current_link_width"], told["slice-max_link_width"]) == ("4", "4")
    assert told["management-current_link_width"] == "16"
    assert told["slice-reset_method"].split()[0] == "flr"
    assert told["slice-extended"] == "0d00010000000000", "ACS, version 1, the last, empty"
    assert told["slice-group-size"] == "1", "an IOMMU group of its own"
    assert (told["can-reset"], told["msi-vectors"], told["msix-vectors"]) == ("1", "1", "0")
    assert (told["magic"], told["state"]) == (b"VFCS".hex(), "3")


def check_mailbox(told):
    assert told["mailbox-magic"] == b"VFCM".hex()
    assert told["mailbox-answer"] == "1503", "an alert of TLS"
    assert told["mailbox-answer-length"] == "7"
    # the window is memory, the registers are messages
    assert int(told["window-reads-per-second"]) > 3 * int(told["register-reads-per-second"])


def check_results(told):
    plain = (
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    assert told["case4-sealed"] == (
        "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e"
        "21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091"
        + "5bc94fbc3221a5db94fae95ae7121a47"
    )
    assert told["case16-sealed"] == (
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        + "76fc6ece0f4e1768cddf8853bb2d551b"
    )
    for case in ("case4", "case16"):
        assert told[f"{case}-opened"] == plain
        assert (told[f"{case}-status"], told[f"{case}-forged"]) == ("0", "8")
    assert told["dma-read-before"] == "0"
    descriptors, secrets, plains, parameters = 8 * 64, 16 + 32, 2 * 60, 6 * 32
    assert int(told["dma-read-after"]) == descriptors + secrets + plains + 4 * 76 + parameters
    assert int(told["dma-written-after"]) == 8 * 16 + 2 * 76 + 2 * 60


def check_refusals(rig, told, seat):
    assert (told["foreign-status"], told["foreign-fault"]) == ("5", "2")
    assert told["foreign-fault-key"] == str(seat.keys[0])
    assert (told["outside-status"], told["outside-fault"]) == ("4", "1")
    assert told["outside-fault-address"] == str(0x4000_0000)
    assert told["outside-refused"] == "1"
    assert [told[f"after-reset-{what}"] for what in ("fault", "queue", "status")] == ["0"] * 3


def check_card_agrees(rig, told, name):
    (event,) = (one for one in rig.events if one.what == "access-fault")
    assert event.slice == name
    reading = next(
        r
        for t in rig.runner.ask(lambda: rig.bench.pass_time(2))
        if isinstance(t, m.Telemetry)
        for r in t.readings
        if r.subject == name
    )
    assert reading.values["dma_read"] > int(told["dma-read-after"])
    assert reading.values["dma_refused"] == 1
