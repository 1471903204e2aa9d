"""PCIe functions for running KVM guests: the agent as operators use it, on a real kernel.

Each test leaves its guests without functions; under TCG a guest's start takes a minute.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from device_bed import DeviceBed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from running_lab import RunningLab

CYCLES = int(os.environ.get("VIRTFABRIC_CYCLES", "20"))
NEAR_0 = {"0000:01:10.0", "0000:01:10.2"}
NEAR_1 = {"0000:51:10.0", "0000:51:10.2"}
NVME_VFS = {"0000:52:00.1", "0000:52:00.2"}
RECLAIMABLE = "<v:device capability='net.vf' count='{}' reclaimable='yes'/>"
ON_NODE = "<numatune><memory mode='restrictive' nodeset='{}'/></numatune>"

pytestmark = pytest.mark.timeout(0)


@pytest.fixture(scope="module")
def bed(passthrough: RunningLab) -> DeviceBed:
    """The agent serves, and guest web runs without a function."""
    bed = DeviceBed(passthrough)
    bed.prepare()
    bed.start_agent()
    bed.define("web", 50, more=ON_NODE.format(0))  # away from the NIC whose node is known
    bed.boot("web")
    return bed


@pytest.fixture
def web(bed: DeviceBed) -> Iterator[DeviceBed]:
    """As `bed`; what a failed test left granted is released."""
    yield bed
    for grant in bed.ask("grants"):
        bed.lab.run(f"virtfabric release {grant['id']}", code=None, timeout_s=400)


def test_the_tree_shows_ports_pools_and_uses(bed: DeviceBed) -> None:
    tree = bed.lab.run("virtfabric devices --tree")
    assert "├─ 0000:01:10.0  Ethernet  8086:10ca  no driver" in tree
    assert "[net.vf]  free" in tree
    functions = bed.functions()
    pools = {a: f["capability"] for a, f in functions.items() if f["capability"]}
    assert {a for a, capability in pools.items() if capability == "net.vf"} == NEAR_0 | NEAR_1
    assert {a for a, capability in pools.items() if capability == "storage.nvme"} == NVME_VFS
    assert any("eth1 is up" in why for why in functions["0000:01:00.0"]["obstacles"])
    assert any("mounted" in why for why in functions["0000:00:01.0"]["obstacles"])
    assert functions["0000:51:10.0"]["node"] == 1


def test_a_nic_comes_carries_traffic_and_goes(web: DeviceBed) -> None:
    before = web.vf_shown("eth1", 0), web.vf_shown("eth1", 1)
    grant = web.allocate("web", "net.vf")
    (address,) = web.held_by("web")
    assert web.hostdevs("web") == [address]
    assert address in NEAR_0
    assert web.driver(address) == "vfio-pci"
    given = web.vf_shown("eth1", sorted(NEAR_0).index(address))
    assert (given["trust"], given["spoofchk"]) == (True, False)
    web.answers("web", "eth1")
    web.assert_sound("web")
    web.release(grant)
    web.await_told("web", "gone net")
    assert web.hostdevs("web") == []
    assert (web.driver(address), web.override(address)) == ("none", "(null)")
    assert (web.vf_shown("eth1", 0), web.vf_shown("eth1", 1)) == before
    web.assert_sound("web")


def test_an_nvme_disk_is_written_and_read_in_the_guest(web: DeviceBed) -> None:
    grant = web.allocate("web", "storage.nvme")
    (address,) = web.held_by("web")
    assert address in NVME_VFS
    words = web.await_told("web", "block").split()
    assert words[-2].removeprefix("written=") == words[-1].removeprefix("read=")
    web.release(grant)
    web.await_told("web", "gone block")
    assert (web.driver(address), web.hostdevs("web")) == ("none", [])


def test_a_plain_function(web: DeviceBed) -> None:
    grant = web.allocate("web", "compute.edu")
    (address,) = web.held_by("web")
    assert address == "0000:02:00.0"  # nothing else is in its group
    assert "1234:11e8" in web.lab.run("virsh qemu-monitor-command web --hmp 'info pci'")
    web.release(grant)
    web.assert_sound("web")


def test_what_cannot_be_had_is_refused(web: DeviceBed) -> None:
    assert "crypto.aes" in web.refused("allocate web --device crypto.aes")
    said = web.refused("allocate web --device net.vf:5")
    assert "no-free-port" in said or "no-capacity" in said, said
    assert web.hostdevs("web") == []
    # the PF itself is up: in a pool it would be refused as well
    web.assert_sound("web")


def test_a_policy_brings_its_function_and_the_guests_end_gives_it_back(web: DeviceBed) -> None:
    web.define("batch", 10, RECLAIMABLE.format(1))
    web.boot("batch")
    web.await_told("batch", "net")
    (address,) = web.hostdevs("batch")
    web.assert_sound("web", "batch")
    web.stop("batch")
    web.lab.wait(f"[ ! -e /sys/bus/pci/devices/{address}/driver ]")
    assert web.held_by("batch") == []
    web.assert_sound("web")


def test_a_victim_gives_its_nic_and_has_it_back(web: DeviceBed) -> None:
    """Batch has all four, as far as its ports go; web takes one of its."""
    web.define("batch", 10, RECLAIMABLE.format(2))
    web.define("batch2", 10, RECLAIMABLE.format(2))
    for guest in ("batch", "batch2"):
        web.boot(guest)
        web.await_told(guest, "net", count=2)
    assert len(web.hostdevs("batch") + web.hostdevs("batch2")) == 4
    grant = web.allocate("web", "net.vf")
    assert len(web.hostdevs("web")) == 1
    assert len(web.hostdevs("batch") + web.hostdevs("batch2")) == 3
    web.assert_sound("web", "batch", "batch2")
    web.release(grant)
    web.lab.wait(
        "[ $(for g in batch batch2; do virsh -q dumpxml $g; done | grep -c '<hostdev ') -eq 4 ]"
    )
    web.assert_sound("web", "batch", "batch2")
    web.stop("batch")
    web.stop("batch2")


def test_the_function_is_near_the_guests_memory(web: DeviceBed) -> None:
    web.define("far", 50, more=ON_NODE.format(1))
    web.boot("far")
    grant = web.allocate("far", "net.vf")
    (address,) = web.hostdevs("far")
    assert address in NEAR_1
    web.answers("far", "eth2")
    web.release(grant)
    web.stop("far")


def test_the_agent_is_killed_while_it_attaches(web: DeviceBed) -> None:
    web.lab.fault("agent-kill")
    web.await_agents_end()
    for phase in ("before-apply", "after-apply"):
        web.start_agent(f"kill:attach-function:{phase}")
        web.lab.run("virtfabric allocate web --device net.vf > /dev/null 2>&1", code=None)
        web.await_agents_end()
        web.start_agent()
        web.assert_sound("web")
        assert web.hostdevs("web") == web.held_by("web") == []
        assert web.quarantined() == {}
        web.lab.fault("agent-kill")
        web.await_agents_end()
    web.start_agent()


def test_a_guest_that_does_not_let_go(web: DeviceBed) -> None:
    """It is paused: the function is nobody else's, and comes home when the guest runs again."""
    grant = web.allocate("web", "net.vf")
    (address,) = web.hostdevs("web")
    web.lab.run("virsh -q suspend web")
    web.lab.run(f"virtfabric release {grant} 2>&1", code=None, timeout_s=400)
    assert web.hostdevs("web") == [address]
    function = web.functions()[address]
    assert function["holder"] == "web" or function["quarantine"]
    web.lab.run("virsh -q resume web")
    web.lab.wait("! virsh -q dumpxml web | grep -q '<hostdev '", timeout_s=120)


