"""What `status`, `host`, `guests`, `grants` and `loans` show: snapshot -> JSON-ready values.

The shapes are documented in docs/dbus-api.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.daemon.devicedesk import blast_view
from virtfabric.model.amounts import CXL_KEY
from virtfabric.model.errors import Refusal
from virtfabric.model.policy import Placement
from virtfabric.policy.layout import choose_layout
from virtfabric.policy.returnability import held_memory
from virtfabric.policy.standing import (
    capacity_of,
    ceiling_of,
    floor_of,
    free,
    has_far,
    line_of,
)
from virtfabric.policy.tiers import part_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.decision import Decision
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Holding, HostSnapshot
    from virtfabric.model.plan import Plan

    Json = dict[str, Any]


def _name(snapshot: HostSnapshot, guest: GuestId) -> str:
    state = snapshot.guests.get(guest)
    return state.name if state else guest


def host_view(snapshot: HostSnapshot) -> Json:
    """pCPU map, memory by node, capacity and what is free of it."""
    layout = choose_layout(snapshot, {g: h.amounts for g, h in snapshot.books.holdings.items()})
    pool = housekeeping = snapshot.capacity.cpus
    orders: Mapping[GuestId, tuple[int, ...]] = {}
    kept_empty: Mapping[int, GuestId] = {}
    if not isinstance(layout, Refusal):
        pool, housekeeping, orders = layout.pool, layout.housekeeping, layout.orders
        kept_empty = layout.kept_empty
    owner = {cpu: (g, n) for g, order in orders.items() for n, cpu in enumerate(order)}
    cpus = []
    for number, pcpu in sorted(snapshot.topology.pcpus.items()):
        guest, vcpu = owner.get(number, (None, None))
        isolated_by = kept_empty.get(number)
        if guest is not None or isolated_by is not None:
            role = "dedicated"
        elif number in pool:
            role = "pool"
        else:
            role = "housekeeping" if number in housekeeping else "unmanaged-part"
        cpus.append(
            {
                "cpu": number, "node": pcpu.node, "socket": pcpu.socket, "core": pcpu.core,
                "siblings": list(pcpu.siblings), "role": role, "vcpu": vcpu,
                "guest": _name(snapshot, guest) if guest else None,
                "isolated_by": _name(snapshot, isolated_by) if isolated_by else None,
            }
        )  # fmt: skip
    left, total = free(snapshot), capacity_of(snapshot)
    cxl = snapshot.topology.cxl_nodes
    return {
        "host_id": snapshot.topology.host_id, "cpus": cpus, "pool": str(pool),
        "housekeeping": str(housekeeping),
        "memory": [
            {
                "node": n, "total": int(node.memory_total), "free": int(node.memory_free),
                "grantable": int(
                    (snapshot.capacity.cxl if n in cxl else snapshot.capacity.memory).get(n, 0)
                ),
                "tier": node.tier, "offlinable": node.offlinable,
                "why_not_offlinable": node.why_not_offlinable,
            }
            for n, node in sorted(snapshot.topology.nodes.items())
        ],
        "withheld": {str(n): why for n, why in sorted(snapshot.capacity.withheld.items())},
        "capacity": {
            "cpu_milli": int(total.cpu), "memory": int(total.memory),
            "reserve": int(snapshot.capacity.reserve), "cxl": int(total[CXL_KEY]),
        },
        "free": {
            "cpu": max(0, int(left.cpu)), "memory": max(0, int(left.memory)),
            "cxl": max(0, left[CXL_KEY]),
        },
        "unmanaged": sorted(g.name for g in snapshot.guests.values() if g.active and not g.managed),
    }  # fmt: skip


def guest_view(snapshot: HostSnapshot, guest: GuestState) -> Json:
    """One guest: entitlement, grant, and what is live."""
    holding = snapshot.books.holdings.get(guest.uuid)
    policy = guest.policy
    floor = floor_of(guest, snapshot) if policy else None
    ceiling = ceiling_of(guest, snapshot) if policy else None
    scheduler = guest.scheduler
    quota = (
        -1
        if scheduler.global_quota < 0
        else scheduler.global_quota * 1000 // scheduler.global_period
    )
    dedicated = policy is not None and policy.cpu.placement is Placement.DEDICATED
    return {
        "uuid": guest.uuid, "name": guest.name, "state": guest.state.value,
        "managed": guest.managed, "policy_error": guest.policy_error,
        "priority": policy.priority if policy else None,
        "placement": policy.cpu.placement.value if policy else None,
        "cpu": {
            "reservation": int(policy.cpu.reservation) if policy else None,
            "grant": int(holding.amounts.cpu) if holding else None,
            "limit": int(ceiling.cpu) if ceiling else None,
            "floor": int(floor.cpu) if floor else None,
            "vcpus_online": guest.vcpus_online, "vcpus_max": guest.vcpus_max, "quota": quota,
        },
        "memory": {
            "reservation": int(policy.memory.reservation) if policy else None,
            "grant": int(holding.amounts.memory) if holding else None,
            "limit": int(ceiling.memory) if ceiling else None,
            "floor": int(floor.memory) if floor else None,
            "current": int(guest.memory_current), "mechanism": guest.mechanism.value,
            "cxl": _far_view(snapshot, guest, holding),
            "parts": [part.to_json() for part in held_memory(guest, snapshot)],
        },
        "cpus": str(holding.cpus) if holding and dedicated else "",
        "devices": _devices_view(guest, holding),
        "free_ports": guest.free_ports if guest.active else None,
        "busy": guest.uuid in snapshot.busy, "job": guest.job,
        "residues": [r.to_json() for r in snapshot.books.residues if r.guest == guest.uuid],
    }  # fmt: skip


def _far_view(snapshot: HostSnapshot, guest: GuestState, holding: Holding | None) -> Json | None:
    """CXL memory; None where it means nothing to the guest."""
    held = holding.amounts[CXL_KEY] if holding else 0
    if not held and not has_far(guest, snapshot):
        return None
    line = line_of(guest, CXL_KEY, snapshot)
    part = part_of(guest, CXL_KEY, snapshot.topology.cxl_nodes)
    managed = guest.policy is not None
    return {
        "grant": held if holding else None, "limit": line.ceiling if managed else None,
        "floor": line.floor if managed else None, "current": part.current,
    }  # fmt: skip


def _devices_view(guest: GuestState, holding: Holding | None) -> list[Json]:
    """Functions that it holds, attached or not, and those that somebody else attached."""
    held = {f.address: f.capability for f in holding.functions} if holding else {}
    named = {f.address for f in holding.named} if holding else set()
    live = {d.address: d for d in guest.devices} if guest.active else {}
    return [
        {
            "address": address, "capability": held.get(address), "attached": address in live,
            "ours": address in held,
        }
        for address in sorted({*held, *named, *live}, key=lambda a: a.parts)
    ]  # fmt: skip


def guests_view(snapshot: HostSnapshot) -> list[Json]:
    """All guests, by name."""
    return [guest_view(snapshot, g) for g in sorted(snapshot.guests.values(), key=lambda g: g.name)]


def grants_view(snapshot: HostSnapshot) -> list[Json]:
    """Open grants, oldest first."""
    grants = sorted(snapshot.books.grants.values(), key=lambda g: g.since)
    return [g.to_json() | {"name": _name(snapshot, g.guest)} for g in grants]


def loans_view(snapshot: HostSnapshot) -> list[Json]:
    """Open loans, oldest first."""
    loans = sorted(snapshot.books.loans.values(), key=lambda loan: loan.since)
    return [
        loan.to_json()
        | {
            "victim_name": _name(snapshot, loan.victim),
            "borrower_name": _name(snapshot, loan.borrower),
        }
        for loan in loans
    ]


def plan_view(snapshot: HostSnapshot, decision: Decision, plan: Plan) -> Json:
    """What a request would come to: the decision, and exactly the steps."""
    return {
        "decision": decision.to_json(),
        "steps": [{"text": str(s), "data": s.to_json()} for s in plan.steps],
        "offers": [o.to_json() | {"text": o.why} for o in plan.offers],
        "generation": plan.generation,
        "devices": blast_view(snapshot, plan),
    }
