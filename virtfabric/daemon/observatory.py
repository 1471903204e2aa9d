"""What the agent knows of the host: a cache kept true by events and by reading again.

Guests, PCIe functions, and the topology as `hostwatch` read it last.

Readers get immutable values and never wait for libvirt; `refresh*` reads, in the caller's
(worker) thread.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtfabric.daemon.glance import Glance
from virtfabric.model.device import DeviceInventory, Link
from virtfabric.model.devicesteps import SetUpVf
from virtfabric.model.guest import RunState
from virtfabric.model.ledger import HostSnapshot
from virtfabric.policy.badges import join_slices
from virtfabric.policy.pools import is_set_up, members

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from virtfabric.daemon.ledger import Ledger
    from virtfabric.model.device import DevicePool, PciAddress, PciFunction
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import Capacity, HostTopology
    from virtfabric.model.ids import GuestId, TransactionId
    from virtfabric.model.plan import Plan
    from virtfabric.ports import Cards, Clock, DeviceTree, GuestReader, PageTree

GLANCE_S: Final = 5.0
"""How long somebody who asks waits for a fresh look at functions; a client gives up after 25."""


_LOOKS: Final = 8
"""Looks at functions that are remembered; more than can have begun since anybody asked."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What somebody saw of functions, or wants to see: None is all.

    Attributes:
        at: when it began, or was asked for.
        functions: read anew.
        settings: VFs whose settings were read anew.
    """

    at: float
    functions: frozenset[PciAddress] | None
    settings: frozenset[PciAddress] | None

    def serves(self, asked: _Look) -> bool:
        """Whether it saw all that was asked for, and later than it was."""
        return (
            self.at > asked.at
            and _covers(self.functions, asked.functions)
            and _covers(self.settings, asked.settings)
        )


def _covers(seen: frozenset[PciAddress] | None, asked: frozenset[PciAddress] | None) -> bool:
    return seen is None or (asked is not None and asked <= seen)


def _structure(guest: GuestState) -> GuestState:
    """The part of a guest that decisions depend on: a balloon event is telemetry."""
    return replace(guest, memory_current=guest.boot_memory, virtio_mem=(), job=None)


def _decide_otherwise(known: GuestState | None, found: GuestState | None) -> bool:
    """Whether decisions come out otherwise; most looks find a guest as it was."""
    if known == found or known is None or found is None:
        return known != found
    return _structure(known) != _structure(found)


def _are_same(
    known: Mapping[PciAddress, PciFunction], found: Mapping[PciAddress, PciFunction]
) -> bool:
    """Whether decisions come out the same: how fast a link runs is telemetry."""
    return known.keys() == found.keys() and all(
        found[a] == f or replace(found[a], link=Link()) == replace(f, link=Link())
        for a, f in known.items()
    )


class Observatory:
    """The last known state of every guest and PCIe function, and of the host's topology."""

    def __init__(
        self,
        reader: GuestReader,
        tree: DeviceTree,
        ledger: Ledger,
        topology: HostTopology,
        capacity: Capacity,
        pools: tuple[DevicePool, ...],
        pages: PageTree,
        *,
        clock: Clock,
        lend_ballooned: bool,
        cards: Cards | None = None,
    ) -> None:
        self._reader = reader
        self._tree = tree
        self._ledger = ledger
        self._lock = threading.Lock()
        self._guests: dict[GuestId, GuestState] = {}
        self._topology = topology
        self._capacity = capacity
        self._devices = DeviceInventory(pools=pools)
        self._reading_devices = threading.Lock()
        self._clock = clock
        self._looks: deque[_Look] = deque(maxlen=_LOOKS)
        self._glance = Glance(clock)
        self._lend_ballooned = lend_ballooned
        self._pages = pages
        self._cards = cards

    @property
    def topology(self) -> HostTopology:
        """The host as last read."""
        return self._topology

    @property
    def capacity(self) -> Capacity:
        """What may be granted."""
        return self._capacity

    @property
    def devices(self) -> DeviceInventory:
        """Every PCIe function as last read, what it is of a card, and the pools."""
        with self._lock:
            devices = self._devices
        return join_slices(devices, self._cards.views()) if self._cards else devices

    def reconfigure(
        self,
        topology: HostTopology,
        capacity: Capacity,
        pools: tuple[DevicePool, ...],
        *,
        lend_ballooned: bool,
    ) -> None:
        """Take over a new configuration; open offers become stale."""
        with self._lock:
            self._topology, self._capacity = topology, capacity
            self._devices = DeviceInventory(self._devices.functions, pools)
            self._lend_ballooned = lend_ballooned
        self._ledger.touch()

    def follow_host(self, topology: HostTopology, capacity: Capacity) -> None:
        """The host is another than it was: open offers become stale."""
        with self._lock:
            self._topology, self._capacity = topology, capacity
        self._ledger.touch()

    def refresh_devices(
        self,
        only: Collection[PciAddress] | None = None,
        settings: Collection[PciAddress] | None = None,
        *,
        since: float | None = None,
    ) -> None:
        """Read every PCIe function again, or `only` these and those that decide on them.

        Who reads later stores later, so that an older look never replaces a newer one. A look that
        somebody else made serves as well, if it began after this was asked for.

        Args:
            only: see `DeviceTree.read_functions`.
            settings: VFs whose settings are read again; None for those of `only`.
            since: monotonic seconds: a look that began later is new enough. None: this moment.
        """
        functions = None if only is None else frozenset(only)
        asked = _Look(
            self._clock.monotonic() if since is None else since,
            functions,
            functions if settings is None else frozenset(settings),
        )
        with self._reading_devices:
            if not any(look.serves(asked) for look in self._looks):
                self._look(replace(asked, at=self._clock.monotonic()))

    def _look(self, look: _Look) -> None:
        functions = self._tree.read_functions(look.functions, look.settings)
        with self._lock:
            known, pools = self._devices.functions, self._devices.pools
            self._devices = DeviceInventory(functions, pools)
        self._looks.append(look)
        if not _are_same(known, functions):
            self._ledger.touch()

    def glance_at_devices(self, capabilities: Collection[str] | None = None) -> None:
        """As `refresh_devices`, for a caller who rather has what was seen last than wait long.

        Args:
            capabilities: settings of VFs with others will do as they were read last.
        """
        inventory, asked = self.devices, self._clock.monotonic()
        vfs: list[PciAddress] | None = None
        if capabilities is not None:
            pooled = [one.address for c in capabilities for one in members(inventory, c)]
            vfs = [address for address in pooled if is_set_up(inventory, address)]
        self._glance.within(GLANCE_S, lambda: self.refresh_devices(settings=vfs, since=asked))

    def refresh_devices_of(self, plan: Plan) -> None:
        """As `refresh_devices`, of the functions that a plan works on."""
        inventory = self.devices
        pooled = {address for address in plan.addresses if is_set_up(inventory, address)}
        steps = {step.address for step in plan.steps if isinstance(step, SetUpVf)}
        self.refresh_devices(plan.addresses, pooled | steps)

    @property
    def guests(self) -> dict[GuestId, GuestState]:
        """Every guest as last read, by UUID."""
        with self._lock:
            return dict(self._guests)

    def guest(self, guest: GuestId) -> GuestState | None:
        """One guest as last read."""
        with self._lock:
            return self._guests.get(guest)

    def name_of(self, guest: GuestId) -> str:
        """A guest's name, as last read; its id where it is gone."""
        found = self.guest(guest)
        return found.name if found else guest

    def find(self, name: str) -> GuestState | None:
        """A guest by name or UUID, as last read."""
        with self._lock:
            for guest in self._guests.values():
                if name in (guest.name, guest.uuid):
                    return guest
        return None

    def refresh_all(self) -> None:
        """Read every guest. Blocks while any guest's hook runs.

        Raises:
            HypervisorGoneError, HypervisorError
        """
        guests = self._reader.read_guests()
        with self._lock:
            changed = self._guests.keys() != guests.keys() or any(
                _decide_otherwise(self._guests[g], s) for g, s in guests.items()
            )
            self._guests = dict(guests)
        if changed:
            self._ledger.touch()

    def refresh(self, guests: Iterable[GuestId]) -> bool:
        """Read some guests again; returns whether any was not as we thought.

        Raises:
            HypervisorGoneError, HypervisorError
        """
        changed = False
        for guest in guests:
            changed |= self._read(guest)[0]
        return changed

    def confirm(self, snapshot: HostSnapshot, guests: Collection[GuestId]) -> bool:
        """Read some guests again; returns whether all are as the snapshot has them.

        What is compared is what this call reads: others read and store side by side with it.

        Raises:
            HypervisorGoneError, HypervisorError
        """
        return {g: self._read(g)[1] for g in guests} == {g: snapshot.guests.get(g) for g in guests}

    def _read(self, guest: GuestId) -> tuple[bool, GuestState | None]:
        """Whether it was not as we thought, and how it is."""
        state = self._reader.read_guest(guest)
        with self._lock:
            known = self._guests.get(guest)
            if state is None:
                self._guests.pop(guest, None)
            else:
                self._guests[guest] = state
        if _decide_otherwise(known, state):
            self._ledger.touch()
        return known != state, state

    def refresh_jobs(self) -> None:
        """Read the guests again that had a job when they were last read.

        libvirt sends no event when a job begins, and none when a memory-only dump ends (9.0).

        Raises:
            HypervisorGoneError, HypervisorError
        """
        self.refresh([g.uuid for g in self.guests.values() if g.job is not None])

    def mark_stopped(self, guest: GuestId) -> None:
        """A guest has stopped (its hook or event says so): known without asking libvirt."""
        with self._lock:
            known = self._guests.get(guest)
            if known is None or not known.active:
                return
            if known.persistent:
                self._guests[guest] = replace(
                    known,
                    state=RunState.SHUTOFF,
                    pid=None,
                    vcpu_threads={},
                    vcpu_affinity={},
                    job=None,
                )
            else:
                del self._guests[guest]
        self._ledger.touch()

    def snapshot(self, without: TransactionId | None = None) -> HostSnapshot:
        """Host, guests and ledger in one immutable value; `without` ignores one's own reservation.

        The generation is read before the guests, so that a guest that changes in between makes
        the snapshot stale rather than wrong.
        """
        view = self._ledger.view(without)
        devices = self.devices
        return HostSnapshot(
            generation=view.generation,
            topology=self._topology,
            capacity=self._capacity,
            guests=self.guests,
            books=view.books,
            pending=view.pending,
            busy=view.busy,
            lend_ballooned=self._lend_ballooned,
            devices=devices,
            working=view.functions,
            cards=self._cards.views() if self._cards else {},
        )

    def look_at_pages(self, snapshot: HostSnapshot, *, always: bool = False) -> HostSnapshot:
        """The same with the huge pages of now, where a guest has any: free ones are telemetry."""
        if not always and not any(guest.on_huge_pages for guest in snapshot.guests.values()):
            return snapshot
        return replace(snapshot, pools=self._pages.read_pools())
