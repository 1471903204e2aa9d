"""A queue while it runs: descriptors out of one ring of the guest, completions into another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from virtfabric.shim.cardpci.descriptors import (
    COMPLETION_SIZE,
    DESCRIPTOR_SIZE,
    format_completion,
    parse_descriptor,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.shim.cardpci.dma import Channel
    from virtfabric.shim.cardpci.operations import Operations, SliceView, Trouble

ENTRIES: Final = tuple(2**power for power in range(1, 11))
_ALIGNMENT: Final = 64
_MODULO: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class Step:
    """One step was done; whether somebody wants to be told."""

    interrupt: bool


def is_possible(ring: int, done_ring: int, entries: int) -> bool:
    """Whether rings can be there."""
    aligned = not ring % _ALIGNMENT and not done_ring % COMPLETION_SIZE
    return aligned and entries in ENTRIES


@dataclass(slots=True, eq=False)
class Queue:
    """One pair of rings. Counts run modulo 2^32."""

    ring: int
    done_ring: int
    entries: int
    channel: Channel
    submitted: int = 0
    completed: int = 0
    _read: tuple[int, bytes] = field(default=(-1, b""))

    def submit(self, count: int) -> bool:
        """The doorbell: so many were given so far; False if that cannot be.

        What was given stays given: the card may have begun with it.
        """
        completed = self.completed  # goes on meanwhile
        waiting = (self.submitted - completed) % _MODULO
        if not waiting <= (count - completed) % _MODULO <= self.entries:
            return False
        self.submitted = count
        return True

    def step(
        self, view: SliceView, operations: Operations, note: Callable[[Trouble], None]
    ) -> Step | None:
        """Do the next operation; None if there is none, or it waits.

        Args:
            view: of the slice.
            operations: of the slice.
            note: hears of a fault, before the guest hears that the operation ended.

        Raises:
            DmaRefusedError: a ring is not in the guest's memory.
            CutOffError: the queue was stopped.
        """
        if self.submitted == self.completed:
            return None
        place = self.completed % self.entries
        order = parse_descriptor(self._descriptor(place))
        result = operations.carry_out(view, order, self.channel)
        if result is None:
            return None
        if result.trouble is not None:
            note(result.trouble)
        number = (self.completed + 1) % _MODULO
        at = self.done_ring + COMPLETION_SIZE * place
        completion = format_completion(result.status, result.written, order.cookie)
        # the number comes last: a guest that sees it sees the rest, and may give the next one
        self.channel.write(at, completion)
        self.completed = number
        self.channel.write(at + len(completion), number.to_bytes(4, "little"))
        return Step(order.interrupt)

    def _descriptor(self, place: int) -> bytes:
        """Read once, however often the operation is tried: it belongs to the card by now."""
        if self._read[0] != self.completed:
            data = self.channel.read(self.ring + DESCRIPTOR_SIZE * place, DESCRIPTOR_SIZE)
            self._read = (self.completed, data)
        return self._read[1]
