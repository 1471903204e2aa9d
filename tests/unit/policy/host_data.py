"""Hosts from `tests/data/hosts` and builders of guests and snapshots, for every policy test.

Tests run with `--import-mode=importlib` and without packages: put this directory on `sys.path`
(`tests/unit/policy/conftest.py` does so here) and `import host_data`.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtfabric.model.amounts import Amounts
from virtfabric.model.decision import Decision
from virtfabric.model.guest import (
    GuestState,
    MemoryMechanism,
    NumaMode,
    RunState,
    SchedulerState,
    VirtioMem,
)  # fmt: skip
from virtfabric.model.host import Capacity, HostTopology, HugePages, NumaNode, Pcpu
from virtfabric.model.ids import GuestId, HostId, RequestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.plan import PinVcpu, SetVcpuCount
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy, Placement, Smt
from virtfabric.model.units import MIB, Bytes, CpuSet, MilliCpu
from virtfabric.policy.intent import intended_mark

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DATA = Path(__file__).resolve().parents[2] / "data" / "hosts"
HOSTS: list[str] = sorted(path.stem for path in DATA.glob("*.json"))
BOOT_MEMORY = 128 * MIB
BLOCK = 2 * MIB


@cache
def load_host(name: str) -> HostTopology:
    """One of `HOSTS`."""
    data = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {
        n["number"]: NumaNode(
            n["number"],
            CpuSet.parse(n["cpus"]),
            Bytes(n["memory_total"]),
            Bytes(n["memory_free"]),
            tuple(HugePages(Bytes(h["size"]), h["total"], h["free"]) for h in n["huge_pages"]),
            {int(k): v for k, v in n["distances"].items()},
        )
        for n in data["nodes"]
    }
    pcpus = {
        p["number"]: Pcpu(
            p["number"], p["node"], p["socket"], p["core"], CpuSet.parse(p["siblings"])
        )
        for p in data["pcpus"]
    }
    return HostTopology(HostId(data["name"]), nodes, pcpus)


def guest_id(number: int) -> GuestId:
    """A fixed UUID by number."""
    return GuestId(uuid.UUID(int=number + (4 << 76) + (2 << 62)))


def make_guest(number: int, **options: Any) -> GuestState:
    """A running managed guest.

    Options: name, dedicated, smt, priority, shares, reservation (CPU, milli), limit (CPU, milli),
    memory_reservation, vcpus_max, vcpus_online, memory (bytes now), memory_max, mechanism,
    devices (virtio-mem devices that share what can be added), numa_nodes, numa_mode, and any
    other field of `GuestState` by its name.
    """
    get = options.pop
    dedicated = get("dedicated", False)
    reservation = MilliCpu(get("reservation", 1000 if dedicated else 100))
    limit = get("limit", None)
    policy = GuestPolicy(
        priority=get("priority", 50),
        cpu=CpuPolicy(
            reservation,
            None if limit is None else MilliCpu(limit),
            get("shares", 100),
            Placement.DEDICATED if dedicated else Placement.SHARED,
            get("smt", Smt.PREFER),
        ),
        memory=MemoryPolicy(Bytes(get("memory_reservation", BOOT_MEMORY))),
    )
    mechanism = get("mechanism", MemoryMechanism.VIRTIO_MEM)
    memory = get("memory", BOOT_MEMORY)
    most = get("memory_max", max(memory, BOOT_MEMORY + 512 * MIB))
    devices = get("devices", 1)
    virtio = mechanism is MemoryMechanism.VIRTIO_MEM
    fields: dict[str, Any] = {
        "name": f"guest{number}",
        "state": RunState.RUNNING,
        "pid": 10_000 + number,
        "vcpus_max": 8,
        "vcpus_online": 1,
        "boot_memory": Bytes(BOOT_MEMORY if virtio else most),
        "memory_current": Bytes(memory),
        "memory_max": Bytes(most),
        "mechanism": mechanism,
        "virtio_mem": _devices(memory, most, devices) if virtio else (),
        "policy": policy,
    }
    return GuestState(uuid=guest_id(number), **fields | options)


def _devices(memory: int, most: int, count: int) -> tuple[VirtioMem, ...]:
    each = (most - BOOT_MEMORY) // count // BLOCK * BLOCK
    left = memory - BOOT_MEMORY
    devices = []
    for index in range(count):
        part = min(each, left)
        left -= part
        devices.append(
            VirtioMem(
                f"vm{index}", index, Bytes(each), Bytes(BLOCK), requested=Bytes(part),
                current=Bytes(part),
            )
        )  # fmt: skip
    return tuple(devices)


def snapshot_of(
    topology: HostTopology,
    guests: Iterable[GuestState] = (),
    holdings: Mapping[GuestId, tuple[Amounts, tuple[int, ...]]] | None = None,
    **options: Any,
) -> HostSnapshot:
    """A snapshot at generation 7, all pCPUs managed but for what `cpus` says.

    Options: cpus, housekeeping (sets or lists such as "0-3"; the default housekeeping is pCPU 0),
    generation, reserve, overhead, and any other field of `HostSnapshot` by its name.
    """
    get = options.pop
    books = Books(
        get("books_generation", 7),
        {g: Holding(g, amounts, order) for g, (amounts, order) in (holdings or {}).items()},
    )
    capacity = Capacity(
        _cpus(get("cpus", topology.cpus)),
        _cpus(get("housekeeping", "0")),
        {n.number: n.memory_total for n in topology.nodes.values()},
        Bytes(get("reserve", 64 * MIB)),
        Bytes(get("overhead", 64 * MIB)),
    )
    return HostSnapshot(
        get("generation", 7), topology, capacity, {g.uuid: g for g in guests}, books, **options
    )


def _cpus(value: CpuSet | str) -> CpuSet:
    return value if isinstance(value, CpuSet) else CpuSet.parse(value)


def settle(snapshot: HostSnapshot, intended: Mapping[GuestId, Any]) -> HostSnapshot:
    """The snapshot with each guest's live state as `intended` (of `policy.intent`) says."""
    guests = dict(snapshot.guests)
    for guest, want in intended.items():
        guests[guest] = replace(
            guests[guest],
            vcpus_online=want.vcpus,
            vcpu_affinity={v: c for v, c in want.pins.items() if v < want.vcpus},
            emulator_affinity=want.emulator,
            scheduler=SchedulerState(
                want.shares, 100_000, -1 if want.quota < 0 else want.quota * 100
            ),
            numa_nodes=want.nodes or guests[guest].numa_nodes,
        )
        placed = guests[guest]
        mark = intended_mark(placed, placed.vcpu_affinity, want.emulator, snapshot.topology.cpus)
        guests[guest] = replace(placed, marked_pins=mark)
    return replace(snapshot, guests=guests)


def decision_of(
    snapshot: HostSnapshot, guest: GuestId, holdings: Mapping[GuestId, Amounts]
) -> Decision:
    """A decision that leads to these holdings; deltas as the books have them."""
    holding = snapshot.books.holdings.get(guest)
    before = holding.amounts if holding else Amounts()
    delta = holdings.get(guest, before) - before
    return Decision(RequestId("req-1"), guest, snapshot.generation, delta, holdings=dict(holdings))


__all__ = [
    "BLOCK", "BOOT_MEMORY", "DATA", "HOSTS", "NumaMode", "PinVcpu", "SetVcpuCount", "decision_of",
    "guest_id", "load_host", "make_guest", "settle", "snapshot_of",
]  # fmt: skip
