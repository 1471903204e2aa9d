"""`virtfabric ports add` on a real libvirtd: the ports are there at the next boot, nothing moved.

Judged by libvirt's XML, read with the standard library, and by QEMU's own `query-pci`.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from lab_host import Guest, LabHost

if TYPE_CHECKING:
    from collections.abc import Iterator

DATABASE = Guest(name="database", priority=90, cpu="300m:700m", virtio_mem=64)
OLD_PC = """\
<domain type='qemu'><name>old</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>
"""
FLEETING = """\
<domain type='qemu'><name>fleeting</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>
"""


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vfprt{os.getpid()}", tmp_path_factory.mktemp("ports") / "lab") as lab:
        lab.start_agent()
        lab.start_guests(DATABASE)
        lab.settle()
        yield lab


def xml(host: LabHost, name: str, *options: str) -> str:
    return host.virsh("dumpxml", name, *options).stdout


def places(text: str) -> dict[str, str]:
    """PCI address of every device, each known by its element, model and number among its like."""
    found: dict[str, str] = {}
    for device in ET.fromstring(text).iterfind("devices/*"):
        address = device.find("address[@type='pci']")
        if address is not None:
            name = " ".join([device.tag, device.get("type", ""), device.get("index", "")])
            number = sum(one.startswith(name) for one in found)
            bus, slot, function = (int(address.get(k, "0"), 0) for k in ("bus", "slot", "function"))
            found[f"{name}#{number}"] = f"{bus:02x}:{slot:02x}.{function}"
    return found


def root_ports(text: str) -> dict[int, str]:
    """Address on the root bus of each root port, by index."""
    ports = ET.fromstring(text).iterfind("devices/controller[@model='pcie-root-port']")
    found = {}
    for port in ports:
        address = port.find("address")
        assert address is not None
        slot, function = (int(address.get(k, "0"), 0) for k in ("slot", "function"))
        found[int(port.get("index", ""))] = f"{slot:02x}.{function}"
    return found


def bridges_in_qemu(host: LabHost, name: str) -> dict[str, str]:
    """Id of each bridge on QEMU's root bus, by address."""
    answer = host.virsh("qemu-monitor-command", name, '{"execute": "query-pci"}').stdout
    devices: list[dict[str, Any]] = json.loads(answer)["return"][0]["devices"]
    return {f"{d['slot']:02x}.{d['function']}": d["qdev_id"] for d in devices if "pci_bridge" in d}


def test_added_ports_are_there_at_the_next_boot_and_nothing_moved(host: LabHost) -> None:
    before_live, before = xml(host, "database"), xml(host, "database", "--inactive")
    shown = host.cli_json("ports", "database")
    assert {p["index"] for p in shown["live"]["ports"]} == set(root_ports(before_live))

    done = host.cli_json("ports", "add", "database", "--count", "9")
    after = xml(host, "database", "--inactive")
    assert xml(host, "database") == before_live  # nothing of it concerns the running guest
    assert places(before).items() <= places(after).items()
    added = {i: a for i, a in root_ports(after).items() if i not in root_ports(before)}
    assert sorted(added) == sorted(done["added"])
    assert len(added) == 9
    assert done["persistent"]["free"] == shown["persistent"]["free"] + 9

    host.virsh("destroy", "database")
    assert host.start_guest("database").returncode == 0
    host.wait_ready("database")
    live = xml(host, "database")
    assert places(before).items() <= places(live).items()
    assert added.items() <= root_ports(live).items()
    in_qemu = bridges_in_qemu(host, "database")
    assert {a: f"pci.{i}" for i, a in root_ports(live).items()} == in_qemu
    assert host.cli_json("ports", "database")["live"]["free"] == done["persistent"]["free"]


def test_a_device_goes_into_an_added_port(host: LabHost) -> None:
    """As many as there are free ports, and not one more."""
    free = host.cli_json("ports", "database")["live"]["free"]
    path = host.box.path("/run/net.xml")
    path.write_text("<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>")
    for _ in range(free):
        host.virsh("attach-device", "database", "/run/net.xml", "--live")
    assert host.cli_json("ports", "database")["live"]["free"] == 0
    done = host.virsh("attach-device", "database", "/run/net.xml", "--live", check=False)
    assert done.returncode != 0
    assert "No more available PCI slots" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["database", "--count", "0"], 2, "is not at least 1"),
        (["database", "--count", "1000"], 3, "do not fit on its root bus"),
        (["old", "--count", "1"], 3, "root ports take q35"),
        (["fleeting", "--count", "1"], 3, "is transient"),
        (["nobody", "--count", "1"], 3, "there is no guest"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    host: LabHost, words: list[str], code: int, problem: str
) -> None:
    if words[0] == "old":
        host.box.path("/run/old.xml").write_text(OLD_PC)
        host.virsh("define", "/run/old.xml")
    if words[0] == "fleeting":
        host.box.path("/run/fleeting.xml").write_text(FLEETING)
        host.virsh("create", "/run/fleeting.xml", "--paused")
    host.wait(lambda: _is_known(host, words[0]), "the agent knows the guest", timeout_s=20)
    before = xml(host, "database", "--inactive")
    done = host.cli("ports", "add", *words)
    assert (done.returncode, problem in done.stderr) == (code, True), done.stderr
    assert xml(host, "database", "--inactive") == before


def _is_known(host: LabHost, name: str) -> bool:
    return name == "nobody" or name in {g["name"] for g in host.cli_json("guests")}


def test_a_strict_guest_with_too_few_ports_is_not_started(host: LabHost) -> None:
    host.virsh("destroy", "database")
    free = host.cli_json("ports", "database")["persistent"]["free"]
    wish = f"<virtfabric:device capability='net.vf' count='{free + 2}'/>"
    text = xml(host, "database", "--inactive")
    strict = text.replace("admission='lax'", "admission='strict'").replace('"lax"', '"strict"')
    assert strict != text
    host.box.path("/run/strict.xml").write_text(
        strict.replace("</virtfabric:policy>", f"{wish}</virtfabric:policy>")
    )
    host.virsh("define", "/run/strict.xml")
    done = host.start_guest("database")
    assert done.returncode != 0
    assert "no-free-port: database lacks 2 PCIe root ports" in done.stderr
    assert "virtfabric ports add database --count 2" in done.stderr
    host.cli_json("ports", "add", "database", "--count", "2")
    assert "no-free-port" not in host.start_guest("database").stderr
