"""All CXL memory of a host, from sysfs. Reads only, and runs no program.

What a device tells of itself is not trusted: garbage becomes a problem of that device, in words,
and never an error of the whole inventory.

Source: Documentation/ABI/testing/sysfs-bus-cxl, sysfs-bus-dax; drivers/cxl/core/port.c.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.cxl.daxdevices import read_dax_devices
from virtfabric.adapters.pci.attributes import parse_address
from virtfabric.model.cxl import (
    CxlInventory,
    CxlPort,
    Memdev,
    PortKind,
    Region,
    Serial,
    Window,
    check_capacity,
)
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.adapters.pci.tree import SysTree
    from virtfabric.model.cxl import DaxDevice

DEVICES: Final = "bus/cxl/devices"
_MEMDEV: Final = re.compile(r"mem\d+")
_PORT: Final = re.compile(r"(?:root|port)\d+")
_ENDPOINT: Final = re.compile(r"endpoint\d+")
_DECODER: Final = re.compile(r"decoder(\d+)\.\d+")
_REGION: Final = re.compile(r"region\d+")
_NO_ADDRESS: Final = "0xffffffffffffffff"
_SHOWN: Final = 40
"""Characters of garbage that a problem quotes."""


class Device:
    """One directory of the CXL bus, of which anything may be missing or garbage."""

    def __init__(self, sys: SysTree, name: str, home: str) -> None:
        self._sys = sys
        self.name, self.home = name, home
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        """A file's text; empty where there is none."""
        return self._sys.text(f"{self.home}/{name}") or ""

    def link(self, name: str) -> str:
        """The last part of where a link leads; empty where there is none."""
        return posixpath.basename(self._sys.link(f"{self.home}/{name}") or "")

    def number(self, name: str, default: int = 0) -> int:
        """A number in any base; garbage is noted as a problem, and is `default`."""
        text = self.text(name)
        try:
            return int(text, 0) if text else default
        except ValueError:
            self.problems.append(f"its {name} is {text[:_SHOWN]!r}, which is no number")
            return default

    def names(self, pattern: re.Pattern[str]) -> list[str]:
        """What is in the directory."""
        return self._sys.names(self.home, pattern)


@dataclass(frozen=True, slots=True)
class _Endpoints:
    """How decoders of endpoints lead to memdevs.

    Attributes:
        memdevs: by name of the endpoint.
        ports: the port above each memdev.
    """

    memdevs: dict[str, str]
    ports: dict[str, str]

    def memdev_of(self, decoder: str) -> str | None:
        """The memdev that an endpoint's decoder (`decoder7.0`) is on."""
        match = _DECODER.fullmatch(decoder)
        return self.memdevs.get(f"endpoint{match[1]}") if match else None


def read_inventory(sys: SysTree) -> CxlInventory:
    """Everything below `bus/cxl` and `bus/dax`; empty on a host without CXL."""
    endpoints = _read_endpoints(sys)
    memdevs = _name_doubles([_read_memdev(device, endpoints) for device in _devices(sys, _MEMDEV)])
    ports = [_read_port(device) for device in _devices(sys, _PORT)]
    bridges = {port.device: port.name for port in ports}
    windows, regions = _read_windows(sys, bridges), _read_regions(sys, endpoints, memdevs)
    return CxlInventory(
        memdevs=tuple(memdevs),
        ports=tuple(sorted(ports, key=lambda port: port.kind is not PortKind.ROOT)),
        windows=tuple(window for window, _ in windows),
        regions=tuple(regions),
        problems=(
            *(f"memdev {m.label} ({m.name}): {text}" for m in memdevs for text in m.problems),
            *(f"window {window.name}: {text}" for window, found in windows for text in found),
            *(f"region {region.name}: {text}" for region in regions for text in region.problems),
        ),
    )


def _devices(sys: SysTree, pattern: re.Pattern[str]) -> Iterable[Device]:
    for name in sorted(sys.names(DEVICES, pattern), key=_by_number):
        home = sys.link(f"{DEVICES}/{name}")
        if home is not None:
            yield Device(sys, name, home)


