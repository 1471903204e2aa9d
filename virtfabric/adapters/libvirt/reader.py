"""Guests and host as they are now: `ports.GuestReader` and `ports.HostReader`.

Reads only. XML says most, the kernel says which vCPUs are there, and neither believes what this
agent did.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import libvirt

from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.parse import parse_xml
from virtfabric.model.errors import GuestGoneError, InvalidValueError
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState
from virtfabric.model.ids import GuestId, HostId
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from virtfabric.adapters.cgroups import Cgroups
    from virtfabric.adapters.libvirt.connection import LibvirtConnection
    from virtfabric.adapters.libvirt.processes import QemuProcesses
    from virtfabric.adapters.sysfs import Sysfs
    from virtfabric.model.host import HostTopology

log = logging.getLogger(__name__)

_HALTED: Final = frozenset({libvirt.VIR_DOMAIN_PAUSED_UNKNOWN, libvirt.VIR_DOMAIN_PAUSED_CRASHED})
"""QEMU stopped by itself, as vfio makes it do after a fatal AER error (`vm_stop` with
RUN_STATE_INTERNAL_ERROR, hw/vfio/pci.c); `virsh suspend` is PAUSED_USER."""
_PAUSED: Final = frozenset({libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED})
MIGRATION_IN: Final = "migration-in"
START: Final = "start"
_STARTING_UP: Final = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]
_OPERATIONS: Final[dict[int, str]] = {
    value: name.removeprefix("VIR_DOMAIN_JOB_OPERATION_").lower().replace("_", "-")
    for name, value in vars(libvirt).items()
    if name.startswith("VIR_DOMAIN_JOB_OPERATION_") and isinstance(value, int)
}


class LibvirtGuests:
    """Implements `ports.GuestReader`."""

    def __init__(
        self, connection: LibvirtConnection, processes: QemuProcesses, cgroups: Cgroups
    ) -> None:
        """Read through this connection."""
        self._connection = connection
        self._processes = processes
        self._cgroups = cgroups

    def read_guests(self) -> dict[GuestId, GuestState]:
        """All guests that libvirt knows. Blocks while any guest's hook runs.

        Raises:
            HypervisorGoneError, HypervisorError
        """
        with self._connection.calls() as raw:
            handles = {GuestId(dom.UUIDString()): dom for dom in raw.listAllDomains()}
        guests: dict[GuestId, GuestState] = {}
        for guest, handle in handles.items():
            self._connection.remember(guest, handle)
            state = self.read_guest(guest)
            if state is not None:
                guests[guest] = state
        return guests

    def read_guest(self, guest: GuestId) -> GuestState | None:
        """One guest; None when it is gone (or its XML is beyond us, which is logged)."""
        try:
            with self._connection.domain(guest) as dom:
                return self._read(dom)
        except GuestGoneError:
            self._connection.forget(guest)
            return None
        except InvalidValueError:
            log.exception("guest %s: libvirt's XML cannot be read", guest)
            return None

    def _read(self, dom: Any) -> GuestState:
        live = dom.XMLDesc(0)
        config = dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) if dom.isPersistent() else None
        state = parse_domain(live, config)
        if not state.active:
            return state
        return self._add_kernel_view(dom, state)

    def _add_kernel_view(self, dom: Any, state: GuestState) -> GuestState:
        pid = self._processes.find_pid(state.uuid, state.name)
        threads = {} if pid is None else self._processes.read_vcpu_threads(pid)
        default = next(iter(state.vcpu_affinity.values()), state.emulator_affinity)
        job = read_job(dom)
        shares = state.scheduler.shares
        run_state, reason = dom.state()
        return replace(
            state,
            state=RunState.PAUSED if run_state in _PAUSED else RunState.RUNNING,
            halted=run_state == libvirt.VIR_DOMAIN_PAUSED and reason in _HALTED,
            pid=pid,
            # After an unplug that QEMU finished late, libvirt may count the vCPU for ever (9.0
            # with QEMU 7.2 under TCG: no DEVICE_DELETED comes), so the threads are the measure.
            vcpus_online=len(threads) or state.vcpus_online,
            vcpus_boot=1 if pid is None else self._processes.read_boot_vcpus(pid),
            vcpu_threads=threads,
            vcpu_affinity={n: state.vcpu_affinity.get(n, default) for n in threads}
            or state.vcpu_affinity,
            scheduler=replace(
                state.scheduler,
                shares=None if shares is None else self._cgroups.to_shares(shares),
            ),
            memory_current=self._read_memory(dom, state, job),
            job=job,
        )

    def _read_memory(self, dom: Any, state: GuestState, job: str | None) -> Bytes:
        """Balloon: asked of QEMU, as the XML follows events that come at most once a second.

        Not while the guest starts or migrates in: the call would wait for that, 30 s at most
        (libvirt 9.0).
        """
        if state.mechanism is not MemoryMechanism.BALLOON or job in (START, MIGRATION_IN):
            return state.memory_current
        try:
            actual = dom.memoryStats().get("actual")
        except libvirt.libvirtError as error:
            log.debug("guest %s: no balloon statistics: %s", state.name, error)
            return state.memory_current
        return state.memory_current if actual is None else Bytes(actual << 10)


def read_job(dom: Any) -> str | None:
    """What libvirt is doing with a guest ("backup", "migration-out"), None when nothing.

    One whose QEMU is still being started is not asked: a start lets no other call beside it, and
    this one would wait for its end, 30 s at most, and fail then (seen with libvirt 11.3).
    """
    if dom.state() == _STARTING_UP:
        return START
    try:
        stats = dom.jobStats()
    except libvirt.libvirtError:
        # "migration statistics are available only on the source host" (libvirt 9.0)
        if dom.state() != [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION]:
            raise
        return MIGRATION_IN
    if stats.get("type", 0) == libvirt.VIR_DOMAIN_JOB_NONE:
        return None
    return _OPERATIONS.get(int(stats.get("operation", -1)), "unknown")


class LibvirtHost:
    """Implements `ports.HostReader`."""

    def __init__(self, connection: LibvirtConnection, sysfs: Sysfs) -> None:
        """The identity is libvirt's, the topology is the kernel's."""
        self._connection = connection
        self._sysfs = sysfs
        self._lock = threading.Lock()
        self._host_id: HostId | None = None

    def read_topology(self) -> HostTopology:
        """Nodes, pCPUs, memory of now.

        Raises:
            HypervisorGoneError, HypervisorError
        """
        return self._sysfs.read_topology(self._read_host_id())

    def read_known_nodes(self) -> frozenset[int]:
        """The cells of libvirt's capabilities.

        libnuma reads the nodes once, when libvirtd starts: a guest that names a later one is
        refused ("NUMA node 2 is unavailable").

        Raises:
            HypervisorGoneError, HypervisorError
        """
        with self._connection.calls() as raw:
            capabilities = parse_xml(raw.getCapabilities(), what="capabilities")
        cells = capabilities.findall("host/topology/cells/cell")
        return frozenset(int(cell.get("id", "0")) for cell in cells)

    def _read_host_id(self) -> HostId:
        # Asked once: the first call makes libvirt probe every emulator (about a second).
        with self._lock:
            if self._host_id is None:
                with self._connection.calls() as raw:
                    capabilities = parse_xml(raw.getCapabilities(), what="capabilities")
                self._host_id = HostId(capabilities.findtext("host/uuid") or "")
            return self._host_id
