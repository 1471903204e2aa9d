"""Keeps the topology and what may be granted as the host is, while NUMA nodes come and go.

A hot-plugged node counts as soon as the kernel has it online, without a reload; pCPUs are not
followed. It owns what is withheld for now: a node that libvirt does not know, one that is being
taken down.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.amounts import Tier
from virtfabric.model.errors import HypervisorError, VirtfabricError
from virtfabric.model.host import NumaNode
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import Capacity, HostTopology
    from virtfabric.ports import AuditLog, HostReader, Restarter

    CapacityOf = Callable[[HostTopology], Capacity]
    Quarantined = Callable[[], Mapping[int, str]]
    """Why nothing may be granted of CXL nodes whose memory is not to be trusted."""

log = logging.getLogger(__name__)
_CAPACITY: Final = "capacity"
_UNKNOWN: Final = "unknown nodes"
_RESTART: Final = "restart of libvirtd"
_UNKNOWN_NODE: Final = "libvirt does not know it: restart libvirtd (guests run on)"


class HostWatch:
    """Thread-safe. Looks only when it is told to: by events of the kernel, and every so often."""

    def __init__(
        self,
        *,
        host: HostReader,
        observatory: Observatory,
        ledger: Ledger,
        notices: Notices,
        audit: AuditLog,
        restarter: Restarter | None,
        capacity_of: CapacityOf,
        quarantined: Quarantined,
    ) -> None:
        """Nothing is read before a look."""
        self._host = host
        self._observatory = observatory
        self._ledger = ledger
        self._notices = notices
        self._audit = audit
        self._restarter = restarter
        self._capacity_of = capacity_of
        self._capacity = observatory.capacity
        self._lock = threading.Lock()
        self._known: frozenset[int] = frozenset()
        self._unknown: frozenset[int] = frozenset()
        self._restarted_for: frozenset[int] = frozenset()
        self._leaving: dict[int, str] = {}
        self._ask_quarantined = quarantined
        self._quarantined: Mapping[int, str] = {}

    def configure(self, capacity_of: CapacityOf, capacity: Capacity) -> None:
        """From now on this is what may be granted, and of the host as it is; a look must follow."""
        with self._lock:
            self._capacity_of, self._capacity = capacity_of, capacity

    def look(self) -> None:
        """Follow, and restart libvirtd where that is configured, needed, and in nobody's way.

        Raises:
            VirtfabricError: libvirt is away, or the disk is full; a later look does it.
        """
        self.follow()
        self._restart_if_free()

    def follow(self) -> None:
        """Read the topology; what has changed of it counts from now on.

        Raises:
            VirtfabricError: as for `look`.
        """
        with self._lock:
            try:
                topology = self._host.read_topology()
            except OSError as error:  # a node that goes while it is read
                log.warning("the topology cannot be read: %s", error)
                return
            unknown = self._find_unknown(topology)
            self._quarantined = self._ask_quarantined()
            topology = _with_cpus_of(self._observatory.topology, topology)
            topology = _with_orphans(topology, self._quarantined)
            self._resolve(topology)
            self._tell_unknown(unknown)
            guests = self._observatory.guests.values()
            self._take_over(_with_lost_nodes(topology, guests), self.bound(self._capacity))

    def _resolve(self, topology: HostTopology) -> None:
        try:
            self._capacity = self._capacity_of(topology)
        except VirtfabricError as error:
            text = f"what may be granted stays as it was before the host changed: {error}"
            self._notices.alert(_CAPACITY, text)
            left = {n: most for n, most in self._capacity.cxl.items() if n in topology.cxl_nodes}
            self._capacity = replace(self._capacity, cxl=left)
        else:
            self._notices.settle(_CAPACITY)

    def bound(self, capacity: Capacity) -> Capacity:
        """A capacity without what is withheld, as far as is known from the last look."""
        withheld = dict.fromkeys(self._unknown, _UNKNOWN_NODE) | self._leaving
        return capacity.without({**withheld, **self._quarantined})

    @contextmanager
    def withhold(self, nodes: Iterable[int], why: str) -> Iterator[None]:
        """Nothing is granted of these nodes meanwhile.

        Raises:
            VirtfabricError: as for `look`.
        """
        leaving = dict.fromkeys(nodes, why)
        with self._lock:
            self._leaving |= leaving
        try:
            self.follow()
            yield
        finally:
            with self._lock:
                self._leaving = {n: w for n, w in self._leaving.items() if n not in leaving}
            try:
                self.follow()
            except VirtfabricError as error:  # what became of the plan is what counts
                log.warning("the host cannot be read: %s; a later look does it", error)

    def _find_unknown(self, topology: HostTopology) -> frozenset[int]:
        """Nodes that came after libvirt started; only one without CPUs can have.

        The kernel keeps a node in its list, without memory, when all of that went offline.
        """
        nodes = topology.nodes.items()
        late = frozenset(n for n, node in nodes if node.memory_total and not node.cpus)
        self._known &= late  # one that went may be new to libvirt when it is back
        if late - self._known:
            self._known = self._host.read_known_nodes()
        return late - self._known

    def _tell_unknown(self, unknown: frozenset[int]) -> None:
        self._unknown = unknown
        self._restarted_for &= unknown
        if not unknown:
            self._notices.settle(_UNKNOWN)
            self._notices.settle(_RESTART)
            return
        self._notices.alert(
            _UNKNOWN,
            f"libvirt does not know NUMA node {CpuSet(unknown)}, which came after it started: "
            "nothing of it is granted, and a guest that names it is refused; restart libvirtd "
            "(systemctl restart libvirtd, or virtqemud): guests run on",
        )

    def _take_over(self, topology: HostTopology, capacity: Capacity) -> None:
        before, granted = self._observatory.topology, self._observatory.capacity
        if _structure(before) == _structure(topology) and granted == capacity:
            return
        self._observatory.follow_host(topology, capacity)
        nodes = {
            str(number): {
                "tier": node.tier.value, "total": int(node.memory_total),
                "grantable": int(capacity.memory.get(number, capacity.cxl.get(number, Bytes(0)))),
            }
            for number, node in sorted(topology.nodes.items())
        }  # fmt: skip
        withheld = {str(number): why for number, why in capacity.withheld.items()}
        body = {"nodes": nodes, "withheld": withheld}
        log.info("the host has changed: nodes %s", CpuSet(topology.nodes))
        self._audit.append("host.changed", [], body)
        self._notices.publish("host.changed", body)

    def _restart_if_free(self) -> None:
        """Once for the same nodes: what one restart does not mend, ten do not."""
        with self._lock:
            wanted = self._unknown - self._restarted_for
            if self._restarter is None or not wanted:
                return
            in_the_way = self._find_work()
            if in_the_way:
                log.warning("libvirtd is not restarted yet: %s", in_the_way)
                return
            self._restarted_for = self._unknown
            self._audit.append("libvirt.restarted", [], {"for_nodes": sorted(wanted)})
            try:
                self._restarter.restart()
            except HypervisorError as error:
                self._notices.alert(_RESTART, f"libvirtd could not be restarted: {error}")

    def _find_work(self) -> str:
        """What a restart of libvirtd would cut off: a plan of ours, a guest's job."""
        if self._ledger.view().busy:
            return "a plan is being carried out"
        self._observatory.refresh_all()
        for guest in self._observatory.guests.values():
            if guest.job is not None:
                return f"{guest.name} has a job running: {guest.job}"
        return ""


