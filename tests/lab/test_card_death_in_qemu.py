"""A card that dies while a guest has its functions, and another in its place.

It takes 80 seconds, nearly all of it until Linux lets go of a dead function that vfio-pci had: it
reads COMMAND over and over, which looks like `pci_dev_wait` (60 s); disable_idle_d3 does not help.
"""

from __future__ import annotations

import pytest
from card_machine import Machine, Rig

from virtfabric.shim.cardpci.card import NoSlots


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


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
            machine.unplug(function)
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
