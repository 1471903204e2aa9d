"""Arbiter and placement for one request on a 256-pCPU, 8-node host, by number of guests."""

from __future__ import annotations

import statistics
import time
import uuid
from typing import Any

from virtfabric.adapters.simulated.machines import make_topology
from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState, VirtioMem
from virtfabric.model.host import Capacity, HostTopology
from virtfabric.model.ids import GuestId, RequestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy, Placement
from virtfabric.model.request import Origin, Principal, Request
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet, MilliCpu
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.placement import plan_decision

TARGET_MS = {10: 1.0, 100: 3.0, 1000: 20.0}


def _guest(number: int, pool: CpuSet, node: int, pcpu: int | None) -> tuple[GuestState, Holding]:
    guest = GuestId(uuid.UUID(int=number + 1))
    dedicated = pcpu is not None
    cpu = 1000 if dedicated else 200
    pin = CpuSet([pcpu]) if pcpu is not None else pool
    state = GuestState(
        uuid=guest,
        name=f"guest{number}",
        state=RunState.RUNNING,
        pid=1000 + number,
        vcpus_max=4,
        vcpus_online=1,
        vcpu_threads={0: 5000 + number},
        vcpu_affinity={0: pin},
        boot_memory=Bytes(256 * MIB),
        memory_current=Bytes(512 * MIB),
        memory_max=Bytes(2 * GIB),
        mechanism=MemoryMechanism.VIRTIO_MEM,
        virtio_mem=(
            VirtioMem(
                "m0", node, Bytes(2 * GIB), Bytes(2 * MIB), Bytes(256 * MIB), Bytes(256 * MIB)
            ),
        ),
        policy=GuestPolicy(
            priority=number % 90,
            cpu=CpuPolicy(
                MilliCpu(100),
                MilliCpu(4000),
                placement=Placement.DEDICATED if dedicated else Placement.SHARED,
            ),
            memory=MemoryPolicy(Bytes(256 * MIB), Bytes(2 * GIB)),
        ),
    )
    order = (pcpu,) if pcpu is not None else ()
    return state, Holding(guest, Amounts.of(cpu=cpu, memory=512 * MIB), order)


def make_snapshot(count: int, *, contended: bool) -> tuple[HostSnapshot, GuestId]:
    """`count` guests, one in ten dedicated (48 at most), the last one asks.

    Contended: no memory is free, so that every guest has to be looked at as a victim.
    """
    topology: HostTopology = make_topology(cores=16, threads=2, nodes=8, node_memory=128 * GIB)
    dedicated = min(count // 10, 48)
    taken = CpuSet(range(16, 16 + dedicated))
    pool = CpuSet(topology.cpus - taken)
    pairs = [_guest(n, pool, n % 8, 16 + n if n < dedicated else None) for n in range(count)]
    capacity = Capacity(
        topology.cpus,
        CpuSet([0, 1]),
        {n: Bytes(count * 576 * MIB // 8 if contended else 128 * GIB) for n in range(8)},
        Bytes(0),
        Bytes(64 * MIB),
    )
    books = Books(1, {s.uuid: h for s, h in pairs})
    asker = pairs[-1][0].uuid
    return HostSnapshot(1, topology, capacity, {s.uuid: s for s, _ in pairs}, books), asker


def measure() -> list[dict[str, Any]]:
    """Median milliseconds of decision and plan together, by number of guests."""
    rows = []
    cases = [(c, t, contended) for c, t in TARGET_MS.items() for contended in (False, True)]
    for count, target, contended in cases:
        snapshot, asker = make_snapshot(count, contended=contended)
        request = Request(
            RequestId("req-bench"), asker, Principal("root", 0), Origin.DBUS,
            cpu=Want(Mode.BY, 300), memory=Want(Mode.BY, 64 * MIB),
        )  # fmt: skip
        samples = []
        for _ in range(60):
            began = time.perf_counter()
            decision = choose_allocation(snapshot, request)
            if isinstance(decision, Refusal):
                raise SystemExit(f"the benchmark's request was refused: {decision}")
            plan = plan_decision(snapshot, decision)
            if isinstance(plan, Refusal):
                raise SystemExit(f"the benchmark's request was refused: {plan}")
            samples.append((time.perf_counter() - began) * 1e3)
        median = statistics.median(samples)
        label = "contended" if contended else "free"
        rows.append(
            {
                "what": f"arbiter + placement, {count} guests, {label}",
                "value": round(median, 3), "unit": "ms median", "target": target,
                "met": median < target,
            }
        )  # fmt: skip
    return rows
