"""What guests that stopped short have shown in one transaction: what each can give at most.

It decides nothing: the arbiter decides anew within these bounds, and by `Recall.stuck` plans ask
another device of the same guest before another guest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.model.amounts import CPU_KEY, MEMORY_KEYS, Amounts, Tier
from virtfabric.model.capability import device_key
from virtfabric.model.devicesteps import AttachFunction, Presence
from virtfabric.model.plan import ResizeVirtioMem, SetBalloon
from virtfabric.policy.reclaim import UNLIMITED
from virtfabric.policy.sources import sources_of
from virtfabric.policy.tiers import node_rooms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.daemon.executor import Shortfall
    from virtfabric.model.amounts import Key
    from virtfabric.model.decision import Decision
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.step import Step


class Shortfalls:
    """Belongs to the thread that conducts the transaction.

    Attributes:
        caps: the most that a guest is to pay, in every resource.
        stuck: by guest and device (empty for a balloon), the size below which it did not go.
        stopped: bytes that a guest had been asked for when it stopped, and why it did.
    """

    def __init__(self, *, yields: bool) -> None:
        """`yields`: whether the guest that the decision is about may give less as well."""
        self._yields = yields
        self._short: list[tuple[Step, int]] = []
        self.caps: dict[GuestId, Amounts] = {}
        self.stuck: dict[tuple[GuestId, str], int] = {}
        self.stopped: dict[tuple[GuestId, Key], tuple[int, str]] = {}

    def can_answer(self, short: Shortfall, decision: Decision | None) -> bool:
        """Whether somebody else, or another device, can make up for it: each is asked once."""
        if decision is None:
            return False
        who = {take.victim for take in decision.takes}
        if self._yields:
            who.add(decision.guest)
        step = short.step
        return step.guest in who and _device_of(step) not in {_device_of(s) for s, _ in self._short}

    def note(
        self,
        short: Shortfall,
        decision: Decision,
        applied: Sequence[Step],
        snapshot: HostSnapshot,
    ) -> None:
        """Remember what it gave.

        Args:
            short: how it stopped.
            decision: what it was to give.
            applied: every step so far that came about, this one may be among them.
            snapshot: with the guest as it is now.
        """
        self._short.append((short.step, short.reached))
        guest, step = short.step.guest, short.step
        asked = next((t.amounts for t in decision.takes if t.victim == guest), -decision.delta)
        keys = {CPU_KEY, *MEMORY_KEYS.values(), *asked.keys()}
        old = self.caps.get(guest, Amounts(dict.fromkeys(keys, UNLIMITED)))
        if isinstance(step, AttachFunction):
            key, most = _functions_given(step, applied, snapshot)
        else:
            key = MEMORY_KEYS[Tier(getattr(step, "tier", Tier.DRAM))]
            self.stuck[guest, getattr(step, "alias", "")] = short.reached
            most = self._memory_given(step, applied) + self._memory_left(guest, key, snapshot)
            before, _ = self.stopped.get((guest, key), (0, ""))
            self.stopped[guest, key] = max(before, asked[key]), short.detail
        self.caps[guest] = old.with_value(key, most)

    def came_about(self, applied: Sequence[Step]) -> tuple[Step, ...]:
        """Of these, with where those ended that stopped short."""
        reached = {id(step): size for step, size in self._short}
        return tuple(
            replace(one, after=reached[id(one)])
            if id(one) in reached and isinstance(one, ResizeVirtioMem | SetBalloon)
            else one
            for one in applied
        )

    def _memory_given(self, step: Step, applied: Sequence[Step]) -> int:
        """What came home by all of its devices, those that stopped short included."""
        tier = getattr(step, "tier", Tier.DRAM)
        reached = {id(one): size for one, size in self._short}
        steps = {id(one): one for one in (*applied, step) if one.guest == step.guest}
        return sum(
            max(0, one.before - reached.get(id(one), one.after))
            for one in steps.values()
            if isinstance(one, ResizeVirtioMem | SetBalloon)
            and getattr(one, "tier", Tier.DRAM) == tier
        )

    def _memory_left(self, guest: GuestId, key: Key, snapshot: HostSnapshot) -> int:
        """What its other devices have yet."""
        state = snapshot.guests.get(guest)
        if state is None:
            return 0
        recall = replace(snapshot.recall, stuck=self.stuck)
        snapshot = replace(snapshot, recall=recall)
        return sum(one.room for one in sources_of(state, key, snapshot, node_rooms(snapshot)))


def _device_of(step: Step) -> tuple[GuestId, str, str]:
    """One device of one guest; all functions of a guest count as one."""
    return step.guest, step.kind, getattr(step, "alias", "")


def _functions_given(
    step: AttachFunction, applied: Sequence[Step], snapshot: HostSnapshot
) -> tuple[Key, int]:
    """How many functions of the kind it let go before this one, which it did not."""
    holding = snapshot.books.holdings.get(step.guest)
    held = {f.address: f.capability for f in holding.functions} if holding else {}
    gone = [
        held.get(one.address)
        for one in applied
        if isinstance(one, AttachFunction)
        and one.guest == step.guest
        and one.after is Presence.ABSENT
        and one is not step
    ]
    capability = held.get(step.address, "")
    return device_key(capability), gone.count(capability)