def test_qemu_is_killed(web: DeviceBed) -> None:
    web.allocate("web", "net.vf")
    (address,) = web.hostdevs("web")
    web.lab.run("kill -9 $(cat /run/libvirt/qemu/web.pid)")
    web.lab.wait(f"[ ! -e /sys/bus/pci/devices/{address}/driver ]", timeout_s=120)
    assert web.quarantined() == {}
    assert web.override(address) == "(null)"
    web.boot("web")
    web.assert_sound("web")


def test_nothing_leaks(web: DeviceBed) -> None:
    web.cycle("web", "net.vf", 2)
    before = web.trace()
    web.cycle("web", "net.vf", CYCLES)
    after = web.trace()
    assert after.drivers == before.drivers
    assert after.groups == before.groups
    assert after.agent_files <= before.agent_files
    assert after.libvirtd_files <= before.libvirtd_files
    assert after.journal_rows == before.journal_rows
    assert web.quarantined() == {}


def test_a_function_is_taken_out_of_its_slot(web: DeviceBed) -> None:
    web.allocate("web", "compute.edu")
    (address,) = web.hostdevs("web")
    assert address == "0000:02:00.0"
    web.lab.fault("removal", "edu0")
    web.lab.wait(f"[ ! -e /sys/bus/pci/devices/{address} ]", timeout_s=400)
    web.lab.wait("! virsh -q dumpxml web | grep -q '<hostdev '", timeout_s=120)
    assert web.held_by("web") == []
    web.assert_sound("web")


def test_a_fatal_error_of_the_port(web: DeviceBed) -> None:
    """QEMU pauses the guest; its end gives the function back, or it is in quarantine."""
    web.allocate("web", "net.vf")
    (address,) = web.hostdevs("web")
    web.lab.fault("aer-fatal", "rp0")
    web.lab.wait("dmesg | grep -qiE 'AER.*(fatal|uncorrect)'")
    web.lab.wait('[ "$(virsh -q domstate web)" = paused ]')
    web.stop("web")
    web.lab.wait('! virtfabric devices --json | grep -q \'"holder": *"web"\'', timeout_s=180)
    function = web.functions()[address]
    assert function["quarantine"] or function["driver"] is None, function
