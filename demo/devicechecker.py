"""The judge of the passthrough demo: verdicts on what `devicesight` saw.

It imports nothing from virtfabric and asks the agent nothing. What is right comes from whoever
asks: how many functions of which addresses a guest should have, and how the host was at first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

    from demo.checker import Finding


@dataclass(frozen=True, slots=True)
class Function:
    """A function as sysfs shows it; empty words for none."""

    driver: str
    override: str
    group: str
    node: int


@dataclass(frozen=True, slots=True)
class Nic:
    """A NIC inside a guest, as the guest says; `answers`: a ping from the host came back."""

    name: str
    mac: str
    answers: bool


@dataclass(frozen=True, slots=True)
class Disk:
    """An NVMe disk inside a guest; `reads_back`: what the guest wrote is what it read."""

    name: str
    reads_back: bool


@dataclass(frozen=True, slots=True)
class GuestSight:
    """A guest.

    Attributes:
        pid: of its QEMU, None when it does not run.
        ready: whether its userland is up.
        hostdevs: addresses in the live XML.
        groups: IOMMU groups that its QEMU has open.
    """

    pid: int | None
    ready: bool
    hostdevs: tuple[str, ...]
    groups: tuple[str, ...]
    nics: tuple[Nic, ...]
    disks: tuple[Disk, ...]


@dataclass(frozen=True, slots=True)
class Sight:
    """Host and guests at one moment; a function that is not there is None."""

    functions: dict[str, Function | None]
    guests: dict[str, GuestSight]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `devicesight` printed."""
        functions = {
            address: Function(**seen) if seen else None
            for address, seen in data["functions"].items()
        }
        guests = {
            name: GuestSight(
                pid=seen["pid"],
                ready=seen["ready"],
                hostdevs=tuple(seen["hostdevs"]),
                groups=tuple(seen["groups"]),
                nics=tuple(Nic(**nic) for nic in seen["nics"]),
                disks=tuple(Disk(**disk) for disk in seen["disks"]),
            )
            for name, seen in data["guests"].items()
        }
        return cls(functions, guests)

    def holders(self, address: str) -> tuple[str, ...]:
        """Guests whose QEMU has the function's IOMMU group open."""
        function = self.functions[address]
        group = function.group if function else ""
        return tuple(name for name, guest in self.guests.items() if group in guest.groups)


def _judge(what: str, *, found: str, ok: bool) -> Finding:
    return (ok, what if ok else f"{what}: no, found {found}")


def expect_holds(seen: Sight, guest: str, pool: Iterable[str], count: int) -> list[Finding]:
    """The guest has `count` functions of the pool: by live XML, driver link and open groups."""
    now = seen.guests[guest]
    of_pool = [address for address in pool if seen.functions.get(address)]
    mine = [address for address in now.hostdevs if address in of_pool]
    drivers = {a: f.driver for a in mine if (f := seen.functions[a])}
    held = [address for address in of_pool if guest in seen.holders(address)]
    shared = [address for address in of_pool if len(seen.holders(address)) > 1]
    names = ", ".join(mine) or "none"
    return [
        _judge(
            f"{guest}: {count} of the pool in its live XML ({names})",
            found=str(len(mine)),
            ok=len(mine) == count,
        ),
        _judge(
            f"{guest}: their driver is vfio-pci, and its QEMU has just their groups open",
            found=f"{drivers}; open: {held}; open in two guests: {shared}",
            ok=set(drivers.values()) <= {"vfio-pci"} and held == mine and not shared,
        ),
    ]


def expect_nics(seen: Sight, guest: str, count: int) -> Finding:
    """The guest itself has `count` NICs, and each answers a ping over the wire."""
    nics = seen.guests[guest].nics
    told = ", ".join(
        f"{nic.name} {nic.mac} {'answers' if nic.answers else 'is silent'}" for nic in nics
    )
    ok = len(nics) == count and all(nic.answers for nic in nics)
    if not count:
        return _judge(f"{guest}: no NIC inside the guest", found=told, ok=ok)
    return _judge(
        f"{guest}: {count} NIC inside, answering a ping ({told})", found=told or "none", ok=ok
    )


def expect_disks(seen: Sight, guest: str, count: int) -> Finding:
    """The guest itself has `count` NVMe disks, and reads back what it wrote."""
    disks = seen.guests[guest].disks
    told = ", ".join(disk.name for disk in disks if disk.reads_back)
    ok = len(disks) == count and all(disk.reads_back for disk in disks)
    what = f"{guest}: {count} NVMe disk inside, which reads back what the guest wrote ({told})"
    return _judge(what, found=str(disks), ok=ok)


def expect_same_processes(seen: Sight, before: Sight) -> Finding:
    """No guest was restarted."""
    then = {name: guest.pid for name, guest in before.guests.items() if guest.pid}
    now = {name: seen.guests[name].pid for name in then}
    return _judge("the guests are the same processes as before", found=str(now), ok=now == then)


def expect_unchanged(seen: Sight, before: Sight) -> Finding:
    """Every function, and who has it, is as it was."""
    changed = [a for a, function in before.functions.items() if seen.functions.get(a) != function]
    changed += [
        name
        for name, guest in before.guests.items()
        if (seen.guests[name].hostdevs, seen.guests[name].groups) != (guest.hostdevs, guest.groups)
    ]
    return _judge("nothing changed in kernel and libvirt", found=", ".join(changed), ok=not changed)


def expect_free(seen: Sight, pool: Iterable[str], drivers: dict[str, str]) -> Finding:
    """Nobody has a function of the pool; each has the driver that it had, and no override."""
    wrong = []
    for address in pool:
        function = seen.functions.get(address)
        if function is None:
            wrong.append(f"{address} is not there")
        elif (function.driver, function.override) != (drivers[address], "") or seen.holders(
            address
        ):
            wrong.append(f"{address} {function.driver or 'no driver'} {function.override}")
    return _judge(
        "every function is back with the driver that it had, and no guest has one open",
        found="; ".join(wrong),
        ok=not wrong,
    )


def expect_host_as_found(seen: Sight, first: Sight) -> Finding:
    """The host's functions are exactly those that were there, with drivers as they were."""
    changed = [a for a, function in first.functions.items() if seen.functions.get(a) != function]
    return _judge("the host's functions are as found", found=", ".join(changed), ok=not changed)
