"""The CXL lab: the topology's devices, a region that comes and goes, and CXL's faults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from running_lab import RunningLab

SERIALS = {"0x100", "0x101", "0x102", "0x103", "0x200"}


def memdev(lab: RunningLab, serial: str) -> str:
    """The kernel's name of a device; it changes from boot to boot."""
    return str(lab.json(f"cxl list -M -s {serial}")[0]["memdev"])


def test_every_device_of_the_topology_is_there(cxl: RunningLab) -> None:
    devices: list[dict[str, Any]] = cxl.json("cxl list -M")
    assert {hex(device["serial"]) for device in devices} == SERIALS
    windows = cxl.json("cxl list -D -d root")
    assert sorted(window["nr_targets"] for window in windows) == [1, 1, 2]
    tree = cxl.run("cxl list -M -P -D -u")
    assert "memdevs:port" in tree


def test_a_region_becomes_a_node_and_goes_again(cxl: RunningLab) -> None:
    name = memdev(cxl, "0x100")
    assert cxl.run("cat /sys/devices/system/node/online") == "0"
    cxl.run(f"cxl create-region -m -t ram -d decoder0.0 -w 1 {name}")
    cxl.wait("[ $(cat /sys/devices/system/node/online) = 0-1 ]")
    (device,) = cxl.json("daxctl list")
    assert (device["mode"], device["movable"]) == ("system-ram", True)
    cxl.run(f"daxctl offline-memory {device['chardev']}")
    cxl.run("cxl destroy-region -f all")
    cxl.wait("[ $(cat /sys/devices/system/node/online) = 0 ]")


def test_poison_shows_in_the_media_errors_and_is_traced(cxl: RunningLab) -> None:
    traces = "/sys/kernel/tracing"
    cxl.run(f"mountpoint -q {traces} || mount -t tracefs none {traces}")
    cxl.run(f"echo 1 > {traces}/events/cxl/cxl_poison/enable")
    said = cxl.fault("cxl-poison")
    name = memdev(cxl, "0x100")
    (device,) = cxl.json(f"cxl list -M --media-errors -m {name}")
    assert device["media_errors"] == [{"offset": 0, "length": 64, "source": "Internal"}], said
    assert f"cxl_poison: memdev={name} " in cxl.run(f"cat {traces}/trace")


def test_a_device_is_taken_out(cxl: RunningLab) -> None:
    name = memdev(cxl, "0x101")
    cxl.fault("removal", "mem1")
    cxl.wait(f"[ ! -e /sys/bus/cxl/devices/{name} ]")
    assert {hex(device["serial"]) for device in cxl.json("cxl list -M")} == SERIALS - {"0x101"}
