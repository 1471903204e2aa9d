"""Slices of offload cards for what a guest asks for: how many, and the host as it will be. Pure.

Where a request wants more functions of a capability than this guest can be given, each one missing
is a slice with one unit of it, that ends when the guest gives it back. Nobody who uses a slice has
to make way for one: who has a function gives that up, as the arbiter decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.adapter import Seat, Slice, SliceId, SliceSpec
from virtfabric.model.badge import Badge
from virtfabric.model.capability import device_key
from virtfabric.model.device import PciAddress, PciFunction
from virtfabric.model.units import MIB, Bytes
from virtfabric.model.want import Mode
from virtfabric.policy.badges import join_slices
from virtfabric.policy.sliceplans import SlicePlan, SliceWish, plan_slices
from virtfabric.policy.sliceusers import find_users
from virtfabric.policy.stock import Stock, functions_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from virtfabric.model.adapter import AdapterId
    from virtfabric.model.badge import SliceFunction
    from virtfabric.model.card import CardView
    from virtfabric.model.device import DeviceInventory
    from virtfabric.model.errors import Refusal
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.request import Request
    from virtfabric.policy.sliceplans import SlicePart

MEMORY: Final = Bytes(MIB)
"""Of the card's, for each function: keys for `crypto.aes` are in the card's memory or nowhere."""
_NOWHERE: Final = 0xFFFF
"""PCI domain of functions that are not there yet; the largest that firmware can name."""


@dataclass(frozen=True, slots=True)
class Foresight:
    """What cards would be asked for.

    Attributes:
        slices: to be made; None for none.
        refusal: why not all that are missing.
    """

    slices: SlicePlan | None = None
    refusal: Refusal | None = None


def choose_slices(
    snapshot: HostSnapshot, request: Request, *, host: str, making: RequestId,
    idle: Sequence[str] = (),
) -> Foresight:  # fmt: skip
    """As many of the slices that are missing as cards can have made now.

    Args:
        snapshot: the host.
        request: what is asked for.
        host: who this host is to cards.
        making: for the keys of the slices; another one for each try.
        idle: as for `plan_slices`.
    """
    guest = snapshot.guests.get(request.guest)
    if guest is None or guest.policy is None or not guest.active or not snapshot.cards:
        return Foresight()
    wishes = _wishes(snapshot, guest, request)
    refusal = None
    while wishes:
        found = plan_slices(
            snapshot.cards, snapshot.books.slices, wishes, host=host, request=making,
            generation=snapshot.generation, spare_held=True, idle=idle,
            kept=find_users(snapshot),
        )  # fmt: skip
        if isinstance(found, SlicePlan):
            return Foresight(found, refusal)
        refusal = refusal or found
        wishes = wishes[:-1]
    return Foresight(None, refusal)


def _wishes(snapshot: HostSnapshot, guest: GuestState, request: Request) -> tuple[SliceWish, ...]:
    near = tuple(f"node:{node}" for node in guest.numa_nodes)
    priority = guest.policy.priority if guest.policy else 0
    found: list[SliceWish] = []
    for capability, count in sorted(_missing(snapshot, guest, request).items()):
        if not _is_on_cards(snapshot, capability):
            continue
        # only this host can take it out of its guest: for others it is not to be had
        spec = SliceSpec(
            memory=MEMORY, capability=capability, units=1, priority=priority, reclaimable=False
        )  # fmt: skip
        found += [SliceWish(spec, guest.uuid, near)] * count
    return tuple(found)


def _missing(snapshot: HostSnapshot, guest: GuestState, request: Request) -> dict[str, int]:
    stock = Stock(snapshot)
    held = [one.capability for one in functions_of(snapshot, guest.uuid)]
    missing = {}
    for capability, want in request.devices.items():
        gain = want.value - (0 if want.mode is Mode.BY else held.count(capability))
        there = stock.open_to(guest.uuid, device_key(capability))
        missing[capability] = max(0, gain - len(there))
    return missing


def _is_on_cards(snapshot: HostSnapshot, capability: str) -> bool:
    views = snapshot.cards.values()
    return any(v.books and v.books.adapter.accelerators.get(capability) for v in views)


def foresee(snapshot: HostSnapshot, slices: SlicePlan) -> HostSnapshot:
    """The host as it will be: with a function for each slice, at an address that nothing has."""
    cards: dict[AdapterId, CardView] = dict(snapshot.cards)
    functions = dict(snapshot.devices.functions)
    pools = tuple(pool for pool in snapshot.devices.pools if not pool.slices)
    groups = max(snapshot.devices.groups, default=0)
    for number, part in enumerate(slices.parts):
        code = f"to come {number}"
        name = f"to-come-{number}"
        cards[part.card] = _with_slice(cards[part.card], name, code, part)
        address = PciAddress(f"{_NOWHERE:04x}:{number // 32:02x}:{number % 32:02x}.0")
        functions[address] = PciFunction(
            address, group=groups + 1 + number, resets=("flr",),
            badge=Badge(part.card, name, code),
        )  # fmt: skip
    devices = replace(
        snapshot.devices, functions=functions, pools=pools, slices={}, doubts={}
    )  # fmt: skip
    return replace(snapshot, devices=join_slices(devices, cards))


def _with_slice(card: CardView, name: str, code: str, part: SlicePart) -> CardView:
    assert card.books is not None
    one = Slice(
        SliceId(name), part.spec, Seat(capability=part.spec.capability), part.holder, part.key
    )
    books = replace(card.books, slices={**card.books.slices, one.id: one})
    return replace(card, books=books, badges={**card.badges, one.id: code})


def lacks_group(inventory: DeviceInventory, address: PciAddress) -> bool:
    """Whether the kernel has not put it into an IOMMU group (yet)."""
    return inventory.functions[address].group is None


def functions_to_come(
    found: Mapping[PciAddress, SliceFunction], parts: tuple[SlicePart, ...]
) -> tuple[SlicePart, ...]:
    """Those of which no function is there yet."""
    there = {one.key for one in found.values()}
    return tuple(part for part in parts if part.key not in there)
