"""Whether a topology's CXL makes sense: places, sizes, serial numbers, windows.

Capacities are in 256 MiB (CXL_CAPACITY_MULTIPLIER of QEMU's cxl_type3.c), windows in 256 MiB for
each way of interleave (the CFMWS structure of the CXL specification).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import KIB, MIB, Bytes
from virtfabric.shim.topology.portchecks import find_twice
from virtfabric.shim.topology.seats import CXL_PORTS_PER_BUS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from virtfabric.shim.topology.model import Cxl, Topology, Type3, Window

CAPACITY_UNIT: Final = Bytes(256 * MIB)
INTERLEAVE_WAYS: Final = frozenset({1, 2, 3, 4, 6, 8, 12, 16})
LABEL_UNIT: Final = Bytes(4 * KIB)
MIN_LABEL_AREA: Final = Bytes(128 * KIB)
"""MIN_NAMESPACE_LABEL_SIZE of QEMU's nvdimm.h, from UEFI 2.7."""
NO_SERIAL: Final = (1 << 64) - 1
"""QEMU's word for "no serial number"."""


def check_cxl(topology: Topology) -> Iterator[InvalidValueError]:
    """All that concerns CXL; nothing for a host without."""
    cxl = topology.cxl
    if cxl is None:
        return
    if not topology.nodes:
        problem = "needs at least one NUMA node: without NUMA the kernel gives CXL memory no node"
        yield InvalidValueError("cxl", f"{len(cxl.bridges)} bridges", problem, advice="give nodes")
    yield from _check_places(cxl)
    for number, device in enumerate(cxl.devices):
        yield from _check_device(f"cxl.devices[{number}]", device)
    serials = ((f"cxl.devices[{n}].serial", device.serial) for n, device in enumerate(cxl.devices))
    yield from find_twice(serials, lambda value: f"{value:#x}")
    capacity = _capacity_by_bridge(cxl)
    for number, window in enumerate(cxl.windows):
        yield from _check_window(f"cxl.windows[{number}]", window, capacity)


def _check_places(cxl: Cxl) -> Iterator[InvalidValueError]:
    bridges = {bridge.id: 0 for bridge in cxl.bridges}
    for number, port in enumerate(cxl.ports):
        if port.bridge not in bridges:
            path = f"cxl.ports[{number}].bridge"
            yield InvalidValueError(path, port.bridge, "is no CXL host bridge")
            continue
        bridges[port.bridge] += 1
        if bridges[port.bridge] == CXL_PORTS_PER_BUS + 1:
            problem = f"is root port {CXL_PORTS_PER_BUS + 1} of {port.bridge!r}: too many"
            yield InvalidValueError(f"cxl.ports[{number}].id", port.id, problem)
    root_ports = {port.id for port in cxl.ports}
    downstream = {port for switch in cxl.switches for port in switch.downstream}
    wanted = [
        (f"cxl.switches[{n}].port", one.id, one.port, root_ports, "CXL root port")
        for n, one in enumerate(cxl.switches)
    ] + [
        (f"cxl.devices[{n}].port", one.id, one.port, root_ports | downstream, "CXL port")
        for n, one in enumerate(cxl.devices)
    ]
    taken: dict[str, str] = {}
    for path, owner, place, allowed, what in wanted:
        if place not in allowed:
            yield InvalidValueError(path, place, f"is no {what}")
        elif place in taken:
            yield InvalidValueError(path, place, f"is taken by {taken[place]!r}")
        taken.setdefault(place, owner)


def _check_device(path: str, device: Type3) -> Iterator[InvalidValueError]:
    if not device.capacity:
        yield InvalidValueError(path, device.id, "has neither volatile nor persistent memory")
    for name, size in (("volatile", device.volatile), ("persistent", device.persistent)):
        if size and size % CAPACITY_UNIT:
            yield InvalidValueError(
                f"{path}.{name}", str(size), f"is not a multiple of {CAPACITY_UNIT}"
            )
    if device.serial == NO_SERIAL:
        yield InvalidValueError(f"{path}.serial", f"{device.serial:#x}", 'means "no serial number"')
    labels = device.label_area
    if (labels is None) != (device.persistent is None):
        problem = "is missing" if labels is None else "needs persistent memory to label"
        yield InvalidValueError(f"{path}.label_area", labels and str(labels), problem)
    elif labels and (labels % LABEL_UNIT or labels < MIN_LABEL_AREA):
        problem = f"is not a multiple of {LABEL_UNIT}, {MIN_LABEL_AREA} at least"
        yield InvalidValueError(f"{path}.label_area", str(labels), problem)


def _capacity_by_bridge(cxl: Cxl) -> Mapping[str, int]:
    bridge_of = {port.id: port.bridge for port in cxl.ports}
    for switch in cxl.switches:
        bridge_of |= dict.fromkeys(switch.downstream, bridge_of.get(switch.port, ""))
    capacity = {bridge.id: 0 for bridge in cxl.bridges}
    for device in cxl.devices:
        bridge = bridge_of.get(device.port, "")
        capacity[bridge] = capacity.get(bridge, 0) + device.capacity
    return capacity


def _check_window(
    path: str, window: Window, capacity: Mapping[str, int]
) -> Iterator[InvalidValueError]:
    ways = len(window.targets)
    if not ways:
        yield InvalidValueError(f"{path}.targets", [], "has no host bridge to lead to")
        return
    for number, target in enumerate(window.targets):
        if target not in capacity:
            yield InvalidValueError(f"{path}.targets[{number}]", target, "is no CXL host bridge")
        elif target in window.targets[:number]:
            yield InvalidValueError(f"{path}.targets[{number}]", target, "is there twice")
    if ways not in INTERLEAVE_WAYS:
        yield InvalidValueError(
            f"{path}.targets", ways, f"ways are none of {sorted(INTERLEAVE_WAYS)}"
        )
    if window.size % (CAPACITY_UNIT * ways):
        unit = Bytes(CAPACITY_UNIT * ways)
        problem = f"is not a multiple of {unit} (256MiB for each target)"
        yield InvalidValueError(f"{path}.size", str(window.size), problem)
    behind = Bytes(sum(capacity.get(target, 0) for target in window.targets))
    if window.size < behind:
        problem = f"is less than the {behind} of the devices behind its targets"
        yield InvalidValueError(f"{path}.size", str(window.size), problem)
