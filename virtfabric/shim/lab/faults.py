"""Faults by name: what breaks, how it is done to a lab, and what the host inside sees.

Owns the list. A fault is done for real: to the emulated hardware through QMP, to the host through a
command in it. Nothing here undoes a fault; where a host gets over it is said with it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.shim.lab.monitor import execute, execute_human
from virtfabric.shim.lab.place import LabError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.shim.lab.place import Place
    from virtfabric.shim.lab.remote import Remote
    from virtfabric.shim.topology.model import Topology


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a fault happens."""

    place: Place
    topology: Topology
    remote: Remote

    def run(self, command: str) -> str:
        """A shell command in the lab; returns what it printed.

        Raises:
            LabError: it failed.
        """
        done = self.remote.run(command, timeout_s=120)
        if done.returncode:
            text = (done.stderr or done.stdout).strip()
            raise LabError(f"lab {self.place.name}: {text or f'`{command}` failed'}")
        return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that can be injected.

    Attributes:
        does: what breaks.
        seen: what the host in the lab sees of it.
        target: what it may be aimed at, for people; "" for nothing.
        choose: the targets a topology has for it, by their ids, the default first.
        inject: does it and returns a line that says what was done.
    """

    name: str
    does: str
    seen: str
    target: str
    choose: Callable[[Topology], tuple[str, ...]]
    inject: Callable[[Scene, str], str]


def find_fault(name: str) -> Fault:
    """The fault by that name.

    Raises:
        InvalidValueError: there is none.
    """
    if name not in FAULTS:
        raise InvalidValueError(
            "fault", name, "is not one", advice=f"there are {', '.join(FAULTS)}"
        )
    return FAULTS[name]


def inject_fault(fault: Fault, scene: Scene, target: str | None) -> str:
    """Do it.

    Args:
        fault: what to do.
        scene: where.
        target: one of the topology's ids, or free text where the fault says so; None for its
            default.

    Raises:
        InvalidValueError: the topology has nothing that it could be done to, or not this.
        LabError: QEMU or the lab refused.
    """
    known = fault.choose(scene.topology)
    if not known:
        raise InvalidValueError(
            "fault", fault.name, f"needs a {fault.target}, and this topology has none"
        )  # fmt: skip
    if target is None:
        target = known[0]
    elif not fault.target:
        raise InvalidValueError(
            "--target", target, f"is too much: {fault.name} takes none", advice="leave it out"
        )
    elif target not in known and fault.name not in _FREE_TARGETS:
        advice = f"it has {', '.join(known)}"
        raise InvalidValueError(
            "--target", target, f"is no {fault.target} of this lab", advice=advice
        )
    return fault.inject(scene, target)


def _anywhere(_: Topology) -> tuple[str, ...]:
    return ("",)


def _functions(topology: Topology) -> tuple[str, ...]:
    nics = tuple(one.id for one in topology.igb)
    return (*nics, *(one.id for one in topology.nvme), *(one.id for one in topology.edu))


def _aer_ports(topology: Topology) -> tuple[str, ...]:
    """Root ports with something behind: an error at an empty one is of no interest."""
    taken = tuple(dict.fromkeys(topology.occupied_ports()))
    return taken or tuple(port.id for port in topology.ports)


def _memdevs(topology: Topology) -> tuple[str, ...]:
    return tuple(device.id for device in topology.cxl.devices) if topology.cxl else ()


def _removable(topology: Topology) -> tuple[str, ...]:
    return (*_functions(topology), *_memdevs(topology))


def _hanging(topology: Topology) -> tuple[str, ...]:
    nvme = tuple(one.id for one in topology.nvme)
    return (*nvme, *(one for one in _functions(topology) if one not in nvme))


def _nodes(topology: Topology) -> tuple[str, ...]:
    return tuple(str(node.id) for node in topology.nodes) or ("0",)


# -- what is done -------------------------------------------------------------------------------


def _inject_aer(error: str) -> Callable[[Scene, str], str]:
    def inject(scene: Scene, port: str) -> str:
        said = execute_human(scene.place, f"pcie_aer_inject_error {port} {error}")
        if not said.startswith("OK"):
            raise LabError(f"lab {scene.place.name}: {said.strip() or 'QEMU did not inject it'}")
        return said.strip()

    return inject


def _poison(scene: Scene, memdev: str) -> str:
    path = f"/machine/peripheral/{memdev}"
    execute(scene.place, "cxl-inject-poison", path=path, start=0, length=64)
    return f"64 bytes at the beginning of {memdev} are poisoned"


def _remove(scene: Scene, device: str) -> str:
    execute(scene.place, "device_del", id=device)
    return f"{device} is being taken out of its slot"


def _hang(scene: Scene, device: str) -> str:
    # Not by holding up an NVMe's disk: the driver's reset then waits in QEMU's main loop, and the
    # whole lab stands still with it (measured, QEMU 10.0).
    address = _find_address(scene, device)
    return scene.run(f'setpci -s {address} COMMAND=0:4 && echo "{device} ({address}) has no DMA"')


def _find_address(scene: Scene, device: str) -> str:
    """Where the lab's kernel has a function, as bus:slot.function."""
    waiting = [bus["devices"] for bus in execute(scene.place, "query-pci")]
    while waiting:
        for found in waiting.pop():
            if found["qdev_id"] == device:
                return f"{found['bus']:02x}:{found['slot']:02x}.{found['function']}"
            waiting.append(found.get("pci_bridge", {}).get("devices", []))
    raise LabError(f"lab {scene.place.name}: {device} is not plugged in")


