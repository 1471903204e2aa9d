"""libvirt for real: the one room that imports `libvirt`.

`open_libvirt` is its door; nothing else of the agent needs more than what it returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.adapters.cgroups import Cgroups
from virtfabric.adapters.cxl.handlers import cxl_handlers
from virtfabric.adapters.hugepages.handler import huge_page_handlers
from virtfabric.adapters.libvirt.connection import LibvirtConnection
from virtfabric.adapters.libvirt.definitions import LibvirtDefinitions
from virtfabric.adapters.libvirt.events import LibvirtEvents
from virtfabric.adapters.libvirt.handler import Surroundings
from virtfabric.adapters.libvirt.handlers import libvirt_handlers
from virtfabric.adapters.libvirt.memlock import LockedMemory
from virtfabric.adapters.libvirt.policywriter import LibvirtPolicyWriter
from virtfabric.adapters.libvirt.processes import QemuProcesses
from virtfabric.adapters.libvirt.reader import LibvirtGuests, LibvirtHost
from virtfabric.adapters.libvirt.stats import LibvirtStats
from virtfabric.adapters.libvirt.waiting import Pulse
from virtfabric.adapters.pci.functionfiles import FunctionFiles
from virtfabric.adapters.pci.handlers import pci_handlers
from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.adapters.pci.inventory import CurrentUses
from virtfabric.adapters.pci.vfs import VfPools
from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.adapters.sysfs import Sysfs

if TYPE_CHECKING:
    from virtfabric.ports import Handlers

__all__ = ["LibvirtAdapters", "open_libvirt"]


@dataclass(frozen=True, slots=True)
class LibvirtAdapters:
    """Every role that libvirt plays, over one connection (and one more for events).

    The PCI functions and CXL memory of its host come along, as its guests get them.
    """

    connection: LibvirtConnection
    guests: LibvirtGuests
    host: LibvirtHost
    events: LibvirtEvents
    policy: LibvirtPolicyWriter
    definitions: LibvirtDefinitions
    handlers: Handlers
    stats: LibvirtStats
    vfs: VfPools

    @property
    def version(self) -> str:
        """Of libvirt's daemon, like `9.0.0`.

        Raises:
            HypervisorGoneError
        """
        with self.connection.calls() as raw:
            number = int(raw.getLibVersion())
        return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"

    def close(self) -> None:
        """Stop events and close the connections; safe to repeat."""
        self.events.close()
        self.connection.close()


def open_libvirt(
    uri: str = "qemu:///system",
    *,
    run_root: Path = Path("/run"),
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    cgroup: Path = Path("/sys/fs/cgroup"),
) -> LibvirtAdapters:
    """Wire the adapters; libvirtd is first spoken to by the first call.

    Args:
        uri: the libvirtd to serve.
        run_root: where its `libvirt/qemu/NAME.pid` are.
        proc: the kernel's view of the processes, in libvirtd's PID namespace.
        sys: the same host's sysfs.
        cgroup: where its control groups are mounted.
    """
    connection = LibvirtConnection(uri)
    processes = QemuProcesses(run_root, proc)
    cgroups, sysfs, pulse = Cgroups(cgroup, proc), Sysfs(sys, proc), Pulse()
    functions = FunctionFiles(sys)
    around = Surroundings(
        connection, processes, cgroups, sysfs, pulse, functions, VfioHolders(functions, proc),
        LockedMemory(run_root, proc), proc,
    )  # fmt: skip
    return LibvirtAdapters(
        connection=connection,
        guests=LibvirtGuests(connection, processes, cgroups),
        host=LibvirtHost(connection, sysfs),
        events=LibvirtEvents(uri, also=pulse.hear),
        policy=LibvirtPolicyWriter(connection),
        definitions=LibvirtDefinitions(connection),
        handlers=HandlerRegistry(
            (
                *libvirt_handlers(around),
                *pci_handlers(sys, proc),
                *cxl_handlers(sys, proc),
                *huge_page_handlers(sys, proc),
            )
        ),
        stats=LibvirtStats(connection),
        vfs=VfPools(functions, CurrentUses(sys, proc)),
    )
