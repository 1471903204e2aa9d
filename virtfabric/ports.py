"""The roles that the outside world plays. Each is small; real and simulated adapters play it alike.

Everything here is synchronous and is called from worker threads, never from the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from virtfabric.model.adapter import AdapterId, Reservation, Slice, SliceId, SliceSpec
    from virtfabric.model.amounts import Amounts
    from virtfabric.model.card import CardNews, CardView, SignedImage
    from virtfabric.model.cxl import Condition, HostMemory
    from virtfabric.model.decision import Course, Proposal
    from virtfabric.model.device import DeviceNews, PciAddress, PciFunction
    from virtfabric.model.errors import Refusal
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import HostTopology
    from virtfabric.model.hugepages import HugePools
    from virtfabric.model.ids import GuestId, RequestId, TransactionId
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.model.policy import GuestPolicy
    from virtfabric.model.reclaim import MemoryReport
    from virtfabric.model.request import Request
    from virtfabric.model.step import Step


class Clock(Protocol):
    """Time, as an argument."""

    def now(self) -> float:
        """UNIX seconds."""

    def monotonic(self) -> float:
        """Seconds that never go back."""


class HostReader(Protocol):
    """Reads the machine; repeating is safe."""

    def read_topology(self) -> HostTopology:
        """Nodes, pCPUs, memory of now.

        Raises:
            HypervisorGoneError, HypervisorError
        """

    def read_known_nodes(self) -> frozenset[int]:
        """NUMA nodes that the hypervisor knows of: of one that came later it learns at a restart.

        Raises:
            HypervisorGoneError, HypervisorError
        """


class Restarter(Protocol):
    """Restarts the hypervisor's daemon; guests run on."""

    def restart(self) -> None:
        """Returns when it was restarted; the connection comes back by itself.

        Raises:
            HypervisorError: it could not be.
        """


class DeviceTree(Protocol):
    """The host's PCIe functions; repeating is safe."""

    def read_functions(
        self,
        only: Collection[PciAddress] | None = None,
        settings: Collection[PciAddress] | None = None,
    ) -> dict[PciAddress, PciFunction]:
        """All functions, bridges and ports included, with how the host uses them now.

        A function that vanishes while it is read is left out.

        Args:
            only: of functions other than these, the ones that decide whether they can be given
                (IOMMU group, PF, ports above) and those that came or went, what was read last will
                do. None: all are read.
            settings: of VFs other than these, and of PFs other than theirs, the settings that were
                read last will do. None: as `only`.
        """

    def watch(self, changed: Callable[[DeviceNews], None]) -> None:
        """Call `changed` from a thread of its own whenever a function comes, goes or is bound."""

    def close(self) -> None:
        """Stop watching; safe to repeat."""


class MemoryTree(Protocol):
    """The host's NUMA nodes and CXL memory; repeating is safe."""

    def read_memory(self) -> HostMemory:
        """Nodes with their memory of now, and all CXL memory.

        Garbage that a device tells of itself is among the inventory's problems.
        """

    def read_conditions(self, cancelled: threading.Event) -> Mapping[str, Condition]:
        """Health and poison, asked of the memdevs, by the kernel's name. Takes seconds of each.

        Raises:
            CxlError: nobody can ask them.
            StepCancelledError: nobody waits for it any more.
        """

    def read_broken_pages(self) -> Mapping[int, int]:
        """Pages that the kernel took out of use since it booted (hwpoison), by node."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` from a thread of its own whenever CXL devices or memory come or go."""

    def close(self) -> None:
        """Stop watching; safe to repeat."""


class PageTree(Protocol):
    """The host's pools of huge pages; repeating is safe."""

    def read_pools(self) -> HugePools:
        """Every pool now, and which of its pages this agent made."""


class VfMaker(Protocol):
    """Makes VFs where a PF has none; repeating is safe."""

    def ensure(self, pf: PciAddress, count: int) -> int:
        """Give a PF `count` VFs if it has none; how many it has now, which may be another number.

        Raises:
            DeviceGoneError, DeviceError: it can have none, or not so many.
        """

    def ensure_nvme(self, pf: PciAddress, queues: int) -> None:
        """Give each VF of an NVMe PF `queues` queues and bring it online.

        Raises:
            DeviceGoneError, DeviceError: too little to distribute, or the host uses the PF.
        """


