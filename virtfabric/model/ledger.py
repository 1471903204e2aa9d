"""What guests hold: holdings, grants, loans, residues. The snapshot that decisions are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from virtfabric.model.amounts import Amounts
from virtfabric.model.device import DeviceInventory, HeldFunction
from virtfabric.model.hugepages import HeldPages, HugePools
from virtfabric.model.ids import GrantId, GuestId, LoanId, RequestId
from virtfabric.model.reclaim import Recall
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.adapter import AdapterId
    from virtfabric.model.card import CardView, HeldSlice
    from virtfabric.model.device import PciAddress, Quarantine
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import Capacity, HostTopology
    from virtfabric.model.memoryquarantine import MemoryQuarantine
    from virtfabric.model.step import Step


@dataclass(frozen=True, slots=True)
class Holding:
    """What one running managed guest holds in all: milli-CPU, and bytes visible to the guest.

    Attributes:
        cpus: the pCPUs of a dedicated guest, empty for a shared one.
        order: pCPU of each vCPU, by vCPU number (dedicated), empty for a shared guest.
        functions: PCIe functions that are its own, whether attached already or not.
        named: functions that its own XML names; they count in no amount, and nothing but its end
            takes them away.
        pages: huge pages that it has, or counts on until it runs, as far as this agent saw to them.
    """

    guest: GuestId
    amounts: Amounts
    order: tuple[int, ...] = ()
    functions: tuple[HeldFunction, ...] = ()
    named: tuple[HeldFunction, ...] = ()
    pages: tuple[HeldPages, ...] = ()

    @property
    def cpus(self) -> CpuSet:
        """The pCPUs of a dedicated guest."""
        return CpuSet(self.order)

    @property
    def claims(self) -> tuple[HeldFunction, ...]:
        """All functions that nobody else may have, granted or named by its XML."""
        return (*self.functions, *self.named)

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "guest": self.guest, "amounts": self.amounts.to_json(), "order": list(self.order),
            "functions": [f.to_json() for f in self.functions],
            "named": [f.to_json() for f in self.named],
            "pages": [p.to_json() for p in self.pages],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Holding:
        """The reverse of `to_json`."""
        return cls(
            GuestId(data["guest"]), Amounts.from_json(data["amounts"]), tuple(data["order"]),
            tuple(HeldFunction.from_json(f) for f in data.get("functions", ())),
            tuple(HeldFunction.from_json(f) for f in data.get("named", ())),
            tuple(HeldPages.from_json(p) for p in data.get("pages", ())),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grant:
    """What one request gave to a guest, on top of what it had. Times are UNIX seconds."""

    id: GrantId
    guest: GuestId
    amounts: Amounts
    request: RequestId
    since: float
    expires: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For the journal and for clients."""
        return {
            "id": self.id, "guest": self.guest, "amounts": self.amounts.to_json(),
            "request": self.request, "since": self.since, "expires": self.expires,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grant:
        """The reverse of `to_json`."""
        return cls(
            GrantId(data["id"]), GuestId(data["guest"]), Amounts.from_json(data["amounts"]),
            RequestId(data["request"]), data["since"], data["expires"],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loan:
    """What a victim paid for a grant; it goes home when the grant ends."""

    id: LoanId
    grant: GrantId
    victim: GuestId
    borrower: GuestId
    amounts: Amounts
    since: float

    def to_json(self) -> dict[str, Any]:
        """For the journal and for clients."""
        return {
            "id": self.id, "grant": self.grant, "victim": self.victim, "borrower": self.borrower,
            "amounts": self.amounts.to_json(), "since": self.since,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Loan:
        """The reverse of `to_json`."""
        return cls(
            LoanId(data["id"]), GrantId(data["grant"]), GuestId(data["victim"]),
            GuestId(data["borrower"]), Amounts.from_json(data["amounts"]), data["since"],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Residue:
    """What an undo or a shrink could not bring back yet: counted as used, retried, shown.

    Attributes:
        what: "memory" or "memory@tier:cxl" (amount in bytes the guest holds beyond its holding),
            "vcpu" (vCPUs plugged beyond its holding, in milli-CPU) or "device" (functions it does
            not let go).
    """

    guest: GuestId
    what: str
    amount: int
    since: float
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the journal and for clients."""
        return {
            "guest": self.guest, "what": self.what, "amount": self.amount, "since": self.since,
            "detail": self.detail,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Residue:
        """The reverse of `to_json`."""
        return cls(
            GuestId(data["guest"]), data["what"], data["amount"], data["since"], data["detail"]
        )


@dataclass(frozen=True, slots=True)
class Books:
    """The ledger's content at one generation; each by its id (holdings and guests by UUID).

    Attributes:
        memory_quarantine: by `MemoryQuarantine.subject`.
        slices: of offload cards, by the key of their request.
    """

    generation: int = 0
    holdings: dict[GuestId, Holding] = field(default_factory=dict)
    grants: dict[GrantId, Grant] = field(default_factory=dict)
    loans: dict[LoanId, Loan] = field(default_factory=dict)
    residues: tuple[Residue, ...] = ()
    quarantine: dict[PciAddress, Quarantine] = field(default_factory=dict)
    memory_quarantine: dict[str, MemoryQuarantine] = field(default_factory=dict)
    slices: dict[str, HeldSlice] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostSnapshot:
    """Everything a decision is made of.

    Attributes:
        generation: covers structure and ledger, not telemetry.
        guests: all guests known to libvirt, running or not, by UUID.
        books: committed holdings, grants and loans.
        pending: amounts reserved by running plans that are not committed yet (positive part).
        busy: guests that a running plan touches; not eligible as victims.
        lend_ballooned: whether memory taken by a balloon may be granted onward.
        devices: the host's PCIe functions and pools.
        working: functions that a running plan touches (`Plan.addresses`); not chosen by another.
        recall: how memory that leaves guests is to leave them.
        done: steps of the transaction that is decided anew which came about, as far as they did.
        pools: huge pages of now; None where nobody looked, as no guest needs any.
        cards: offload cards as each was last told of, by serial number.
    """

    generation: int
    topology: HostTopology
    capacity: Capacity
    guests: dict[GuestId, GuestState]
    books: Books
    pending: Amounts = Amounts()
    busy: frozenset[GuestId] = frozenset()
    lend_ballooned: bool = False
    devices: DeviceInventory = field(default_factory=DeviceInventory)
    working: frozenset[PciAddress] = frozenset()
    recall: Recall = field(default_factory=Recall)
    done: tuple[Step, ...] = ()
    pools: HugePools | None = None
    cards: Mapping[AdapterId, CardView] = field(default_factory=dict)
