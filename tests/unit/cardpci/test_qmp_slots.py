"""Functions behind the ports of a QEMU, by its monitor."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from card_process import SocketHost, write_card
from card_rig import Rig
from fake_qmp import FakeQemu
from slice_driver import text
from slice_world import spec
from vfio_client import Client

from virtfabric.cli.cardd import main
from virtfabric.protocol import messages as m
from virtfabric.shim.cardpci.qmpslots import QmpSlots, SlotError

ROOT = Path(__file__).parents[3]
PORTS = ("port0", "port1")


@pytest.fixture
def qemu(tmp_path):
    qemu = FakeQemu(tmp_path / "qmp", PORTS)
    yield qemu
    qemu.close()


@pytest.fixture
def slots(qemu):
    return QmpSlots(qemu.path, PORTS, unplug_s=0.5)


def test_functions_go_behind_free_ports_and_come_out_again(qemu, slots, tmp_path):
    slots.plug("management", tmp_path / "a.sock")
    slots.plug("slice-1", tmp_path / "b.sock")
    assert qemu.devices == {
        "card-port0": ("port0", str(tmp_path / "a.sock")),
        "card-port1": ("port1", str(tmp_path / "b.sock")),
    }
    slots.unplug("slice-1")
    assert list(qemu.devices) == ["card-port0"]
    slots.plug("slice-2", tmp_path / "c.sock")
    assert qemu.devices["card-port1"] == ("port1", str(tmp_path / "c.sock"))


def test_more_functions_than_ports(qemu, slots, tmp_path):
    for name in ("management", "slice-1"):
        slots.plug(name, tmp_path / name)
    with pytest.raises(SlotError, match="no port is free; functions are behind port0, port1"):
        slots.plug("slice-2", tmp_path / "c")
    slots.unplug("slice-2")
    assert len(qemu.devices) == 2


def test_what_a_card_of_before_left_is_taken_out_first_and_nothing_else(qemu, slots, tmp_path):
    qemu.ports += ("other",)
    qemu.devices = {
        "card-port1": ("port1", "dead"), "card-port0": ("port0", "dead"), "nic": ("other", "-"),
    }  # fmt: skip
    slots.plug("management", tmp_path / "a")
    assert qemu.calls == [
        ("device_del", "card-port0"), ("device_del", "card-port1"), ("device_add", "card-port0"),
    ]  # fmt: skip
    assert set(qemu.devices) == {"nic", "card-port0"}


@pytest.mark.parametrize(
    ("attribute", "words"),
    [("keeps", r"does not let go of card-port1 within 0\.5 s"), ("protests", "keeps card-port1")],
)
def test_a_machine_that_does_not_let_go(qemu, slots, tmp_path, attribute, words):
    for name in ("management", "slice-1"):
        slots.plug(name, tmp_path / name)
    getattr(qemu, attribute).add("card-port1")
    with pytest.raises(SlotError, match=words):
        slots.unplug("slice-1")
    with pytest.raises(SlotError, match=words):
        slots.plug("slice-2", tmp_path / "c")
    getattr(qemu, attribute).clear()
    slots.plug("slice-2", tmp_path / "c")
    assert qemu.devices["card-port1"] == ("port1", str(tmp_path / "c"))


def test_a_port_that_is_not_there_is_named(qemu, tmp_path):
    slots = QmpSlots(qemu.path, ["nowhere"])
    with pytest.raises(SlotError, match="Bus 'nowhere' not found"):
        slots.plug("management", tmp_path / "a")


def test_no_qemu(tmp_path):
    slots = QmpSlots(tmp_path / "none", PORTS, connect_s=0.2)
    with pytest.raises(SlotError, match="no QEMU answers on"):
        slots.plug("management", tmp_path / "a")


def test_a_card_in_such_slots(qemu, slots, tmp_path):
    """Granted: behind a port; power gone: out; on again: plugged again."""
    (tmp_path / "card").mkdir()
    rig = Rig(tmp_path / "card")
    try:
        rig.runner.close()
        rig.slots = slots
        rig.run()
        rig.aes("r-1")
        rig.runner.close()
        assert qemu.devices == {}
        rig.run("boot-2")
        rig.runner.close()
        plugged = [name for call, name in qemu.calls if call == "device_add"]
        assert sorted(plugged) == ["card-port0"] * 2 + ["card-port1"] * 2
        assert not list(rig.path.glob("*.sock"))
        assert rig.told == []
    finally:
        rig.close()


# -- the command ------------------------------------------------------------------------------


class Command:
    """`virtfabric-card` with functions in a QEMU, until `stop` or `kill`."""

    def __init__(self, place, qemu):
        self.place = place
        words = ["--functions", place / "functions", "--qmp", qemu.path]
        words += [word for port in PORTS for word in ("--port", port)]
        self.log = (place / "log").open("a+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "virtfabric.cli.cardd", write_card(place), *words],
            stderr=self.log, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.host = None

    def greet(self):
        eventually(lambda: self.is_ready() or self.process.poll() is not None)
        self.host = SocketHost(self.place / "C-1.sock").greet()
        return self

    def is_ready(self):
        return (self.place / "log").read_text().rstrip().endswith(": ready")

    def end(self, number):
        if self.host:
            self.host.close()
        self.process.send_signal(number)
        assert self.process.wait(30) == (0 if number == signal.SIGTERM else -number)
        self.log.close()


def eventually(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_command_plugs_what_is_granted_also_after_its_death(qemu, tmp_path):
    card = Command(tmp_path, qemu).greet()
    decision = card.host.ask(m.AllocationRequest("r-1", spec(cores=1), "guest"))
    one = card.host.ask(m.Commit(decision.reservation)).slice
    eventually(lambda: set(qemu.devices) == {"card-port0", "card-port1"})
    path = Path(qemu.devices["card-port1"][1])
    client = Client(path)
    assert text(client.read(0, 0x80, 64)) == one.id
    client.close()
    card.end(signal.SIGKILL)

    del qemu.calls[:]
    card = Command(tmp_path, qemu).greet()
    eventually(lambda: len(qemu.calls) == 4)
    assert [call for call, _ in qemu.calls] == ["device_del"] * 2 + ["device_add"] * 2
    assert card.host.ask(m.Release(one.id)) == m.Done()
    eventually(lambda: set(qemu.devices) == {"card-port0"})
    card.end(signal.SIGTERM)
    assert qemu.devices == {}


@pytest.mark.parametrize(
    "words",
    [["--qmp", "q", "--functions", "f"], ["--qmp", "q", "--port", "a"],
     ["--functions", "f", "--qmp", "q", "--port", "a", "--port", "a"]],
)  # fmt: skip
def test_words_that_do_not_go_together(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(write_card(tmp_path)), "--check", *words])
    assert end.value.code == 2
    assert "--" in capsys.readouterr().err