class CardLink(Protocol):
    """One offload card, as far as it can be believed. A lost one is tried again by itself."""

    @property
    def serial(self) -> AdapterId:
        """Which card it is; its certificate says the same, or there is no link."""

    def view(self) -> CardView:
        """As last told; never waits."""

    def refresh(self) -> CardView:
        """Ask the card for all that it has; repeating is safe.

        Raises:
            CardLostError, CardDistrustedError, CardError
        """

    def watch(self, changed: Callable[[CardNews], None]) -> None:
        """Connect, and call `changed` from a thread of its own; it must not block or ask."""

    def trust(self) -> None:
        """Forget what it said, and believe it anew: an operator's word. Connects again."""

    def close(self) -> None:
        """End the link; safe to repeat."""


class CardSlices(Protocol):
    """Slices of one card. What it answers has been checked against all it said before.

    Raises (all calls):
        CardLostError: whether it happened is not known; a promise ends by itself.
        CardDistrustedError, CardError
    """

    def reserve(
        self, spec: SliceSpec, *, request: str, holder: str = "", reclaim: bool = True,
        change: SliceId | None = None,
    ) -> Reservation | Slice | Refusal:  # fmt: skip
        """Promise a slice, or other amounts of one; repeating with the same request is safe.

        Returns:
            The promise; the slice where that request was committed before.
        """

    def commit(self, promise: Reservation) -> Slice | Refusal:
        """Make a promise true."""

    def withdraw(self, request: str) -> None:
        """See to it that nothing is there of this request: no promise, no slice; repeating is safe.

        Raises:
            RefusedError: the card keeps it.
        """

    def assign(self, name: SliceId, holder: str) -> Refusal | None:
        """Give a slice to a holder, or (empty) take it back; repeating is safe."""

    def release(self, name: SliceId) -> Refusal | None:
        """End a slice."""


class CardImages(Protocol):
    """Programs slices of one card."""

    def program(
        self, name: SliceId, image: SignedImage, context: StepContext, *, deadline_s: float
    ) -> Refusal | None:
        """Load an image; returns when the slice can do what it is for, or runs what it ran before.

        Raises:
            CardLostError, CardDistrustedError, CardError
            StepCancelledError: before all bytes were there; the card drops them.
        """


class CardArbiter(Protocol):
    """A card that decides about CPU and memory of this host (*carded* mode); repeating is safe.

    Raises (all calls):
        CardLostError, CardDistrustedError, CardError
    """

    def show(self, snapshot: HostSnapshot, *, deadline_s: float) -> None:
        """Have it know this host as it is now."""

    def propose(
        self, snapshot: HostSnapshot, request: Request, caps: Mapping[GuestId, Amounts], *,
        deadline_s: float,
    ) -> Proposal | Refusal:  # fmt: skip
        """Ask it to decide. What it proposes is unchecked."""

    def measured(self, readings: Mapping[str, Mapping[str, int]], *, deadline_s: float) -> None:
        """Tell it figures of the host and its guests, by subject."""

    def report(self, request: RequestId, course: Course, detail: str, *, deadline_s: float) -> None:
        """Tell it what became of a request that it decided."""


class Card(CardLink, CardSlices, CardImages, CardArbiter, Protocol):
    """All that a card does for this host."""


class Cards(Protocol):
    """All offload cards of the configuration; links are made in the background."""

    @property
    def host(self) -> str:
        """Who this host is to cards, by its certificate; the keys of its requests begin with it."""

    def views(self) -> Mapping[AdapterId, CardView]:
        """Each card as last told of; never waits."""

    def reach(self, serial: str) -> Card:
        """A card that can be asked; one that has still to be met is waited for, a few seconds.

        Raises:
            CardLostError, CardDistrustedError: it cannot be.
            CardError: no such card.
        """

    def find(self, serial: str) -> Card | None:
        """A card however it is; None where the configuration has no such card."""

    def follow(self, changed: Callable[[CardNews], None]) -> None:
        """Call `changed` with all news so far, and from then on; it must not block or ask."""

    def close(self) -> None:
        """End all links; safe to repeat."""


