"""A libvirt domain as text -> `GuestState`, for everything that the XML can say.

Pure. What only the kernel or a live call knows (process, threads, jobs, pause) is added by the
reader in `adapters/libvirt`.

Source: https://libvirt.org/formatdomain.html (libvirt 9.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.domxml.hostdev import read_hostdevs
from virtfabric.domxml.mark import read_mark
from virtfabric.domxml.memory import read_fixed_memory, read_memory_room, read_virtio_mem
from virtfabric.domxml.parse import parse_xml
from virtfabric.domxml.pciports import count_free_ports
from virtfabric.domxml.policy import POLICY_TAG, bare_policy, parse_policy
from virtfabric.domxml.values import read_cpus, read_int, read_size
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.guest import (
    GuestState,
    MemoryMechanism,
    NumaMode,
    RunState,
    SchedulerState,
)
from virtfabric.model.ids import GuestId
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from lxml import etree

    from virtfabric.model.guest import VirtioMem
    from virtfabric.model.policy import GuestPolicy

_UNLIMITED_US: Final = 86_400_000_000
# Memory that QEMU has to pin for a device cannot be ballooned away (QEMU: ram_block_discard).
_PINNING: Final = (
    "devices/hostdev[@type='pci']", "devices/hostdev[@type='mdev']",
    "devices/interface[@type='hostdev']", "memoryBacking/locked",
)  # fmt: skip


def parse_domain(live_xml: str, config_xml: str | None) -> GuestState:
    """Read a guest from libvirt's XML; also from what a hook gets on stdin.

    Args:
        live_xml: the live definition, or the persistent one of a guest that is not running.
        config_xml: the persistent definition; None for a transient guest or where it is unknown.

    Returns:
        Its state; `vcpu_affinity` has an entry for every online vCPU, empty where it is not
        pinned. `scheduler.shares` is the raw `<shares>`. An invalid policy is `policy_error`.

    Raises:
        InvalidValueError: not a domain, or a field of it makes no sense; names the field.
    """
    root = _parse_root(live_xml)
    config = None if config_xml is None else _parse_root(config_xml)
    online, maximum = _read_vcpus(root)
    devices = read_virtio_mem(root)
    mechanism = _choose_mechanism(root, devices)
    boot = _read_boot_memory(root, devices)
    policy, error = _read_policy(root)
    config_numa = config.find("numatune/memory") if config is not None else None
    mode, nodes = _read_numatune(root)
    return GuestState(
        uuid=GuestId.parse(root.findtext("uuid") or "", field="domain.uuid"),
        name=root.findtext("name") or "",
        state=RunState.SHUTOFF if root.get("id") is None else RunState.RUNNING,
        vcpus_max=maximum,
        vcpus_online=len(online),
        vcpu_unplug=root.get("type") == "kvm",
        vcpu_affinity=_read_affinity(root, online),
        emulator_affinity=_read_emulator(root),
        scheduler=_read_scheduler(root),
        boot_memory=boot,
        memory_current=_read_current(root, mechanism, boot, devices),
        memory_max=Bytes(boot + sum(device.size for device in devices)),
        mechanism=mechanism,
        virtio_mem=devices,
        config_pins={} if config is None else _read_pins(config),
        numa_mode=mode,
        numa_nodes=nodes,
        config_numa_nodes=read_cpus(config_numa, "nodeset", "numatune.memory.nodeset"),
        persistent=config_xml is not None,
        policy=policy,
        policy_error=error,
        marked_pins=read_mark(root),
        policy_text=_read_policy_text(root),
        config_policy_text="" if config is None else _read_policy_text(config),
        devices=read_hostdevs(root),
        config_devices=() if config is None else read_hostdevs(config),
        free_ports=count_free_ports(root),
        locked_memory=root.find("memoryBacking/locked") is not None,
        fixed_memory=read_fixed_memory(root, boot),
        memory_room=read_memory_room(root),
    )


def _parse_root(text: str) -> etree._Element:
    root = parse_xml(text, what="domain XML")
    if root.tag != "domain":
        raise InvalidValueError("domain XML", f"<{root.tag!s}>", "is not a domain")
    return root


# -- vCPUs ------------------------------------------------------------------------------------


def _read_vcpus(root: etree._Element) -> tuple[list[int], int]:
    """Numbers of the online vCPUs, and how many there can be."""
    element = root.find("vcpu")
    maximum = 1 if element is None else read_int(element.text, "domain.vcpu")
    current = None if element is None else element.get("current")
    named = root.findall("vcpus/vcpu")
    if named:  # there once vCPUs were plugged one by one: the online ones need not come first
        online = [read_int(v.get("id"), "vcpus.id") for v in named if v.get("enabled") == "yes"]
        return sorted(online), maximum
    count = maximum if current is None else read_int(current, "domain.vcpu.current")
    return list(range(min(count, maximum))), maximum


def _read_pins(root: etree._Element) -> dict[int, CpuSet]:
    return {
        read_int(pin.get("vcpu"), "vcpupin.vcpu"): read_cpus(pin, "cpuset", "vcpupin.cpuset")
        for pin in root.findall("cputune/vcpupin")
    }


def _read_affinity(root: etree._Element, online: list[int]) -> dict[int, CpuSet]:
    pins = _read_pins(root)
    default = read_cpus(root.find("vcpu"), "cpuset", "vcpu.cpuset")
    return {number: pins.get(number, default) for number in online}


def _read_emulator(root: etree._Element) -> CpuSet:
    pin = root.find("cputune/emulatorpin")
    if pin is None:
        return read_cpus(root.find("vcpu"), "cpuset", "vcpu.cpuset")
    return read_cpus(pin, "cpuset", "emulatorpin.cpuset")


def _read_scheduler(root: etree._Element) -> SchedulerState:
    def value(name: str) -> int | None:
        text = root.findtext(f"cputune/{name}")
        return None if text is None else read_int(text, f"cputune.{name}")

    quota = value("global_quota")
    return SchedulerState(
        shares=value("shares"),
        global_period=value("global_period") or 100_000,
        # 0 is "no value" and larger ones than a day are how some libvirt print "unlimited".
        global_quota=quota if quota and 0 < quota < _UNLIMITED_US else -1,
    )


# -- memory -----------------------------------------------------------------------------------


def _read_boot_memory(root: etree._Element, devices: tuple[VirtioMem, ...]) -> Bytes:
    """What is there without virtio-mem.

    `<memory>` is no measure alone: in what libvirt prints it includes every memory device, in what
    people write it need not. The guest's NUMA cells (which virtio-mem requires) never do.
    """
    cells = root.findall("cpu/numa/cell")
    if cells:
        dimms = root.findall("devices/memory[@model='dimm']/target/size")
        boot = sum(read_size(cell, "cpu.numa.cell.memory", attribute="memory") for cell in cells)
        return Bytes(boot + sum(read_size(dimm, "memory.target.size") for dimm in dimms))
    total = read_size(root.find("memory"), "domain.memory")
    nvdimms = root.findall("devices/memory[@model='nvdimm']/target/size")
    files = sum(read_size(nvdimm, "memory.target.size") for nvdimm in nvdimms)
    return Bytes(max(0, total - files - sum(device.size for device in devices)))


def _choose_mechanism(root: etree._Element, devices: tuple[VirtioMem, ...]) -> MemoryMechanism:
    if devices:
        return MemoryMechanism.VIRTIO_MEM
    balloon = root.find("devices/memballoon")
    # libvirt always writes the element out; without it nothing is promised.
    if balloon is None or balloon.get("model") == "none":
        return MemoryMechanism.FIXED
    if any(root.find(path) is not None for path in _PINNING):
        return MemoryMechanism.FIXED
    return MemoryMechanism.BALLOON


def _read_current(
    root: etree._Element, mechanism: MemoryMechanism, boot: Bytes, devices: tuple[VirtioMem, ...]
) -> Bytes:
    if mechanism is not MemoryMechanism.BALLOON:
        return Bytes(boot + sum(device.current for device in devices))
    current = root.find("currentMemory")
    return boot if current is None else min(boot, read_size(current, "domain.currentMemory"))


def _read_numatune(root: etree._Element) -> tuple[NumaMode | None, CpuSet]:
    element = root.find("numatune/memory")
    if element is None:
        return None, CpuSet()
    mode = element.get("mode", "strict")
    try:
        return NumaMode(mode), read_cpus(element, "nodeset", "numatune.memory.nodeset")
    except ValueError:
        raise InvalidValueError("numatune.memory.mode", mode, "is not known") from None


# -- metadata ---------------------------------------------------------------------------------


def _read_policy(root: etree._Element) -> tuple[GuestPolicy | None, str]:
    found = root.findall(f"metadata/{POLICY_TAG}")
    if not found:
        return None, ""
    if len(found) > 1:
        return None, f"policy: {len(found)} elements where one is allowed"
    try:
        return parse_policy(found[0]), ""
    except InvalidValueError as error:
        return None, str(error)


def _read_policy_text(root: etree._Element) -> str:
    found = root.find(f"metadata/{POLICY_TAG}")
    return "" if found is None else bare_policy(found)
