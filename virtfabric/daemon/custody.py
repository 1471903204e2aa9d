"""Who has which PCIe function after a plan, and which ones nobody may have for now: books to books.

Owns the quarantine's entries and what plans leave behind. It decides nothing and applies nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.daemon.undertaking import new_request
from virtfabric.model.amounts import MEMORY_KEYS, Amounts, Tier
from virtfabric.model.capability import device_key
from virtfabric.model.cardsteps import AssignSlice, BringSlice, SlicePresence
from virtfabric.model.decision import Decision
from virtfabric.model.device import Found, Quarantine
from virtfabric.model.devicesteps import (
    AttachFunction,
    BindDriver,
    LimitLink,
    ResetFunction,
    SetProfile,
    SetUpVf,
)
from virtfabric.model.ledger import Residue
from virtfabric.model.plan import SetVcpuCount
from virtfabric.model.profile import Profile
from virtfabric.policy.faults import find_faults
from virtfabric.policy.loans import depart, settle

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from virtfabric.model.device import DeviceInventory, HeldFunction, PciAddress
    from virtfabric.model.hugepages import HeldPages
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Books
    from virtfabric.model.plan import Plan
    from virtfabric.model.step import Step

DEVICE: Final = "device"
"""`Residue.what` of functions that a guest does not let go."""


class Undone(NamedTuple):
    """A step of an undo.

    Attributes:
        left: what its guest has not given back, in what its handler counts.
        withheld: not undone at all, see `is_withheld`.
    """

    step: Step
    left: int = 0
    withheld: bool = False

    @property
    def complete(self) -> bool:
        """Whether nothing is left of the step, so that nobody needs to undo it again."""
        return not (self.left or self.withheld)


def is_withheld(step: Step, undone: Iterable[Undone]) -> bool:
    """Whether a step must not be undone since its guest keeps a function that it was to lose.

    What was prepared for that guest stays as it is: a function that QEMU has open cannot change its
    driver, none of its group may go back to the host, and without its VLAN it would be in another
    network. All of these go to quarantine, with the way back.
    """
    return any(one.left and is_prepared_for(step, one.step) for one in undone)


def is_prepared_for(step: Step, attach: Step) -> bool:
    """Whether a step prepared the host for a function that this one attached."""
    return (
        isinstance(step, BindDriver | SetUpVf | SetProfile | LimitLink)
        and isinstance(attach, AttachFunction)
        and attach.guest == step.guest
    )


def residues_of(step: Step, left: int, at: float, why: str) -> list[Residue]:
    """What an undo left with a guest (in what the step's handler counts), if anything."""
    if not left:
        return []
    match step:
        case SetVcpuCount():
            return [Residue(step.guest, "vcpu", left * 1000, at, why)]
        case AttachFunction():
            return [Residue(step.guest, DEVICE, left, at, f"{step.address} {why}")]
        case _:
            key = MEMORY_KEYS[Tier(getattr(step, "tier", Tier.DRAM))]
            return [Residue(step.guest, str(key), left, at, why)]


def with_residues(books: Books, guests: Collection[GuestId], residues: Iterable[Residue]) -> Books:
    """These residues in place of all that these guests had."""
    kept = (r for r in books.residues if r.guest not in guests)
    return replace(books, residues=(*kept, *residues))


def with_functions(books: Books, functions: Mapping[GuestId, tuple[HeldFunction, ...]]) -> Books:
    """These functions in the holdings; a guest without a holding (any more) has none."""
    changed = {
        guest: replace(holding, functions=functions[guest])
        for guest, holding in books.holdings.items()
        if guest in functions and holding.functions != functions[guest]
    }
    return replace(books, holdings=books.holdings | changed) if changed else books


def _with_pages(books: Books, pages: Mapping[GuestId, tuple[HeldPages, ...]]) -> Books:
    """These huge pages in the holdings; a guest without a holding (any more) counts on none."""
    changed = {
        guest: replace(holding, pages=pages[guest])
        for guest, holding in books.holdings.items()
        if guest in pages
    }
    return replace(books, holdings=books.holdings | changed) if changed else books


def remedy_for(address: PciAddress) -> str:
    """What an operator does about a function in quarantine."""
    return f"see that it is sane, then: virtfabric devices release {address}"


def quarantined(
    books: Books, address: PciAddress, why: str, at: float, found: Found | None = None
) -> Books:
    """With this function in quarantine; one that is there already keeps its first reason.

    `found` is the way back to how it was before a guest had it, where no plan went that way.
    """
    if address in books.quarantine:
        return books
    entry = Quarantine(address, why, remedy_for(address), at, found or Found())
    return replace(books, quarantine=books.quarantine | {address: entry})


def condemned(books: Books, inventory: DeviceInventory, at: float) -> Books:
    """With every function in quarantine that had a fatal error while a guest had it.

    Also those that guests have still. Nothing but an operator's word lets them out.
    """
    found = dict(books.quarantine)
    ways = {f.address: f.found for h in books.holdings.values() for f in h.claims}
    for address, why in find_faults(books, inventory).items():
        entry = found.get(address) or Quarantine(
            address, why, remedy_for(address), at, ways[address]
        )
        if not entry.condemned:
            found[address] = replace(entry, why=why, condemned=True)
    return books if found == books.quarantine else replace(books, quarantine=found)


def released(books: Books, address: PciAddress) -> Books:
    """With this function out of quarantine."""
    return replace(
        books, quarantine={a: entry for a, entry in books.quarantine.items() if a != address}
    )


def after_plan(
    books: Books, before: Books, plan: Plan, skipped: Iterable[tuple[Step, str]], at: float
) -> Books:
    """The books after a plan was carried out: functions moved, doubtful ones in quarantine.

    Args:
        books: with the amounts of after.
        before: as they were.
        plan: what was done.
        skipped: optional steps that did not come about, with why.
        at: UNIX seconds.
    """
    books = _with_pages(with_functions(books, plan.functions), plan.pages)
    ways_back = {f.address: f.found for h in before.holdings.values() for f in h.claims}
    for step, why in skipped:
        if isinstance(step, ResetFunction | BindDriver | SetUpVf | SetProfile):
            found = ways_back.get(step.address)
            books = quarantined(books, step.address, f"failed: {step} ({why})", at, found)
    for address in plan.retired:
        why = "a guest has had it, and its pool is for one use (one_time_use)"
        books = quarantined(books, address, why, at)
    return books


def slices_after(books: Books, steps: Iterable[Step]) -> Books:
    """The slices of cards after these steps: ended, and with whom they are now.

    What a card could not be told yet counts as well: it is told when it is back.
    """
    slices = dict(books.slices)
    for step in steps:
        if isinstance(step, AssignSlice) and step.key in slices:
            slices[step.key] = replace(slices[step.key], holder=step.after)
        elif isinstance(step, BringSlice) and step.after is SlicePresence.ABSENT:
            slices.pop(step.key, None)
    return books if slices == books.slices else replace(books, slices=slices)


def idle_slices(books: Books) -> frozenset[str]:
    """Keys of slices that were made for guests, and whose functions no guest holds any more."""
    held = {f.slice for holding in books.holdings.values() for f in holding.functions}
    return frozenset(k for k, one in books.slices.items() if one.transient and k not in held)


def after_undo(books: Books, undone: Collection[Undone], at: float) -> Books:
    """The books after an undo: what a guest kept, and what was prepared with it, is nobody's."""
    kept = {u.step.guest: u.step for u in undone if u.left and isinstance(u.step, AttachFunction)}
    ways_back: dict[PciAddress, Found] = {}
    for step in (u.step for u in undone if u.withheld):
        own = kept[step.guest].address
        about = own if isinstance(step, LimitLink) else getattr(step, "address", own)
        ways_back[about] = _with_way_back(ways_back.get(about, Found()), step, own)
    for one in undone:
        if one.left and isinstance(one.step, AttachFunction):
            ways_back.setdefault(one.step.address, Found())
    for address, found in ways_back.items():
        names = {s.name or s.guest: s.address for s in kept.values()}
        who = ", ".join(f"{name} did not let go of {one}" for name, one in names.items())
        books = quarantined(books, address, f"{who} when its attach was undone", at, found)
    return books


def _with_way_back(found: Found, step: Step, kept: PciAddress) -> Found:
    """With the way back of one more step, the newest first; `kept` is what its guest has."""
    match step:
        case BindDriver():
            vfio_driver = step.after if step.address == kept else found.vfio_driver
            return replace(found, driver=step.before, vfio_driver=vfio_driver)
        case SetUpVf():
            return replace(found, settings=step.before)
        case SetProfile():
            profile = found.profile or Profile(step.file, step.after, step.before)
            return replace(found, profile=profile)
        case LimitLink():
            return replace(found, port=step.address, speed=step.after)
        case _:
            return found


def abandoned(books: Books, guest: GuestId, why: str, at: float) -> Books:
    """The functions of a guest whose holding ends without a plan that gave them back."""
    holding = books.holdings.get(guest)
    for function in holding.functions if holding else ():
        books = quarantined(books, function.address, why, at, function.found)
    return unnamed(books, guest, why, at)


def unnamed(books: Books, guest: GuestId, why: str, at: float) -> Books:
    """What the guest's XML names is no claim any more; what was bound for it has the way back.

    Not what libvirt bound (managed='yes'): it gives that back itself.
    """
    holding = books.holdings.get(guest)
    if holding is None or not holding.named:
        return books
    for function in holding.named:
        if function.found.driver is not None:
            books = quarantined(books, function.address, why, at, function.found)
    return replace(books, holdings=books.holdings | {guest: replace(holding, named=())})


def departed(books: Books, guest: GuestId, why: str, at: float) -> Books:
    """The books after a guest's holding ended without a plan that gave its functions back."""
    return depart(abandoned(books, guest, why, at), guest, at)


def forfeited(books: Books, guest: GuestId, function: HeldFunction, at: float) -> Books:
    """The books after a function left a guest beside us: its grants shrink as if it gave one up."""
    holding = books.holdings.get(guest)
    if holding is None or function not in holding.functions:
        return books
    left = tuple(f for f in holding.functions if f != function)
    books = with_functions(books, {guest: left})
    key = device_key(function.capability)
    decision = Decision(new_request(), guest, books.generation, Amounts({key: -1}))
    return settle(books, decision, grant=None, new_grant=None, loan_ids=(), at=at, orders={})
