"""Adapters and slices as tables: on the wire, in a card's state, and in slice files. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.adapter import (
    MAX_BANDWIDTH,
    MAX_CORES,
    MAX_KEYS,
    MAX_LANES,
    MAX_PRIORITY,
    MAX_UNITS,
    Adapter,
    AdapterId,
    Extent,
    Reservation,
    ReservationId,
    Seat,
    Slice,
    SliceId,
    SliceSpec,
)
from virtfabric.model.capability import parse_capability
from virtfabric.model.units import MAX_BYTES

if TYPE_CHECKING:
    from virtfabric.protocol.fields import Fields

MAX_NAME: Final = 128


def form_of_adapter(adapter: Adapter) -> dict[str, Any]:
    """An adapter as a table."""
    return {
        "serial": adapter.serial, "cores": adapter.cores, "memory": adapter.memory,
        "lanes": adapter.lanes, "keys": adapter.keys, "bandwidth": adapter.bandwidth,
        "accelerators": dict(adapter.accelerators), "site": adapter.site,
    }  # fmt: skip


def read_adapter(fields: Fields) -> Adapter:
    """The reverse of `form_of_adapter`.

    Raises:
        InvalidValueError: names the field.
    """
    accelerators = fields.figures("accelerators", {})
    for capability, units in accelerators.items():
        parse_capability(capability, field=fields.path("accelerators"))
        if units > MAX_UNITS:
            raise fields.fail("accelerators", f"has more than {MAX_UNITS} units of {capability}")
    adapter = Adapter(
        AdapterId(fields.text("serial", most=MAX_NAME)),
        fields.number("cores", most=MAX_CORES),
        fields.size("memory"),
        fields.number("lanes", most=MAX_LANES),
        fields.number("keys", most=MAX_KEYS),
        fields.number("bandwidth", most=MAX_BANDWIDTH),
        accelerators,
        fields.text("site", "", most=MAX_NAME),
    )
    fields.finish()
    return adapter


def form_of_spec(spec: SliceSpec) -> dict[str, Any]:
    """What a slice is to have, as a table; a bandwidth of 0 is no limit."""
    return {
        "name": spec.name, "cores": spec.cores, "memory": spec.memory,
        "contiguous": spec.contiguous, "lanes": spec.lanes, "capability": spec.capability,
        "units": spec.units, "keys": spec.keys,
        "qos": {
            "priority": spec.priority, "bandwidth": spec.bandwidth or 0,
            "reclaimable": spec.reclaimable,
        },
    }  # fmt: skip


def read_spec(fields: Fields) -> SliceSpec:
    """The reverse of `form_of_spec`; what is left out has its default, units 1 with a capability.

    Raises:
        InvalidValueError: names the field.
    """
    qos = fields.table("qos", {})
    capability = fields.text("capability", "", most=MAX_NAME, empty=True)
    if capability:
        parse_capability(capability, field=fields.path("capability"))
    spec = SliceSpec(
        name=fields.text("name", "", most=MAX_NAME, empty=True),
        cores=fields.number("cores", 0, most=MAX_CORES),
        memory=fields.size("memory", 0),
        contiguous=fields.flag("contiguous", default=False),
        lanes=fields.number("lanes", 0, most=MAX_LANES),
        capability=capability,
        units=fields.number("units", 1 if capability else 0, most=MAX_UNITS),
        keys=fields.number("keys", 1, least=1, most=MAX_KEYS),
        priority=qos.number("priority", 50, most=MAX_PRIORITY),
        bandwidth=qos.number("bandwidth", 0, most=MAX_BANDWIDTH) or None,
        reclaimable=qos.flag("reclaimable", default=True),
    )
    qos.finish()
    fields.finish()
    return spec.check(fields.path(""))


def form_of_slice(one: Slice) -> dict[str, Any]:
    """A slice that is there, as a table."""
    seat = one.seat
    return {
        "id": one.id, "holder": one.holder, "request": one.request, "spec": form_of_spec(one.spec),
        "seat": {
            "cores": list(seat.cores), "memory": [list(piece) for piece in seat.memory],
            "lanes": list(seat.lanes), "keys": list(seat.keys), "capability": seat.capability,
            "units": list(seat.units), "bandwidth": seat.bandwidth,
        },
    }  # fmt: skip


def read_slice(fields: Fields) -> Slice:
    """The reverse of `form_of_slice`.

    Raises:
        InvalidValueError: names the field.
    """
    one = Slice(
        SliceId(fields.text("id", most=MAX_NAME)),
        read_spec(fields.table("spec")),
        _read_seat(fields.table("seat")),
        fields.text("holder", "", most=MAX_NAME, empty=True),
        fields.text("request", "", most=MAX_NAME, empty=True),
    )
    fields.finish()
    return one


def _read_seat(fields: Fields) -> Seat:
    seat = Seat(
        fields.numbers("cores", most=MAX_CORES - 1),
        _read_pieces(fields),
        fields.numbers("lanes", most=MAX_LANES - 1),
        fields.numbers("keys", most=MAX_KEYS),
        fields.text("capability", "", most=MAX_NAME, empty=True),
        fields.numbers("units", most=MAX_UNITS - 1),
        fields.number("bandwidth", most=MAX_BANDWIDTH),
    )
    fields.finish()
    return seat


def _read_pieces(fields: Fields) -> tuple[Extent, ...]:
    pieces = []
    for entry in fields.rows("memory", 2, most=MAX_BYTES):
        if not entry[1]:
            raise fields.fail("memory", "holds a piece of 0 bytes")
        pieces.append(Extent(entry[0], entry[1]))
    return tuple(pieces)


def form_of_reservation(reservation: Reservation) -> dict[str, Any]:
    """A promise as a table."""
    return {
        "id": reservation.id, "slice": form_of_slice(reservation.slice),
        "victims": list(reservation.victims), "replaces": reservation.replaces,
    }  # fmt: skip


def read_reservation(fields: Fields) -> Reservation:
    """The reverse of `form_of_reservation`.

    Raises:
        InvalidValueError: names the field.
    """
    reservation = Reservation(
        ReservationId(fields.text("id", most=MAX_NAME)),
        read_slice(fields.table("slice")),
        tuple(SliceId(name) for name in fields.texts("victims")),
        fields.flag("replaces"),
    )
    fields.finish()
    return reservation
