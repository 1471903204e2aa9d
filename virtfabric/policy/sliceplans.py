"""Plans for slices of offload cards: which cards, who has to make way, in which order. Pure.

All parts are reserved before any is granted; those for which somebody ends are granted last. Who
makes way is taken from its guest before anything else, and ends with all its parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from virtfabric.model.card import HeldSlice
from virtfabric.model.cardsteps import AssignSlice, BringSlice, SlicePresence
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.plan import Plan
from virtfabric.policy.slicepool import SlicePool
from virtfabric.policy.slicing import release, reserve

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from virtfabric.model.adapter import AdapterBooks, AdapterId, Slice, SliceId, SliceSpec
    from virtfabric.model.card import CardView
    from virtfabric.model.ids import RequestId
    from virtfabric.model.step import Step
    from virtfabric.policy.slicepool import PoolPart


@dataclass(frozen=True, slots=True)
class SliceWish:
    """A slice that somebody wants.

    Attributes:
        holder: who is to use it (a guest's UUID); empty for nobody yet.
        near: sites, the nearest first.
        reclaim: whether slices of lower priority may have to make way.
    """

    spec: SliceSpec
    holder: str = ""
    near: tuple[str, ...] = ()
    reclaim: bool = True


@dataclass(frozen=True, slots=True)
class SlicePart:
    """A part of a slice to be made: one card's."""

    key: str
    wish: str
    card: AdapterId
    spec: SliceSpec
    holder: str


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """A plan, the parts that it makes, and the keys of slices that end for them."""

    plan: Plan
    parts: tuple[SlicePart, ...]
    ends: frozenset[str] = frozenset()


def plan_slices(
    cards: Mapping[AdapterId, CardView], held: Mapping[str, HeldSlice],
    wishes: Sequence[SliceWish], *, host: str, request: RequestId, generation: int,
    spare_held: bool = False, idle: Sequence[str] = (), kept: Collection[str] = (),
) -> SlicePlan | Refusal:  # fmt: skip
    """All of these slices, or none.

    Where there is too little, slices that nobody uses are ended for them, no more than it takes.

    Args:
        cards: as last told of; those that cannot be asked now give nothing.
        held: slices of this host: one that loses a part ends whole.
        wishes: the slices, in the order in which they choose.
        host: who this host is to cards.
        request: for the keys.
        generation: of the snapshot.
        spare_held: nobody who uses a slice has to make way, of this host neither.
        idle: keys of slices of this host that nobody would miss, in the order in which they end;
            all parts of each.
        kept: keys of slices that must not end, as somebody uses them beside the books.
    """
    whole = {held[key].wish for key in kept if key in held}
    idle = [key for key in idle if key in held and held[key].wish not in whole]

    def plan(gone: Collection[str]) -> SlicePlan | Refusal:
        found = _plan_without(
            gone, cards, held, wishes, host=host, request=request, generation=generation,
            spare_held=spare_held, kept=_parts_of(whole, held) | frozenset(kept),
        )  # fmt: skip
        return found if isinstance(found, Refusal) else _after_the_end(found, gone, held)

    answer = plan(())
    if not isinstance(answer, Refusal) or answer.reason is not Reason.NO_CAPACITY:
        return answer
    names = list(dict.fromkeys(held[key].wish for key in idle))
    for count in range(1, len(names) + 1):
        found = plan(_parts_of(names[:count], held))
        if isinstance(found, SlicePlan):
            return _with_fewest(plan, names[:count], held, found)
    return answer


def _parts_of(names: Collection[str], held: Mapping[str, HeldSlice]) -> frozenset[str]:
    return frozenset(key for key, one in held.items() if one.wish in names)


def _with_fewest(
    plan: Callable[[Collection[str]], SlicePlan | Refusal], names: list[str],
    held: Mapping[str, HeldSlice], found: SlicePlan,
) -> SlicePlan:  # fmt: skip
    """Without the ends that turn out not to be needed: the last one made it possible."""
    for name in names[:-1]:
        fewer = [other for other in names if other != name]
        without = plan(_parts_of(fewer, held))
        if isinstance(without, SlicePlan):
            names, found = fewer, without
    return found


def _after_the_end(
    found: SlicePlan, gone: Collection[str], held: Mapping[str, HeldSlice]
) -> SlicePlan:
    ends = tuple(_end(held[key]) for key in sorted(gone))
    plan = replace(found.plan, steps=(*ends, *found.plan.steps))
    return SlicePlan(plan, found.parts, found.ends | frozenset(gone))


def _plan_without(
    gone: Collection[str], cards: Mapping[AdapterId, CardView], held: Mapping[str, HeldSlice],
    wishes: Sequence[SliceWish], *, host: str, request: RequestId, generation: int,
    spare_held: bool, kept: Collection[str],
) -> SlicePlan | Refusal:  # fmt: skip
    """As `plan_slices`, where these slices of this host have ended."""
    held = {key: one for key, one in held.items() if key not in gone}
    own = "" if spare_held else host
    usable = [
        spared(_without(view.books, gone), own, kept)
        for view in cards.values()
        if view.is_usable and view.books
    ]
    if not usable:
        return Refusal(Reason.NO_CAPACITY, _no_card(cards))
    pool = SlicePool(usable)
    books = {one.adapter.serial: one for one in usable}
    made: list[tuple[SlicePart, tuple[HeldSlice, ...]]] = []
    for number, wish in enumerate(wishes):
        choice = pool.choose(wish.spec, near=wish.near, reclaim=wish.reclaim)
        if isinstance(choice, Refusal):
            return _about(choice, wish.spec)
        for part in choice.parts:
            key = f"{host}/{request}/{len(made)}"
            one = SlicePart(
                key, f"{request}.{number}", part.adapter, part.spec, wish.holder
            )  # fmt: skip
            made.append((one, _victims(books[part.adapter], part)))
            promise = reserve(books[part.adapter], part.spec, request=key, reclaim=wish.reclaim)
            assert not isinstance(promise, Refusal)
            books[part.adapter] = promise.books
            pool.put(promise.books)
    return _plan(made, held, request, generation)


def _without(books: AdapterBooks, gone: Collection[str]) -> AdapterBooks:
    for one in tuple(books.slices.values()):
        if one.request in gone:
            left = release(books, one.id)
            books = books if isinstance(left, Refusal) else left
    return books


def _plan(
    made: Sequence[tuple[SlicePart, tuple[HeldSlice, ...]]], held: Mapping[str, HeldSlice],
    request: RequestId, generation: int,
) -> SlicePlan:  # fmt: skip
    leaving = {victim.key: victim for _, victims in made for victim in victims}
    halved = {held[key].wish for key in leaving if key in held}
    rest = [one for key, one in held.items() if one.wish in halved and key not in leaving]
    steps: list[Step] = [_unassign(one) for one in (*leaving.values(), *rest) if one.holder]
    promised = [_bring(part, victims) for part, victims in made]
    steps += promised
    steps += [
        replace(step, before=SlicePresence.PROMISED, after=SlicePresence.GRANTED)
        for step in sorted(promised, key=lambda step: bool(step.victims))
    ]  # fmt: skip
    steps += [_end(one) for one in rest]
    plan = Plan(request, generation, tuple(steps))
    ends = frozenset({*leaving, *(one.key for one in rest)})
    return SlicePlan(plan, tuple(part for part, _ in made), ends)


def plan_release(held: Iterable[HeldSlice], request: RequestId, generation: int) -> Plan:
    """End these slices: taken from who has them, then gone."""
    parts = tuple(held)
    steps: list[Step] = [_unassign(one) for one in parts if one.holder]
    steps += [_end(one) for one in parts]
    return Plan(request, generation, tuple(steps))


@dataclass(frozen=True, slots=True)
class Settling:
    """What makes a card and the books agree.

    Attributes:
        missing: slices in the books that the card does not have any more: to be made anew after the
            plan, each by itself (`plan_remaking`).
        strays: slices and promises of this host that no books know; they end.
        ids: the card's own ids for slices, by key, where the books have others.
        gone: keys of slices that were made for guests which do not have them any more, nor has the
            card: they leave the books.
        kept: keys of slices that no books know, and that somebody uses.
    """

    plan: Plan
    missing: tuple[HeldSlice, ...] = ()
    strays: tuple[str, ...] = ()
    ids: Mapping[str, SliceId] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    @property
    def is_needed(self) -> bool:
        """Whether something has to be done before the missing ones are made."""
        return bool(self.plan.steps or self.ids or self.gone)

    def settled(self, held: Mapping[str, HeldSlice]) -> dict[str, HeldSlice]:
        """Slices in the books once the plan was carried out, but for those that it ended.

        What the card showed when this was planned counts, and nothing that it showed since.
        """
        return {
            key: replace(one, slice=self.ids.get(key, one.slice))
            for key, one in held.items()
            if key not in self.gone
        }


def plan_settling(
    card: CardView, held: Mapping[str, HeldSlice], *, host: str, request: RequestId,
    generation: int, idle: Collection[str] = (), used: Collection[str] = (),
) -> Settling:  # fmt: skip
    """Bring a card to what the books say; nothing where it cannot be asked.

    Args:
        card: as last told of.
        held: slices of this host, on all cards.
        host: who this host is to cards.
        request: of the plan.
        generation: of the snapshot.
        idle: keys of slices that were made for guests which do not have them any more; they end.
        used: keys of slices that somebody uses beside the books; they stay.
    """
    if not card.is_usable or card.books is None:
        return Settling(Plan(request, generation, ()))
    strays = tuple(_strays(card.books, held.keys(), host))
    ends: list[Step] = [
        _bring_to_nothing(key, card.serial, spec, presence)
        for key, spec, presence in strays
        if key not in used
    ]
    changes: list[Step] = []
    ids: dict[str, SliceId] = {}
    there = _by_key(card)
    own = [one for one in held.values() if one.card == card.serial]
    for one in own:
        found = there.get(one.key)
        if found is None:
            continue
        if one.key in idle and one.key not in used:
            ends += [_unassign(one)] if one.holder else []
            ends += [_end(one)]
            continue
        if found.id != one.slice:
            ids[one.key] = found.id
        if found.holder != one.holder:
            changes.append(_reassign(one, found))
    absent = [one for one in own if one.key not in there]
    return Settling(
        Plan(request, generation, (*ends, *changes)),
        tuple(one for one in absent if one.key not in idle),
        tuple(step.key for step in ends if isinstance(step, BringSlice)),
        ids, frozenset(one.key for one in absent if one.key in idle),
        frozenset(key for key, _, _ in strays if key in used),
    )  # fmt: skip


def plan_remaking(
    card: CardView, one: HeldSlice | None, request: RequestId, generation: int
) -> Plan:
    """Make a slice of the books again that its card has lost; without steps where that is not so.

    Nobody makes way for it.
    """
    lost = one is not None and card.is_usable and one.key not in _by_key(card)
    return Plan(request, generation, (_remake(one),) if one is not None and lost else ())


def _by_key(card: CardView) -> dict[str, Slice]:
    return {one.request: one for one in card.books.slices.values()} if card.books else {}


def spared(books: AdapterBooks, host: str, kept: Collection[str] = ()) -> AdapterBooks:
    """The books in which nobody of another host has to make way while it is in use.

    Its guest could only be made to let go by its own host. An empty `host` spares everybody; slices
    whose keys are in `kept` are spared in any case.
    """
    foreign = {
        name: replace(one, spec=replace(one.spec, reclaimable=False))
        for name, one in books.slices.items()
        if (one.holder and not _is_ours(one.request, host)) or one.request in kept
    }
    return replace(books, slices={**books.slices, **foreign}) if foreign else books


def _strays(
    books: AdapterBooks, known: Collection[str], host: str
) -> Iterator[tuple[str, SliceSpec, SlicePresence]]:
    for one in books.slices.values():
        if _is_ours(one.request, host) and one.request not in known:
            yield one.request, one.spec, SlicePresence.GRANTED
    for promise in books.reservations.values():
        one = promise.slice
        if not promise.replaces and _is_ours(one.request, host) and one.request not in known:
            yield one.request, one.spec, SlicePresence.PROMISED


def _is_ours(key: str, host: str) -> bool:
    return bool(host) and key.startswith(f"{host}/")


def _victims(books: AdapterBooks, part: PoolPart) -> tuple[HeldSlice, ...]:
    return tuple(
        _held(part.adapter, name, books.slices[name]) for name in part.choice.victims
    )  # fmt: skip


def _held(card: AdapterId, name: SliceId, one: Slice) -> HeldSlice:
    return HeldSlice(one.request, card, name, "", one.spec, one.holder)


def _bring(part: SlicePart, victims: tuple[HeldSlice, ...]) -> BringSlice:
    return BringSlice(
        key=part.key, card=part.card, spec=part.spec, holder=part.holder, victims=victims,
        before=SlicePresence.ABSENT, after=SlicePresence.PROMISED,
    )  # fmt: skip


def _bring_to_nothing(
    key: str, card: AdapterId, spec: SliceSpec, before: SlicePresence
) -> BringSlice:
    return BringSlice(key=key, card=card, spec=spec, before=before, after=SlicePresence.ABSENT)


def _end(one: HeldSlice) -> BringSlice:
    return _bring_to_nothing(one.key, one.card, one.part, SlicePresence.GRANTED)


def _remake(one: HeldSlice) -> BringSlice:
    return BringSlice(
        key=one.key, card=one.card, spec=one.part, holder=one.holder,
        before=SlicePresence.ABSENT, after=SlicePresence.GRANTED,
    )  # fmt: skip


def _unassign(one: HeldSlice) -> AssignSlice:
    return AssignSlice(key=one.key, card=one.card, name=one.slice, before=one.holder, after="")


def _reassign(one: HeldSlice, found: Slice) -> AssignSlice:
    return AssignSlice(
        key=one.key, card=one.card, name=found.id, before=found.holder, after=one.holder
    )


def _about(refusal: Refusal, spec: SliceSpec) -> Refusal:
    return refusal._replace(detail=f"slice {spec.name or 'without a name'}: {refusal.detail}")


def _no_card(cards: Mapping[AdapterId, CardView]) -> str:
    if not cards:
        return "no card is configured ([cards] in the configuration)"
    states = ", ".join(f"{view.serial} is {view.condition}" for view in cards.values())
    return f"no card can be asked now: {states}"