def _crash_libvirtd(scene: Scene, _: str) -> str:
    return scene.run('kill -SEGV "$(pidof libvirtd)" && echo "libvirtd was sent SIGSEGV"')


def _kill_agent(scene: Scene, _: str) -> str:
    # the brackets: the shell that runs this has the pattern among its arguments, and is no agent
    return scene.run(
        'pids=$(pgrep -f "[v]irtfabric.cli.agentd") || '
        '{ echo "no virtfabricd runs" >&2; exit 1; }; '
        'kill -KILL $pids && echo "virtfabricd was sent SIGKILL"'
    )


def _panic_guest(scene: Scene, guest: str) -> str:
    name = shlex.quote(guest) if guest else '"$(virsh -q list --name | head -n 1)"'
    return scene.run(
        f'name={name}; virsh inject-nmi "$name" > /dev/null && echo "NMI sent to $name"'
    )


def _press_memory(scene: Scene, node: str) -> str:
    return scene.run(f"/opt/virtfabric/lab/press-memory {int(node)} 64")


def _jump_clock(scene: Scene, seconds: str) -> str:
    try:
        distance = int(seconds or "3600")
    except ValueError as error:
        raise InvalidValueError("--target", seconds, "is not a number of seconds") from error
    return scene.run(f'date -s "@$(( $(date +%s) + {distance} ))" > /dev/null && date')


_FREE_TARGETS: Final = frozenset({"guest-panic", "clock-jump"})

FAULTS: Final = {
    fault.name: fault
    for fault in (
        Fault(
            "aer-correctable", "a correctable PCIe error (receiver error) at a root port",
            "AER logs it and counts it in aer_dev_correctable; nothing stops",
            "root port", _aer_ports, _inject_aer("RCVR"),
        ),
        Fault(
            "aer-fatal", "a fatal PCIe error (data link protocol) at a root port",
            "AER resets the link and calls the drivers' error handlers; a guest that holds a "
            "function behind the port is paused by QEMU",
            "root port", _aer_ports, _inject_aer("DLP"),
        ),
        Fault(
            "cxl-poison", "64 poisoned bytes in a CXL memory device",
            "`cxl list --media-errors` shows it after a scan; the trace event cxl_poison fires",
            "CXL memory device", _memdevs, _poison,
        ),
        Fault(
            "removal", "a function or a CXL device is taken out without asking the host",
            "the slot's attention button: pciehp takes the driver away five seconds later, whoever "
            "uses it; with CXL memory online the node cannot be saved, and QEMU 11.1.2 itself "
            "falls over (SIGSEGV, 3 of 3 times), and the lab with it",
            "function or CXL memory device", _removable, _remove,
        ),
        Fault(
            "device-hang", "a function that no longer completes anything: its DMA gets nowhere",
            "requests hang; an NVMe driver times out after 30 s and resets the controller",
            "function", _hanging, _hang,
        ),
        Fault(
            "libvirtd-crash", "libvirtd dies of SIGSEGV",
            "guests go on; clients lose their connection; nobody starts it again (`libvirtd -d`)",
            "", _anywhere, _crash_libvirtd,
        ),
        Fault(
            "agent-kill", "virtfabricd is killed, wherever it is",
            "hooks find nobody; the next start undoes what the journal shows as unfinished",
            "", _anywhere, _kill_agent,
        ),
        Fault(
            "guest-panic", "a guest's kernel panics (by NMI, with unknown_nmi_panic)",
            "the guest reboots or ends, as its on_crash and on_reboot say",
            "guest by name", _anywhere, _panic_guest,
        ),
        Fault(
            "memory-pressure", "something takes all but 64 MiB of a node's free memory",
            "allocations on the node fall back to others or fail; strict guests may meet the "
            "OOM killer",
            "NUMA node", _nodes, _press_memory,
        ),
        Fault(
            "clock-jump", "the wall clock jumps an hour ahead (or --target SECONDS)",
            "timers on the monotonic clock do not notice; what compares wall-clock times does",
            "number of seconds", _anywhere, _jump_clock,
        ),
    )
}  # fmt: skip
"""Every fault, by its name."""