def _with_cpus_of(known: HostTopology, found: HostTopology) -> HostTopology:
    """Memory as found, pCPUs as known: guests are pinned by these, so a reload changes them."""
    nodes = {}
    for number, node in found.nodes.items():
        before = known.nodes.get(number)
        cpus = before.cpus if before else CpuSet(node.cpus & known.cpus)
        nodes[number] = replace(node, cpus=cpus)
    return replace(found, nodes=nodes, pcpus=known.pcpus)


def _with_orphans(topology: HostTopology, quarantined: Mapping[int, str]) -> HostTopology:
    """A CXL node in quarantine stays one when its region is gone: it must not pass for DRAM."""
    why = "nothing answers for its memory any more"
    orphans = {
        n: replace(node, tier=Tier.CXL, offlinable=False, why_not_offlinable=why)
        for n, node in topology.nodes.items()
        if n in quarantined and node.tier is not Tier.CXL and not node.cpus
    }
    return replace(topology, nodes=topology.nodes | orphans) if orphans else topology


def _with_lost_nodes(topology: HostTopology, guests: Iterable[GuestState]) -> HostTopology:
    """With nodes that are gone and that memory devices of running guests still name.

    They are of tier CXL, without memory: such a device, empty as it is, must not be taken for one
    that DRAM could be plugged into.
    """
    named = {n for g in guests if g.active for d in g.virtio_mem for n in d.host_nodes}
    there = {n for n, node in topology.nodes.items() if node.memory_total or node.cpus}
    nothing = Bytes(0)
    lost = {
        n: NumaNode(
            n, CpuSet(), nothing, nothing, tier=Tier.CXL, why_not_offlinable="it is gone"
        )
        for n in sorted(named - there)
    }  # fmt: skip
    return replace(topology, nodes=topology.nodes | lost)


def _structure(topology: HostTopology) -> HostTopology:
    """The part of the host that decisions depend on: what is free is telemetry."""
    nodes = {
        number: replace(node, memory_free=Bytes(0), huge_pages=(), distances={})
        for number, node in topology.nodes.items()
    }
    return replace(topology, nodes=nodes)
