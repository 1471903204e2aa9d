"""Whose a pin is, when a guest sleeps and wakes: the agent's go where it is away, others stay."""

from __future__ import annotations

import os
import signal
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest
from lab_host import Guest, LabHost

if TYPE_CHECKING:
    from collections.abc import Iterator

EVERYWHERE = os.sched_getaffinity(0)
MARK = "urn:virtfabric:placement:1"
# It takes one of the two pCPUs, so that the pool is the other and the agent has to pin to it.
ALONE = Guest(
    name="alone", priority=90, cpu="1:1", placement="dedicated", max_vcpus=1, virtio_mem=None
)
SHOP = Guest(name="shop", cpu="300m:900m", vcpus=3, max_vcpus=3, virtio_mem=None)


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vfmark{os.getpid()}", tmp_path_factory.mktemp("mark") / "lab") as lab:
        lab.start_agent()
        lab.start_guests(ALONE)
        lab.settle()
        lab.define(SHOP)
        # the operator's hand: vCPU 0 where the pool is, vCPU 2 explicitly on both
        lab.virsh("vcpupin", "shop", "0", find_pool(lab), "--config")
        lab.virsh("vcpupin", "shop", "2", "0-1", "--config")
        assert lab.start_guest("shop").returncode == 0
        lab.wait_ready("shop")
        lab.settle()
        wait_placed(lab)
        yield lab


def find_pool(lab: LabHost) -> str:
    """The pCPU that the dedicated guest leaves."""
    (taken,) = read_pins(lab, "alone").values()
    return {"0": "1", "1": "0"}[taken]


def read_domain(lab: LabHost, name: str, *options: str) -> ET.Element:
    return ET.fromstring(lab.virsh("dumpxml", name, *options).stdout)


def read_pins(lab: LabHost, name: str, *options: str) -> dict[str, str]:
    pins = read_domain(lab, name, *options).findall("cputune/vcpupin")
    return {pin.attrib["vcpu"]: pin.attrib["cpuset"] for pin in pins}


def read_emulator(lab: LabHost) -> str | None:
    pin = read_domain(lab, "shop").find("cputune/emulatorpin")
    return None if pin is None else pin.attrib["cpuset"]


def read_mark(domain: ET.Element) -> list[dict[str, str]]:
    return [dict(pin.attrib) for pin in domain.findall(f"metadata/{{{MARK}}}pins/*")]


def read_affinity(lab: LabHost) -> dict[int, set[int]]:
    """What the kernel lets each vCPU's thread run on."""
    return {vcpu: set(cpus) for vcpu, cpus in lab.observe("shop").affinity.items()}


def sleep(lab: LabHost) -> None:
    lab.virsh("save", "shop", "/run/shop.save")
    lab.console("shop").write_text("")


def wake(lab: LabHost) -> None:
    lab.virsh("restore", "/run/shop.save")
    lab.wait_ready("shop")


def expected_mark(pool: str) -> list[dict[str, str]]:
    return [
        {"vcpu": "1", "cpuset": pool},
        {"vcpu": "2", "cpuset": pool, "instead": "0-1"},
        {"cpuset": "0"},
    ]


def wait_placed(lab: LabHost) -> None:
    pool = find_pool(lab)
    lab.wait(lambda: read_pins(lab, "shop") == dict.fromkeys("012", pool), "it is pinned")
    lab.wait(lambda: read_mark(read_domain(lab, "shop")) == expected_mark(pool), "it is marked")


def test_the_mark_tells_the_agents_pins_from_the_operators(host: LabHost) -> None:
    pool = find_pool(host)
    config = read_domain(host, "shop", "--inactive")
    assert not read_mark(config), "the definition is the operator's alone"
    assert read_pins(host, "shop", "--inactive") == {"0": pool, "2": "0-1"}


def test_restored_without_the_agent_only_the_operators_pins_are_left(host: LabHost) -> None:
    pool = find_pool(host)
    sleep(host)
    image = ET.fromstring(host.virsh("save-image-dumpxml", "/run/shop.save").stdout)
    assert read_mark(image) == expected_mark(pool), "the mark travels"
    host.wait(lambda: not any(g["name"] == "shop" and g["cpu"]["grant"]
                              for g in host.cli_json("guests")), "it holds nothing")  # fmt: skip
    assert host.kill_agent(signal.SIGTERM) == 0
    try:
        wake(host)
        assert read_pins(host, "shop") == {"0": pool, "2": "0-1"}
        assert read_emulator(host) is None
        assert read_affinity(host) == {0: {int(pool)}, 1: EVERYWHERE, 2: {0, 1}}
    finally:
        host.start_agent()
        host.settle()
    wait_placed(host)


def test_restored_beside_the_agent_a_live_pin_of_the_operators_stays(host: LabHost) -> None:
    pool = find_pool(host)
    taken = {"0": "1", "1": "0"}[pool]
    host.virsh("vcpupin", "shop", "1", taken, "--live")  # drift, which is reported only
    assert read_mark(read_domain(host, "shop")) == expected_mark(pool)
    sleep(host)
    image = ET.fromstring(host.virsh("save-image-dumpxml", "/run/shop.save").stdout)
    host.box.path("/run/shop.xml").write_text(ET.tostring(image, encoding="unicode"))
    hook = "/etc/libvirt/hooks/qemu.d/50-virtfabric shop restore begin - < /run/shop.xml"
    filtered = ET.fromstring(host.box.run(["sh", "-c", hook]).stdout)
    pins = {p.attrib["vcpu"]: p.attrib["cpuset"] for p in filtered.findall("cputune/vcpupin")}
    assert pins == {"0": pool, "1": taken, "2": pool}
    wake(host)
    host.settle()
    host.wait(lambda: read_pins(host, "shop") == dict.fromkeys("012", pool), "placed for its start")


def test_an_unmanaged_guest_has_no_mark(host: LabHost) -> None:
    pool = find_pool(host)
    assert host.cli("policy", "clear", "shop").returncode == 0
    host.wait(lambda: not read_mark(read_domain(host, "shop")), "it is removed")
    assert read_pins(host, "shop")["0"] == pool
    assert read_affinity(host) == {0: {int(pool)}, 1: EVERYWHERE, 2: {0, 1}}
