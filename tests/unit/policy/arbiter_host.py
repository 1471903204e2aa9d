"""Small hosts with figures that one can follow: guests, what they hold, what is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from host_data import load_host

from virtfabric.model.amounts import Amounts
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState, VirtioMem
from virtfabric.model.host import Capacity
from virtfabric.model.ids import GrantId, GuestId, LoanId, RequestId
from virtfabric.model.ledger import Books, Grant, Holding, HostSnapshot
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import MIB, Bytes, CpuSet
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import (
    choose_allocation,
)
from virtfabric.policy.loans import settle

BATCH, WEB, DB, OTHER = (GuestId(f"00000000-0000-4000-8000-00000000000{n}") for n in "1234")
OVERHEAD = 10 * MIB


def guest(
    uuid: GuestId, priority: int | None, *, cpu: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None, **fields: Any,
) -> GuestState:  # fmt: skip
    policy = None
    if priority is not None:
        policy = GuestPolicy(
            priority=priority, cpu=CpuPolicy(**cpu or {}), memory=MemoryPolicy(**memory or {})
        )
    device = VirtioMem("ua-v", 0, Bytes(512 * MIB), Bytes(2 * MIB), Bytes(0), Bytes(0))
    defaults: dict[str, Any] = {
        "name": {BATCH: "batch", WEB: "web", DB: "db"}.get(uuid, "other"),
        "state": RunState.RUNNING, "vcpus_max": 4, "boot_memory": Bytes(128 * MIB),
        "memory_current": Bytes(128 * MIB), "memory_max": Bytes(640 * MIB),
        "mechanism": MemoryMechanism.VIRTIO_MEM, "virtio_mem": (device,), "policy": policy,
    }  # fmt: skip
    return GuestState(uuid=uuid, **defaults | fields)


def host(
    *entries: tuple[GuestState, int, int] | GuestState, cpus: int = 4, memory: int = 2048,
    **fields: Any,
) -> HostSnapshot:  # fmt: skip
    """Guests with milli-CPU and MiB that they hold, on this many pCPUs and MiB."""
    holdings = {
        e[0].uuid: Holding(e[0].uuid, Amounts.of(cpu=e[1], memory=e[2] * MIB))
        for e in entries if isinstance(e, tuple)
    }  # fmt: skip
    found = [e[0] if isinstance(e, tuple) else e for e in entries]
    capacity = Capacity(
        CpuSet(range(cpus)), CpuSet({0}), {0: Bytes(memory * MIB)}, Bytes(0), Bytes(OVERHEAD)
    )
    return HostSnapshot(
        5, load_host("flat-8"), capacity, {g.uuid: g for g in found}, Books(5, holdings), **fields
    )


def ask(
    uuid: GuestId, cpu: int | None = None, memory: int | None = None, *, mode: Mode = Mode.BY,
    partial: bool = False,
) -> Request:  # fmt: skip
    return Request(
        RequestId("req-1"), uuid, AGENT, Origin.DBUS,
        cpu=None if cpu is None else Want(mode, cpu),
        memory=None if memory is None else Want(mode, memory * MIB), partial=partial,
    )  # fmt: skip


def granted(snapshot: HostSnapshot, request: Request, **options: Any) -> Decision:
    answer = choose_allocation(snapshot, request, **options)
    assert isinstance(answer, Decision), answer
    return answer


def refused(snapshot: HostSnapshot, request: Request) -> Refusal:
    answer = choose_allocation(snapshot, request)
    assert isinstance(answer, Refusal), answer
    return answer


def paid(decision: Decision) -> list[tuple[GuestId, int, int]]:
    return [(t.victim, t.amounts.cpu, t.amounts.memory // MIB) for t in decision.takes]


def three(*, cpus: int = 4, memory: int = 2048, **fields: Any) -> HostSnapshot:
    """The demo: batch 10, web 50, database 90."""
    return host(
        (guest(BATCH, 10), 2000, 500), (guest(WEB, 50), 1000, 200), (guest(DB, 90), 1000, 200),
        cpus=cpus, memory=memory, **fields,
    )  # fmt: skip


def committed(
    snapshot: HostSnapshot, decision: Decision, ends: Grant | None = None, name: str = "g",
    at: float = 1.0,
) -> tuple[HostSnapshot, Grant]:  # fmt: skip
    grant = Grant(GrantId(name), decision.guest, decision.delta.positive(), decision.request, at)
    books = settle(
        snapshot.books, decision, grant=ends, new_grant=grant if grant.amounts else None,
        loan_ids=[LoanId(f"l{name[1:]}{n}") for n in range(len(decision.takes))], at=at, orders={},
    )  # fmt: skip
    return replace(snapshot, books=books), grant
