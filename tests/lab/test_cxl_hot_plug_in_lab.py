"""CXL memory that is plugged into a running host, by way of an agent that restarts libvirtd.

What the agent says is not believed: sysfs, virsh, numa_maps and the guest itself are asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from cxl_bed import SERIAL, WINDOW, CxlBed

if TYPE_CHECKING:
    from running_lab import RunningLab

MIB = 1 << 20
NEW_SERIAL = "0x104"
RESTART = "/usr/local/bin/restart-libvirtd"
CONFIG = f"""\
[agent]
restart_libvirt = ["{RESTART}"]
drift_interval_s = 10
"""
PORT = "cxl0-spare0"

pytestmark = pytest.mark.timeout(0)


@pytest.fixture(scope="module")
def agent(cxl: RunningLab) -> CxlBed:
    """It serves, and restarts libvirtd where that is needed."""
    bed = CxlBed(cxl)
    bed.prepare()
    cxl.run(
        f"cat > {RESTART} <<'X'\n#!/bin/bash\nold=$(pidof libvirtd); kill $old\n"
        f"while [ -d /proc/$old ]; do read -rt 0.2 <> <(:); done; libvirtd -d\nX\n"
        f"chmod +x {RESTART}; cat > /etc/virtfabric/restart.toml <<'X'\n{CONFIG}X"
    )
    bed.start_agent()
    return bed


def plug(lab: RunningLab, device: str, serial: str) -> None:
    """A memdev comes into a spare port. Each has a backend of its own: QEMU frees none."""
    backend = f"{device}.volatile"
    lab.qmp(
        "object-add",
        {"qom-type": "memory-backend-ram", "id": backend, "size": 256 * MIB, "share": True},
    )
    place = {"driver": "cxl-type3", "id": device, "bus": PORT, "addr": "0x0"}
    lab.qmp("device_add", {**place, "sn": int(serial, 16), "volatile-memdev": backend})


def unplug(lab: RunningLab, device: str, left: int) -> None:
    """The host is asked to let it go, as by the button of its slot."""
    lab.qmp("device_del", {"id": device})
    lab.wait(f"[ $(ls /sys/bus/cxl/devices | grep -c ^mem) = {left} ]")


def memdevs(agent: CxlBed) -> int:
    return int(agent.lab.run("ls /sys/bus/cxl/devices | grep -c ^mem"))


def audited(agent: CxlBed, kind: str) -> list[object]:
    return [record["body"] for record in agent.ask("audit") if record["kind"] == kind]


def test_a_serial_that_comes_twice_is_used_for_nothing(agent: CxlBed) -> None:
    before = memdevs(agent)
    plug(agent.lab, "twin", SERIAL)
    agent.await_agent(
        f"any('{SERIAL}' in problem for problem in document['problems'])", words="memory"
    )
    said = agent.refused(agent.create_words())
    assert SERIAL in said
    assert agent.ground().regions == ()
    unplug(agent.lab, "twin", before)
    agent.await_agent("not document['problems']", words="memory")


def test_a_memdev_comes_is_used_by_a_dimm_and_goes(agent: CxlBed) -> None:
    lab, before = agent.lab, memdevs(agent)
    libvirtd = lab.run("pidof libvirtd")
    plug(lab, "added", NEW_SERIAL)
    agent.await_agent(
        f"any(m['serial'] == '{NEW_SERIAL}' for m in document['memdevs'])", words="memory"
    )
    agent.ask(f"memory region create --window {WINDOW} --memdev {NEW_SERIAL}")
    assert agent.ground().regions == ((NEW_SERIAL,),)
    # libvirt does not know the node: the agent sees to it
    lab.wait(f"now=$(pidof libvirtd) && [ $now != {libvirtd} ]", timeout_s=120)
    agent.await_agent("not document['host']['withheld']")
    assert audited(agent, "libvirt.restarted") == [{"for_nodes": [1]}]

    agent.define_tiered("db", 90, growth="dimm", touches_mib=128)
    agent.boot("db")
    assert "128MiB" in agent.refused("allocate db --memory +64M --tier cxl", 2)
    grant = agent.ask("allocate db --memory +128M --tier cxl --deadline 300")["result"]["grant"]
    assert dimms(agent) == [("1", 128 * MIB)]
    touched = int(agent.await_told("db", "memory touched=").rpartition("=")[2])
    assert touched >= 126 * MIB  # the guest's own kernel brought it online, and wrote to it
    assert agent.pages_on_node("db", 1) * 4096 >= touched

    assert "db" in agent.refused(f"memory region destroy {agent.region_name()}")
    agent.ask(f"release {grant}")  # nobody knows whether the guest could let it go
    assert dimms(agent) == [("1", 128 * MIB)]
    left = agent.ask("memory reclaim 1 --detach --deadline 60", code=1)["result"]
    assert (left["freed"], left["out"]) == (0, 128 * MIB), left
    agent.stop("db")
    agent.ask(f"memory region destroy {agent.region_name()}")
    assert agent.ground().regions == ()
    assert agent.ground().nodes == "0"
    unplug(lab, "added", before)
    agent.await_agent(
        f"all(m['serial'] != '{NEW_SERIAL}' for m in document['memdevs'])", words="memory"
    )


def dimms(agent: CxlBed) -> list[tuple[str | None, int]]:
    """Node and bytes of each that the running guest has, by its live XML."""
    root = ET.fromstring(agent.lab.run("virsh -q dumpxml db"))
    assert {size.get("unit") for size in root.iterfind("devices/memory/target/size")} == {"KiB"}
    return [
        (device.findtext("source/nodemask"), int(device.findtext("target/size") or "0") << 10)
        for device in root.iterfind("devices/memory[@model='dimm']")
    ]
