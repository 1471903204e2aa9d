"""The judge of the card demo: verdicts on what `cardsight` saw.

It imports nothing from virtfabric and asks the agent nothing. What is right comes from whoever
asks: how many functions of which cards a guest should have, and how it was before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

    from demo.checker import Finding

READY: Final = 3
"""STATE of a slice's function: programmed."""


@dataclass(frozen=True, slots=True)
class Function:
    """A slice's function on the host, by sysfs."""

    card: str
    slice: str
    driver: str
    group: str
    width: int


@dataclass(frozen=True, slots=True)
class Inside:
    """A function inside a guest, as the program there tells.

    Attributes:
        state: of the slice's image; -1 if nothing was told.
        good: how often it encrypted as published.
        bad: what went wrong.
        attacks: what it tried that must be refused.
    """

    state: int
    good: int
    bad: tuple[str, ...]
    attacks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GuestSight:
    """A guest; `pid` of its QEMU is None when it does not run."""

    pid: int | None
    ready: bool
    hostdevs: tuple[str, ...]
    groups: tuple[str, ...]
    inside: dict[str, Inside]

    @property
    def rounds(self) -> int:
        """How often it has encrypted well, over all functions in it."""
        return sum(one.good for one in self.inside.values())


@dataclass(frozen=True, slots=True)
class Sight:
    """Host and guests at one moment."""

    functions: dict[str, Function]
    guests: dict[str, GuestSight]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `cardsight` printed."""
        functions = {address: Function(**one) for address, one in data["functions"].items()}
        guests = {
            name: GuestSight(
                pid=seen["pid"],
                ready=seen["ready"],
                hostdevs=tuple(seen["hostdevs"]),
                groups=tuple(seen["groups"]),
                inside={
                    address: Inside(
                        one["state"], one["good"], tuple(one["bad"]), tuple(one["attacks"])
                    )
                    for address, one in seen["inside"].items()
                },
            )
            for name, seen in data["guests"].items()
        }
        return cls(functions, guests)

    def holders(self, address: str) -> tuple[str, ...]:
        """Guests whose QEMU has the function's IOMMU group open."""
        group = self.functions[address].group
        return tuple(name for name, guest in self.guests.items() if group in guest.groups)


def _judge(what: str, *, found: object, ok: bool) -> Finding:
    return (ok, what if ok else f"{what}: no, found {found}")


def expect_holds(seen: Sight, guest: str, cards: Iterable[str]) -> list[Finding]:
    """The guest has just these functions: the card of each, in any order."""
    wanted = sorted(cards)
    mine = [address for address in seen.guests[guest].hostdevs if address in seen.functions]
    found = sorted(seen.functions[address].card for address in mine)
    drivers = {address: seen.functions[address].driver for address in mine}
    held = [address for address in seen.functions if guest in seen.holders(address)]
    shared = [address for address in seen.functions if len(seen.holders(address)) > 1]
    return [
        _judge(
            f"{guest}: functions of {', '.join(wanted) or 'no card'} in its live XML",
            found=found, ok=found == wanted,
        ),
        _judge(
            f"{guest}: their driver is vfio-pci, and its QEMU has just their groups open",
            found=f"{drivers}; open: {held}; open in two guests: {shared}",
            ok=set(drivers.values()) <= {"vfio-pci"} and held == sorted(mine) and not shared,
        ),
    ]  # fmt: skip


def expect_inside(seen: Sight, guest: str, count: int) -> Finding:
    """So many are in the guest, as its own kernel says."""
    inside = seen.guests[guest].inside
    what = f"{guest}: {count} functions of cards inside the guest"
    return _judge(what, found=sorted(inside), ok=len(inside) == count)


def expect_encrypts(seen: Sight, guest: str, count: int) -> Finding:
    """So many encrypt as published, and none otherwise."""
    inside = seen.guests[guest].inside
    good = {a: one.good for a, one in inside.items() if one.good and one.state == READY}
    bad = [f"{address} {what}" for address, one in inside.items() for what in one.bad]
    told = ", ".join(f"{address} {rounds} times" for address, rounds in good.items())
    what = f"{guest}: through {count} it encrypts and opens as published (NIST): {told}"
    return _judge(what, found=f"{inside}", ok=len(good) == count and not bad)


def expect_goes_on(seen: Sight, before: Sight, guest: str) -> Finding:
    """It has encrypted again since then."""
    then, now = before.guests[guest].rounds, seen.guests[guest].rounds
    return _judge(f"{guest}: encrypts on ({then} times, then {now})", found=now, ok=now > then)


def expect_attacks_refused(seen: Sight, guest: str) -> list[Finding]:
    """Everything that the program tried beside its slice was refused."""
    told = [line for one in seen.guests[guest].inside.values() for line in one.attacks]
    found: list[Finding] = []
    for kind, what in (
        ("wrong-key", "other protection keys"),
        ("other-memory", "memory of the card beside its slice"),
        ("outside", "DMA beside the guest's memory"),
    ):
        line = next((one for one in told if one.startswith(f"attack {kind}=")), "")
        words = dict(word.split("=") for word in line.split()[1:])
        refused = int(words.get(kind, 0))
        found.append(
            _judge(
                f"{guest}: {what}: {refused} tries from inside, all refused",
                found=told, ok=refused > 0 and words.get("passed") == "0",
            )
        )  # fmt: skip
    return found


def expect_same_processes(seen: Sight, before: Sight) -> Finding:
    """No guest was restarted."""
    then = {name: guest.pid for name, guest in before.guests.items() if guest.pid}
    now = {name: seen.guests[name].pid for name in then}
    return _judge("the guests are the same processes as before", found=now, ok=now == then)


def expect_unchanged(seen: Sight, before: Sight) -> Finding:
    """Every function, and who has it, is as it was."""
    changed = seen.functions != before.functions or any(
        (seen.guests[name].hostdevs, seen.guests[name].groups) != (guest.hostdevs, guest.groups)
        for name, guest in before.guests.items()
    )
    return _judge("nothing changed in kernel and libvirt", found=seen, ok=not changed)


def expect_none(seen: Sight) -> Finding:
    """No slice has a function any more."""
    return _judge("no function of a slice is left", found=seen.functions, ok=not seen.functions)
