"""Guests as tables, as far as an arbiter of CPU and memory looks at them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.capability import parse_capability
from virtfabric.model.device import GuestDevice, PciAddress
from virtfabric.model.guest import (
    FixedMemory,
    GuestState,
    MemoryMechanism,
    MemoryRoom,
    NumaMode,
    RunState,
    VirtioMem,
)
from virtfabric.model.policy import (
    CpuPolicy,
    DevicePolicy,
    Growth,
    GuestPolicy,
    MemoryPolicy,
    Placement,
)
from virtfabric.model.units import Bytes, MilliCpu
from virtfabric.protocol.adapterforms import MAX_NAME
from virtfabric.protocol.fields import MAX_TEXT
from virtfabric.protocol.valueforms import (
    MAX_SET,
    form_of_page,
    read_bytes,
    read_guest_id,
    read_page,
    read_set,
)

if TYPE_CHECKING:
    from virtfabric.protocol.fields import Fields

MAX_CPUS: Final = 1 << 20
"""vCPUs of a guest; far beyond what any can have, as it is only to bound arithmetic."""
ANYWHERE: Final = "any"
"""In place of the pCPUs of a vCPU that has no pin."""
_MAX_SHARES: Final = 1 << 32


def form_of_guest(guest: GuestState) -> dict[str, Any]:
    """A guest; what has its usual value is left out, as most of it has in most guests."""
    form: dict[str, Any] = {
        "uuid": guest.uuid, "name": guest.name[:MAX_NAME], "state": guest.state,
        "vcpus_max": guest.vcpus_max, "vcpus_online": guest.vcpus_online,
        "boot_memory": int(guest.boot_memory), "memory_current": int(guest.memory_current),
        "memory_max": int(guest.memory_max), "mechanism": guest.mechanism,
        "free_ports": guest.free_ports, "room": _form_of_room(guest.memory_room),
    }  # fmt: skip
    more: dict[str, Any] = {
        "affinity": [str(cpus) or ANYWHERE for _, cpus in sorted(guest.vcpu_affinity.items())],
        "virtio_mem": [_form_of_device(device) for device in guest.virtio_mem],
        "fixed_memory": [
            {
                "what": part.what, "size": int(part.size), "nodes": str(part.host_nodes),
                "page": form_of_page(part.page),
            }
            for part in guest.fixed_memory
        ],
        "numa_mode": guest.numa_mode, "numa_nodes": str(guest.numa_nodes),
        "config_numa_nodes": str(guest.config_numa_nodes), "job": guest.job,
        "policy_error": guest.policy_error[:MAX_TEXT],
        "functions": [device.address for device in guest.devices],
    }  # fmt: skip
    form |= {name: value for name, value in more.items() if value}
    return form if guest.policy is None else form | {"policy": _form_of_policy(guest.policy)}


def _form_of_room(room: MemoryRoom) -> dict[str, Any]:
    form = {"slots": room.slots, "size": int(room.size), "page": form_of_page(room.page)}
    return form if room.cell is None else form | {"cell": room.cell}


def _form_of_device(device: VirtioMem) -> dict[str, Any]:
    return {
        "alias": device.alias, "cell": device.node, "size": int(device.size),
        "block": int(device.block), "requested": int(device.requested),
        "current": int(device.current), "nodes": str(device.host_nodes),
        "page": form_of_page(device.page),
    }  # fmt: skip


def _form_of_policy(policy: GuestPolicy) -> dict[str, Any]:
    cpu, memory = policy.cpu, policy.memory
    return {
        "priority": policy.priority,
        "cpu": {
            "reservation": int(cpu.reservation), "shares": cpu.shares, "placement": cpu.placement,
        } | ({} if cpu.limit is None else {"limit": int(cpu.limit)}),
        "memory": {
            "reservation": int(memory.reservation), "shares": memory.shares,
            "tiers": list(memory.tiers), "growth": memory.growth,
        } | ({} if memory.limit is None else {"limit": int(memory.limit)}),
        "devices": [
            {"capability": d.capability, "count": d.count, "reclaimable": d.reclaimable}
            for d in policy.devices
        ],
    }  # fmt: skip


def read_guest(fields: Fields) -> GuestState:
    """The reverse of `form_of_guest`.

    Raises:
        InvalidValueError: names the field.
    """
    mode = fields.text("numa_mode", "", empty=True)
    if mode and mode not in set(NumaMode):
        raise fields.fail("numa_mode", f"is not one of {', '.join(NumaMode)}")
    affinity = fields.texts("affinity", (), most=MAX_SET)
    guest = GuestState(
        uuid=read_guest_id(fields, "uuid"), name=fields.text("name", most=MAX_NAME),
        state=fields.choice("state", RunState),
        vcpus_max=fields.number("vcpus_max", most=MAX_CPUS),
        vcpus_online=fields.number("vcpus_online", most=MAX_CPUS),
        vcpu_affinity={
            n: fields.listed("affinity", text.removeprefix(ANYWHERE))
            for n, text in enumerate(affinity)
        },
        boot_memory=read_bytes(fields, "boot_memory"),
        memory_current=read_bytes(fields, "memory_current"),
        memory_max=read_bytes(fields, "memory_max"),
        mechanism=fields.choice("mechanism", MemoryMechanism),
        virtio_mem=tuple(_read_device(entry) for entry in fields.tables("virtio_mem", ())),
        numa_mode=NumaMode(mode) if mode else None, numa_nodes=read_set(fields, "numa_nodes"),
        config_numa_nodes=read_set(fields, "config_numa_nodes"),
        job=fields.text("job", "", most=MAX_NAME, empty=True) or None,
        policy=_read_policy(fields.table("policy")) if fields.has("policy") else None,
        policy_error=fields.text("policy_error", "", empty=True),
        devices=tuple(GuestDevice(one) for one in _read_addresses(fields, "functions")),
        free_ports=fields.number("free_ports", 0, most=0xFFFF),
        fixed_memory=tuple(_read_fixed(entry) for entry in fields.tables("fixed_memory", ())),
        memory_room=_read_room(fields.table("room", {})),
    )  # fmt: skip
    fields.finish()
    return guest


def _read_addresses(fields: Fields, name: str) -> list[PciAddress]:
    return [
        PciAddress.parse(text, field=fields.path(name)) for text in fields.texts(name, ())
    ]  # fmt: skip


def _read_device(fields: Fields) -> VirtioMem:
    device = VirtioMem(
        fields.text("alias", most=MAX_NAME), fields.number("cell", 0, most=0xFFFF),
        read_bytes(fields, "size"), Bytes(fields.number("block", least=1)),
        read_bytes(fields, "requested"), read_bytes(fields, "current"), read_set(fields, "nodes"),
        read_page(fields, "page"),
    )  # fmt: skip
    fields.finish()
    return device


def _read_fixed(fields: Fields) -> FixedMemory:
    part = FixedMemory(
        fields.text("what", most=MAX_NAME), read_bytes(fields, "size"), read_set(fields, "nodes"),
        read_page(fields, "page"),
    )  # fmt: skip
    fields.finish()
    return part


def _read_room(fields: Fields) -> MemoryRoom:
    room = MemoryRoom(
        fields.number("slots", 0, most=0xFFFF), Bytes(fields.number("size", 0)),
        fields.number("cell", most=0xFFFF) if fields.has("cell") else None,
        read_page(fields, "page"),
    )  # fmt: skip
    fields.finish()
    return room


def _read_policy(fields: Fields) -> GuestPolicy:
    policy = GuestPolicy(
        fields.number("priority", most=100), cpu=_read_cpu(fields.table("cpu")),
        memory=_read_memory(fields.table("memory")),
        devices=tuple(_read_wish(entry) for entry in fields.tables("devices", ())),
    )  # fmt: skip
    fields.finish()
    return policy


def _read_cpu(fields: Fields) -> CpuPolicy:
    cpu = CpuPolicy(
        MilliCpu(fields.number("reservation", 0)),
        MilliCpu(fields.number("limit")) if fields.has("limit") else None,
        fields.number("shares", 100, most=_MAX_SHARES), fields.choice("placement", Placement),
    )  # fmt: skip
    fields.finish()
    return cpu


def _read_memory(fields: Fields) -> MemoryPolicy:
    memory = MemoryPolicy(
        Bytes(fields.number("reservation", 0)),
        Bytes(fields.number("limit")) if fields.has("limit") else None,
        fields.number("shares", 100, most=_MAX_SHARES), fields.texts("tiers"),
        growth=fields.choice("growth", Growth),
    )  # fmt: skip
    fields.finish()
    return memory


def _read_wish(fields: Fields) -> DevicePolicy:
    wish = DevicePolicy(
        parse_capability(fields.text("capability", most=MAX_NAME)),
        fields.number("count", 1, most=0xFFFF), fields.flag("reclaimable", default=False),
    )  # fmt: skip
    fields.finish()
    return wish
