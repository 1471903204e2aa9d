"""A card's mailbox over ivshmem-doorbell in a real guest, in the QEMU that this machine has.

The card is a process of its own. The guest (`card_guest/vfcard.c`) has its interrupts through vfio,
then speaks through sysfs, and is judged by what it tells on its console. Then the card is killed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from card_machine import Machine

from virtfabric.shim.topology.needs import DeviceNeed

CARD = Path(__file__).parent / "ivshmem_card.py"


class Card:
    """One that runs; `socket` is of its ivshmem server."""

    def __init__(self, path):
        path.mkdir()
        self.process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, str(CARD), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.socket = self.process.stdout.readline().strip()
        assert self.socket

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class IvshmemMachine(Machine):
    def __init__(self, path):
        super().__init__(
            path, "", DeviceNeed("ivshmem-doorbell", frozenset({"chardev", "vectors"}))
        )

    def plug(self, name, path):
        address = {"type": "unix", "data": {"path": str(path)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        self.qmp("chardev-add", id=f"c-{name}", backend=backend)
        self.seats[name] = port = f"slice{len(self.seats)}"
        self.qmp("device_add", driver="ivshmem-doorbell", id=f"f-{name}", bus=port,
                 chardev=f"c-{name}", vectors=1)  # fmt: skip


@pytest.fixture
def start_card(tmp_path):
    cards = []

    def start(name):
        cards.append(Card(tmp_path / name))
        return cards[-1]

    yield start
    for card in cards:
        card.kill()


def test_a_mailbox_in_shared_memory_outlives_its_card(tmp_path, start_card):
    """The guest lives when the card is killed, and another takes over, in another port.

    Not in the same one: QEMU without KVM falls over after an unplug (docs/card-protocol.md).
    """
    machine = IvshmemMachine(tmp_path)
    try:
        machine.wait_for("ready")
        card = start_card("first")
        machine.plug("first", card.socket)
        check_guest(machine)
        card.kill()
        beat = last_beat(machine)
        machine.wait_until(lambda: last_beat(machine) >= beat + 5)
        assert machine.qmp("query-status")["status"] == "running"
        told_before = machine.tell().count("VFCARD shared-answer=1503")
        machine.plug("second", start_card("second").socket)
        machine.wait_until(lambda: machine.tell().count("VFCARD shared-answer=1503") > told_before)
        assert machine.process.poll() is None
    finally:
        print(machine.tell()[-8000:])
        machine.close()


def check_guest(machine):
    machine.wait_for("shared-beat")
    told = machine.told()
    assert told["shared-magic"] == b"VFCM".hex()
    assert told["shared-id"] == "1", "the card is 0"
    assert int(told["shared-interrupts"]) == 50, "one for each session that it opened"
    assert told["shared-answer"] == "1503", "an alert of TLS"
    assert told["shared-answer-length"] == "7"
    assert told["shared-status"] == "3"


def last_beat(machine):
    return int(machine.told()["shared-beat"])