class GuestReader(Protocol):
    """Reads guests; repeating is safe. May block while a hook of the same guest runs."""

    def read_guests(self) -> dict[GuestId, GuestState]:
        """All guests that libvirt knows. Blocks while any guest's hook runs."""

    def read_guest(self, guest: GuestId) -> GuestState | None:
        """One guest through a handle already held where possible; None when it is gone."""


class PolicyWriter(Protocol):
    """Writes policy metadata; repeating is safe. Never touches anything else of the CONFIG."""

    def write_policy(self, guest: GuestId, policy: GuestPolicy | None) -> None:
        """Set the policy in the live and the persistent definition, None removes it.

        Raises:
            GuestGoneError, HypervisorError
        """


@dataclass(frozen=True, slots=True)
class Definitions:
    """A guest's two definitions, as libvirt prints them.

    Attributes:
        live: of the running guest; None where it does not run.
        persistent: what it starts with next, secrets included; None for a transient guest.
    """

    live: str | None
    persistent: str | None


class DefinitionEditor(Protocol):
    """Reads definitions and replaces the persistent one, for what an operator asks explicitly.

    Whatever else changes a definition has a role of its own; nothing automatic uses this one.
    """

    def read_definitions(self, guest: GuestId) -> Definitions:
        """Both; repeating is safe. Never to be logged or shown: there are secrets in it.

        Raises:
            GuestGoneError, HypervisorGoneError, HypervisorError
        """

    def replace_definition(self, guest: GuestId, before: str, after: str) -> None:
        """Make `after` the persistent definition of a guest that has `before`.

        The running guest stays as it is. What libvirt made of it, reading again shows.

        Raises:
            StaleDefinitionError: somebody changed it meanwhile; nothing was done.
            GuestGoneError, HypervisorGoneError, HypervisorError
        """


class EventKind(StrEnum):
    """What happened beside us."""

    STARTED = "started"
    STOPPED = "stopped"
    DEFINED = "defined"
    UNDEFINED = "undefined"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    TUNABLE = "tunable"
    METADATA = "metadata"
    MEMORY = "memory"
    VCPUS = "vcpus"
    DEVICE_REMOVED = "device-removed"
    JOB = "job"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"


@dataclass(frozen=True, slots=True)
class Event:
    """A libvirt event, translated. `guest` is None for events of the connection."""

    kind: EventKind
    guest: GuestId | None = None
    name: str = ""
    detail: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


class EventSource(Protocol):
    """Delivers events in its own thread; the callback must not block or call libvirt."""

    def start(self, deliver: Callable[[Event], None]) -> None:
        """Begin delivering; reconnects by itself and says so with CONNECTED (resync then)."""

    def close(self) -> None:
        """Stop and join the thread; safe to repeat."""


class StepContext(Protocol):
    """What a handler may ask for while it works on a step."""

    @property
    def cancelled(self) -> threading.Event:
        """Set when the caller gave up; a waiting handler raises StepCancelledError."""

    def progress(self, fraction: float, text: str) -> None:
        """Report 0..1 of this step to the caller."""


class StepHandler(Protocol):
    """Carries out one type of step. `before`/`after` are absolute, so repeating is safe."""

    kind: str

    def apply(self, step: Step, context: StepContext) -> None:
        """Bring about `step.after`; returns when libvirt and guest have followed.

        Raises:
            ShortfallError: the guest stopped short at `reached`; the request made to it is
                brought to what was reached, so that nothing more moves by itself.
            StepCancelledError, GuestGoneError, HypervisorError
        """

    def verify(self, step: Step) -> None:
        """Check against the kernel (affinity, cgroup files) or live state; not against ourselves.

        Raises:
            VerificationError: names what was expected and what was found.
            GuestGoneError, HypervisorError
        """

    def undo(self, step: Step) -> int:
        """Restore entitlement to `step.before` at once; a vanished guest counts as undone.

        Returns:
            What the guest has not given back yet (bytes or vCPUs): a residue; 0 when complete.

        Raises:
            HypervisorError: it could not be restored; the journal keeps it for the next start.
        """


