"""Runs inside the host: the raw libvirt calls that one allocation comes to, until verified."""

from __future__ import annotations

import json
import sys
import threading
import time
import xml.etree.ElementTree as ET

import libvirt

MIB = 1 << 20


def _device(dom: libvirt.virDomain) -> ET.Element:
    root = ET.fromstring(dom.XMLDesc())
    found = root.find("devices/memory[@model='virtio-mem']")
    assert found is not None
    return found


def _request(dom: libvirt.virDomain, size: int) -> None:
    device = _device(dom)
    requested = device.find("target/requested")
    assert requested is not None
    requested.text, requested.attrib["unit"] = str(size // 1024), "KiB"
    dom.updateDeviceFlags(ET.tostring(device, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    tick = threading.Event()
    while int(_device(dom).findtext("target/current") or 0) * 1024 != size:
        tick.wait(0.01)


def _change(dom: libvirt.virDomain, memory: int, quota: int) -> None:
    _request(dom, memory)
    live = libvirt.VIR_DOMAIN_AFFECT_LIVE
    for vcpu in range(dom.vcpusFlags(live)):
        dom.pinVcpuFlags(vcpu, (True, True), live)
    dom.pinEmulator((True, True), live)
    dom.setSchedulerParametersFlags({"global_quota": quota}, live)


def main() -> None:
    """Print seconds for each round as JSON; the way back is not measured."""
    name, rounds = sys.argv[1], int(sys.argv[2])
    connection = libvirt.open("qemu:///system")
    dom = connection.lookupByName(name)
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        _change(dom, 64 * MIB, 150_000)
        took.append(time.perf_counter() - began)
        _change(dom, 0, 50_000)
    print(json.dumps(took))


if __name__ == "__main__":
    main()