def _by_number(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def _read_endpoints(sys: SysTree) -> _Endpoints:
    memdevs, ports = {}, {}
    for endpoint in _devices(sys, _ENDPOINT):
        memdev = endpoint.link("uport")
        memdevs[endpoint.name] = memdev
        ports[memdev] = posixpath.basename(posixpath.dirname(endpoint.home))
    return _Endpoints(memdevs, ports)


def _read_memdev(device: Device, endpoints: _Endpoints) -> Memdev:
    serial, node = _read_serial(device), device.number("numa_node", -1)
    amounts = {name: device.number(f"{name}/size") for name in ("ram", "pmem")}
    wrong = [check_capacity(*item) for item in amounts.items()]
    device.problems += filter(None, wrong)
    if not any(amounts.values()):
        device.problems.append("it has no capacity")
    # What cannot be is not counted either.
    ram, pmem = (0 if text else n for n, text in zip(amounts.values(), wrong, strict=True))
    return Memdev(
        name=device.name,
        serial=serial,
        ram=Bytes(ram),
        pmem=Bytes(pmem),
        node=node if node >= 0 else None,
        address=parse_address(posixpath.basename(posixpath.dirname(device.home))),
        port=endpoints.ports.get(device.name, ""),
        firmware=device.text("firmware_version")[:_SHOWN],
        problems=tuple(device.problems),
    )


def _read_serial(device: Device) -> Serial | None:
    text = device.text("serial")
    try:
        return Serial.parse(text)
    except InvalidValueError:
        device.problems.append(f"its serial number is {text[:_SHOWN]!r}: it cannot be told apart")
        return None


def _name_doubles(memdevs: list[Memdev]) -> list[Memdev]:
    """Those that share a serial are nobody in particular: none of them is used."""
    count = Counter(m.serial for m in memdevs if m.serial is not None)
    return [
        replace(m, problems=(*m.problems, f"its serial number is that of {others} as well"))
        if m.serial is not None
        and count[m.serial] > 1
        and (others := ", ".join(o.name for o in memdevs if o.serial == m.serial and o is not m))
        else m
        for m in memdevs
    ]


def _read_port(device: Device) -> CxlPort:
    parent = posixpath.basename(posixpath.dirname(device.home))
    is_root = device.name.startswith("root")
    kind = PortKind.BRIDGE if parent.startswith("root") else PortKind.SWITCH
    return CxlPort(
        name=device.name,
        kind=PortKind.ROOT if is_root else kind,
        parent="" if is_root else parent,
        device=device.link("uport"),
        decoders=len(device.names(_DECODER)),
    )


def _read_windows(sys: SysTree, bridges: dict[str, str]) -> list[tuple[Window, list[str]]]:
    """With what is wrong with each."""
    found = []
    for device in _devices(sys, _DECODER):
        if device.text("devtype") != "cxl_decoder_root":
            continue
        root = Device(sys, "", posixpath.dirname(device.home))
        dports = (root.link(f"dport{number}") for number in device.text("target_list").split(","))
        size, ways = device.number("size"), device.number("interleave_ways", 1)
        window = Window(
            name=device.name,
            base=device.number("start"),
            size=Bytes(size),
            ram=device.text("cap_ram") == "1",
            pmem=device.text("cap_pmem") == "1",
            ways=ways,
            granularity=device.number("interleave_granularity") if ways > 1 else 0,
            targets=tuple(bridges.get(dport, dport) for dport in dports if dport),
        )
        if wrong := check_capacity("address", size):
            device.problems.append(wrong)
            window = replace(window, size=Bytes(0))
        found.append((window, device.problems))
    return found


def _read_regions(sys: SysTree, endpoints: _Endpoints, memdevs: list[Memdev]) -> list[Region]:
    serials = {m.name: m.serial if m.usable else None for m in memdevs}
    daxes = read_dax_devices(sys)
    return [
        _read_region(
            device, endpoints, serials,
            [dax for home, dax in daxes.items() if home.startswith(f"{device.home}/")],
        )
        for device in _devices(sys, _REGION)
    ]  # fmt: skip


def _read_region(
    device: Device, endpoints: _Endpoints, serials: dict[str, Serial | None], dax: list[DaxDevice]
) -> Region:
    ways = device.number("interleave_ways", 1)
    base = device.text("resource")
    return Region(
        name=device.name,
        window=posixpath.basename(posixpath.dirname(device.home)),
        # The kernel shows all bits set until an address is assigned.
        base=0 if base == _NO_ADDRESS else device.number("resource"),
        size=Bytes(device.number("size")),
        ways=ways,
        granularity=device.number("interleave_granularity") if ways > 1 else 0,
        mode=device.text("mode"),
        members=_read_members(device, endpoints, serials),
        committed=device.text("commit") == "1",
        dax=tuple(dax),
        problems=tuple(device.problems),
    )


def _read_members(
    device: Device, endpoints: _Endpoints, serials: dict[str, Serial | None]
) -> tuple[Serial | None, ...]:
    """By position; None for a memdev that is not there, or is not to be trusted."""
    members = []
    for name in sorted(device.names(re.compile(r"target\d+")), key=_by_number):
        decoder = device.text(name)
        memdev = endpoints.memdev_of(decoder) if decoder else None
        serial = serials.get(memdev) if memdev else None
        if serial is None:
            device.problems.append(
                f"its position {name.removeprefix('target')} has no known memdev"
            )
        members.append(serial)
    return tuple(members)
