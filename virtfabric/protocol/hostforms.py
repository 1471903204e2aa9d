"""Hosts and their books as tables, as far as an arbiter of CPU and memory looks at them. Pure.

Left out is what only placement, drift and functions need. `tests/unit/policy` holds it to that: an
arbiter answers the same on what was sent as on what it was made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.model.amounts import Tier
from virtfabric.model.device import HeldFunction, PciAddress
from virtfabric.model.host import Capacity, HostTopology, NumaNode, Pcpu
from virtfabric.model.ids import GrantId, GuestId, HostId, LoanId, RequestId
from virtfabric.model.ledger import Books, Grant, Holding, HostSnapshot, Loan, Residue
from virtfabric.model.reclaim import Recall
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.protocol.adapterforms import MAX_NAME
from virtfabric.protocol.fields import MAX_TEXT
from virtfabric.protocol.valueforms import (
    form_of_amounts,
    read_amounts,
    read_bytes,
    read_guest_id,
    read_set,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from virtfabric.protocol.fields import Fields


def _sizes(by_node: Mapping[int, Bytes]) -> dict[str, int]:
    return {str(node): int(size) for node, size in by_node.items()}


def _read_sizes(fields: Fields, name: str) -> dict[int, Bytes]:
    return {_node(fields, name, node): Bytes(n) for node, n in fields.figures(name, {}).items()}


def _node(fields: Fields, name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5):
        raise fields.fail(name, f"names {text[:9]!r}, which is no number of a node")
    return int(text)


def form_of_host(snapshot: HostSnapshot) -> dict[str, Any]:
    """A host without its guests and books."""
    capacity, recall = snapshot.capacity, snapshot.recall
    return {
        "id": snapshot.topology.host_id, "generation": snapshot.generation,
        "huge_page": int(snapshot.topology.huge_page),
        "nodes": [
            {
                "node": node.number, "tier": node.tier, "offlinable": node.offlinable,
                "memory": int(node.memory_total), "cpus": str(_cpus_of(snapshot, node.number)),
            }
            for node in snapshot.topology.nodes.values()
        ],
        "capacity": {
            "cpus": str(capacity.cpus), "memory": _sizes(capacity.memory),
            "cxl": _sizes(capacity.cxl), "reserve": int(capacity.reserve),
            "overhead": int(capacity.overhead),
            "withheld": [
                {"node": n, "why": why[:MAX_TEXT]} for n, why in capacity.withheld.items()
            ],
        },
        "pending": form_of_amounts(snapshot.pending), "busy": sorted(snapshot.busy),
        "lend_ballooned": snapshot.lend_ballooned, "called_home": sorted(recall.nodes),
    }  # fmt: skip


def _cpus_of(snapshot: HostSnapshot, node: int) -> CpuSet:
    return CpuSet(n for n, pcpu in snapshot.topology.pcpus.items() if pcpu.node == node)


def read_host(fields: Fields) -> HostSnapshot:
    """The reverse of `form_of_host`; each pCPU is a core of its own, as amounts know no siblings.

    Raises:
        InvalidValueError: names the field.
    """
    nodes: dict[int, NumaNode] = {}
    pcpus: dict[int, Pcpu] = {}
    for entry in fields.tables("nodes"):
        number, cpus = entry.number("node", most=0xFFFF), read_set(entry, "cpus")
        nodes[number] = NumaNode(
            number, cpus, read_bytes(entry, "memory"), Bytes(0), tier=entry.choice("tier", Tier),
            offlinable=entry.flag("offlinable", default=False),
        )  # fmt: skip
        if not pcpus.keys().isdisjoint(cpus):
            raise entry.fail("cpus", "are another node's, too")
        pcpus |= {cpu: Pcpu(cpu, number, 0, cpu, CpuSet((cpu,))) for cpu in cpus}
        entry.finish()
    topology = HostTopology(
        HostId(fields.text("id", most=MAX_NAME)), nodes, pcpus, read_bytes(fields, "huge_page")
    )
    snapshot = HostSnapshot(
        fields.number("generation"), topology, _read_capacity(fields.table("capacity")), {},
        Books(), read_amounts(fields, "pending"),
        frozenset(GuestId.parse(one, field=fields.path("busy")) for one in fields.texts("busy")),
        lend_ballooned=fields.flag("lend_ballooned", default=False),
        recall=Recall(frozenset(fields.numbers("called_home", (), most=0xFFFF))),
    )  # fmt: skip
    fields.finish()
    return snapshot


def _read_capacity(fields: Fields) -> Capacity:
    withheld = {}
    for entry in fields.tables("withheld", ()):
        withheld[entry.number("node", most=0xFFFF)] = entry.text("why", empty=True)
        entry.finish()
    capacity = Capacity(
        read_set(fields, "cpus"), CpuSet(), _read_sizes(fields, "memory"),
        read_bytes(fields, "reserve"), read_bytes(fields, "overhead"),
        _read_sizes(fields, "cxl"), withheld,
    )  # fmt: skip
    fields.finish()
    return capacity


# -- books ------------------------------------------------------------------------------------


def form_of_books(books: Books) -> dict[str, Any]:
    """Holdings, grants, loans and residues, as far as amounts are concerned."""
    return {
        "holdings": [_form_of_holding(holding) for holding in books.holdings.values()],
        "grants": [
            {
                "id": one.id, "guest": one.guest, "amounts": form_of_amounts(one.amounts),
                "since_ms": _ms(one.since),
            }
            for one in books.grants.values()
        ],
        "loans": [
            {
                "id": one.id, "grant": one.grant, "victim": one.victim, "borrower": one.borrower,
                "amounts": form_of_amounts(one.amounts), "since_ms": _ms(one.since),
            }
            for one in books.loans.values()
        ],
        "residues": [
            {"guest": one.guest, "what": one.what, "amount": one.amount} for one in books.residues
        ],
    }  # fmt: skip


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _form_of_holding(holding: Holding) -> dict[str, Any]:
    form: dict[str, Any] = {
        "guest": holding.guest, "amounts": form_of_amounts(holding.amounts)
    }  # fmt: skip
    for name, functions in (("functions", holding.functions), ("named", holding.named)):
        if functions:
            form[name] = [{"capability": f.capability, "address": f.address} for f in functions]
    return form


def read_books(fields: Fields) -> Books:
    """The reverse of `form_of_books`.

    Raises:
        InvalidValueError: names the field; also where something is there twice.
    """
    books = Books(
        holdings=_by_id(fields, "holdings", _read_holding, lambda one: one.guest),
        grants=_by_id(fields, "grants", _read_grant, lambda one: one.id),
        loans=_by_id(fields, "loans", _read_loan, lambda one: one.id),
        residues=tuple(_read_residue(entry) for entry in fields.tables("residues", ())),
    )
    fields.finish()
    return books


def _by_id(
    fields: Fields, name: str, read: Callable[[Fields], Any], id_of: Callable[[Any], Any]
) -> dict[Any, Any]:
    return unique(fields, name, (read(entry) for entry in fields.tables(name, ())), id_of)


def unique(
    fields: Fields, name: str, found: Iterable[Any], id_of: Callable[[Any], Any]
) -> dict[Any, Any]:
    """By id.

    Raises:
        InvalidValueError: one is there twice.
    """
    by_id: dict[Any, Any] = {}
    for one in found:
        if id_of(one) in by_id:
            raise fields.fail(name, f"has {id_of(one)} twice")
        by_id[id_of(one)] = one
    return by_id


def _read_holding(fields: Fields) -> Holding:
    holding = Holding(
        read_guest_id(fields, "guest"), read_amounts(fields, "amounts"),
        functions=_read_functions(fields, "functions"), named=_read_functions(fields, "named"),
    )  # fmt: skip
    fields.finish()
    return holding


def _read_functions(fields: Fields, name: str) -> tuple[HeldFunction, ...]:
    found = []
    for entry in fields.tables(name, ()):
        capability = entry.text("capability", most=MAX_NAME, empty=True)
        address: PciAddress = entry.parsed("address", PciAddress.parse)
        found.append(HeldFunction(capability, address))
        entry.finish()
    return tuple(found)


def _read_grant(fields: Fields) -> Grant:
    grant = Grant(
        GrantId(fields.text("id", most=MAX_NAME)), read_guest_id(fields, "guest"),
        read_amounts(fields, "amounts"), RequestId(""), fields.number("since_ms") / 1000,
    )  # fmt: skip
    fields.finish()
    return grant


def _read_loan(fields: Fields) -> Loan:
    loan = Loan(
        LoanId(fields.text("id", most=MAX_NAME)), GrantId(fields.text("grant", most=MAX_NAME)),
        read_guest_id(fields, "victim"), read_guest_id(fields, "borrower"),
        read_amounts(fields, "amounts"), fields.number("since_ms") / 1000,
    )  # fmt: skip
    fields.finish()
    return loan


def _read_residue(fields: Fields) -> Residue:
    residue = Residue(
        read_guest_id(fields, "guest"),
        fields.text("what", most=MAX_NAME),
        fields.number("amount"),
        0.0,
    )
    fields.finish()
    return residue
