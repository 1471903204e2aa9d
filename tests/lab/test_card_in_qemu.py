"""A slice's function in a real guest: QEMU plugs it, Linux and vfio see a device, AES comes right.

The card runs in this process; the guest has an IOMMU and drives the ring through vfio from inside
(`card_guest/vfcard.c`), waits for MSI, and is judged by what it tells on its console, against
published vectors and against what the card says of itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.extend(str(Path(__file__).parents[1] / "unit" / room) for room in ("card", "cardpci"))

from card_machine import Machine, Rig
from slice_world import spec

from virtfabric.protocol import messages as m


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


def check_device(told):
    assert told["management-device"] == "0x0c01"
    assert told["slice-device"] == "0x0c02"
    assert told["slice-class"] == "0x108000"
    assert (told["slice-current_link_width"], told["slice-max_link_width"]) == ("4", "4")
    assert told["management-current_link_width"] == "16"
    assert told["slice-reset_method"].split()[0] == "flr"
    assert told["management-extended"] == "0d00010000000000", "ACS, version 1, the last, empty"
    assert told["slice-extended"] == "0d00811000000000", "the same; its badge follows at 108h"
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