class Handlers(Protocol):
    """The registry of step handlers."""

    def for_step(self, step: Step) -> StepHandler:
        """The one handler of this step's type.

        Raises:
            InvalidValueError: no handler for the type.
        """


class StepState(StrEnum):
    """How far a journalled step has come."""

    PLANNED = "planned"
    APPLYING = "applying"
    APPLIED = "applied"
    VERIFIED = "verified"
    UNDONE = "undone"
    SKIPPED = "skipped"


class TransactionState(StrEnum):
    """How far a journalled transaction has come."""

    OPEN = "open"
    COMMITTED = "committed"
    UNDONE = "undone"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class JournalledStep:
    """A step and how far it has come; `index` counts from 0 within the transaction."""

    index: int
    step: Step
    state: StepState


@dataclass(frozen=True, slots=True)
class JournalledTransaction:
    """A transaction as the journal has it; `body` is request, decision and offers as JSON."""

    id: TransactionId
    state: TransactionState
    created: float
    body: Mapping[str, Any]
    steps: tuple[JournalledStep, ...]
    outcome: Mapping[str, Any] | None = None


class Journal(Protocol):
    """The durable record; every call that returns has been fsynced.

    Raises (all calls):
        JournalError: disk full or I/O error; nothing of the call has happened.
    """

    def begin(self, txn: TransactionId, body: Mapping[str, Any], at: float) -> None:
        """Open a transaction."""

    def extend(self, txn: TransactionId, steps: Sequence[Step]) -> int:
        """Append steps as PLANNED; returns the index of the first."""

    def mark(self, txn: TransactionId, index: int, state: StepState) -> None:
        """Move one step on."""

    def close(
        self,
        txn: TransactionId,
        state: TransactionState,
        outcome: Mapping[str, Any],
        books: Books | None,
    ) -> None:
        """End a transaction and, in the same fsync, store the books it leads to."""

    def open_transactions(self) -> tuple[JournalledTransaction, ...]:
        """What a crash left open, oldest first."""

    def transaction(self, txn: TransactionId) -> JournalledTransaction | None:
        """One transaction, open or ended."""

    def store_books(self, books: Books) -> None:
        """Store the books outside a transaction (a guest stopped, a lease was edited)."""

    def load_books(self) -> Books:
        """The books as last stored.

        Raises:
            JournalCorruptError
        """


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One link of the chain. `kind` is dotted (`request.granted`); `subjects`: ids to find by."""

    sequence: int
    at: float
    kind: str
    subjects: tuple[str, ...]
    body: Mapping[str, Any]
    mac: str


@dataclass(frozen=True, slots=True)
class ChainVerdict:
    """Result of checking the chain; `problem` is empty when it is whole."""

    records: int
    head: str
    problem: str = ""


class AuditLog(Protocol):
    """Append-only, HMAC-chained under a root-only key; safe from several threads."""

    def append(self, kind: str, subjects: Iterable[str], body: Mapping[str, Any]) -> AuditRecord:
        """Add a record (fsynced) and export the new head to the system log."""

    def read(
        self, *, since: float | None = None, subject: str | None = None, limit: int = 10_000
    ) -> tuple[AuditRecord, ...]:
        """Records in order, of one subject and from a time on if given."""

    def verify(self, head: str | None = None) -> ChainVerdict:
        """Check every record, and that the chain still contains `head` (exported earlier)."""


class HostLoad(Protocol):
    """The host's own load, for telemetry."""

    def sample(self) -> Mapping[str, float]:
        """`cpu_percent`, `memory_available`, `agent_rss`, `agent_cpu_percent`."""


class GuestStats(Protocol):
    """Cheap statistics of all running guests (only the groups that are needed)."""

    def sample(self) -> Mapping[GuestId, Mapping[str, int]]:
        """By guest: `balloon.current` and such, in libvirt's names, KiB turned into bytes."""

    def read_report(self, guest: GuestId) -> MemoryReport | None:
        """What one running guest told of its memory; None where it tells nothing, or not lately.

        Does not wait for hooks of other guests.

        Raises:
            GuestGoneError, HypervisorGoneError, HypervisorError
        """
