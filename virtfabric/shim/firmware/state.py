"""What a card keeps through loss of power: its books, and which slice is programmed with what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.adapter import AdapterBooks, SliceId
from virtfabric.model.errors import InvalidValueError
from virtfabric.policy.slicecheck import find_faults
from virtfabric.protocol.adapterforms import (
    MAX_NAME,
    form_of_adapter,
    form_of_reservation,
    form_of_slice,
    read_adapter,
    read_reservation,
    read_slice,
)
from virtfabric.protocol.fields import Fields
from virtfabric.shim.firmware.statelog import StateDamagedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.adapter import Adapter

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class CardState:
    """Books, and by slice the name of the image that its accelerators run."""

    books: AdapterBooks
    images: Mapping[SliceId, str] = field(default_factory=dict)

    def with_books(self, books: AdapterBooks) -> CardState:
        """After a change; what slices that ended ran is gone with them."""
        kept = {name: image for name, image in self.images.items() if name in books.slices}
        for name in tuple(kept):
            before, after = self.books.slices[name], books.slices[name]
            # other units, or another capability: nothing was programmed there
            if (before.seat.capability, before.seat.units) != (
                after.seat.capability, after.seat.units,
            ):  # fmt: skip
                del kept[name]
        return CardState(books, kept)

    def with_image(self, name: SliceId, image: str) -> CardState:
        """After a slice was programmed; that is a change of the books as well."""
        return replace(self, books=self.books.changed(), images={**self.images, name: image})


def form_of_state(state: CardState) -> dict[str, Any]:
    """As it is kept."""
    books = state.books
    return {
        "version": _VERSION,
        "adapter": form_of_adapter(books.adapter),
        "slices": [form_of_slice(one) for one in books.slices.values()],
        "reservations": [form_of_reservation(one) for one in books.reservations.values()],
        "generation": books.generation,
        "serials": books.serials,
        "images": dict(state.images),
    }


def read_state(form: object, adapter: Adapter) -> CardState:
    """The reverse of `form_of_state`.

    Args:
        form: what was kept.
        adapter: the card as it is now; it may have become larger, but its slices must fit.

    Raises:
        StateDamagedError: not what the firmware wrote, of another card, or not possible on it.
    """
    try:
        state = _read(Fields(form), adapter)
    except InvalidValueError as error:
        raise StateDamagedError(f"the card's state: {error}") from None
    faults = find_faults(state.books)
    if faults:
        raise StateDamagedError(f"the card's state does not fit the card: {'; '.join(faults[:3])}")
    return state


def _read(fields: Fields, adapter: Adapter) -> CardState:
    version = fields.number("version")
    if version != _VERSION:
        raise fields.fail("version", f"is not {_VERSION}")
    serial = read_adapter(fields.table("adapter")).serial
    if serial != adapter.serial:
        raise InvalidValueError("adapter.serial", serial, f"is not this card, {adapter.serial}")
    slices = [read_slice(entry) for entry in fields.tables("slices")]
    promises = [read_reservation(entry) for entry in fields.tables("reservations")]
    images = fields.table("images")
    state = CardState(
        AdapterBooks(
            adapter,
            {one.id: one for one in slices},
            {one.id: one for one in promises},
            fields.number("generation"),
            fields.number("serials"),
        ),
        {one.id: images.text(one.id, most=MAX_NAME) for one in slices if images.has(one.id)},
    )
    images.finish()
    fields.finish()
    return state
