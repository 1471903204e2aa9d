"""Adapters: offload cards that can be divided, and their slices.

An adapter is what a card has; a slice is an isolated part of it; its seat says which cores, pieces
of memory, lanes, protection keys and accelerator units exactly. Sizes are bytes, bandwidth is
Mbit/s. Which part a slice gets is for `policy.seating` to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NewType

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import MIB, Bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

AdapterId = NewType("AdapterId", str)
"""The serial number that the card's certificate names."""
SliceId = NewType("SliceId", str)
ReservationId = NewType("ReservationId", str)

GRANULE: Final = MIB
"""Bytes. Memory is protected, and so divided, in units of this."""
FIRMWARE_KEY: Final = 0
"""The protection key of the firmware itself; no slice ever has it."""
MAX_CORES: Final = 1024
MAX_LANES: Final = 64
MAX_KEYS: Final = 1024
MAX_UNITS: Final = 1024
MAX_BANDWIDTH: Final = 10**7
"""Mbit/s: ten times what a x16 link of PCIe 7.0 carries."""
MAX_PRIORITY: Final = 100
LINK_WIDTHS: Final = (0, 1, 2, 4, 8, 16, 32)
"""Lanes of one link (PCI Express Base 6.0, 7.5.3.6). 0: none of its own, it shares the card's."""


class Extent(NamedTuple):
    """A contiguous piece of an adapter's memory."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.size

    def __str__(self) -> str:
        return f"{self.start:#x}+{Bytes(self.size)}"


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one card has.

    Attributes:
        keys: how many protection keys slices may have; they are numbered from 1.
        bandwidth: of the interconnect between its parts and the host, Mbit/s.
        accelerators: units by capability (`crypto.aes`); a unit does nothing before an image.
        site: where it is, as pools know it (`node:0`, `host-a/node:0`).
    """

    serial: AdapterId
    cores: int
    memory: Bytes
    lanes: int
    keys: int
    bandwidth: int
    accelerators: Mapping[str, int] = field(default_factory=dict)
    site: str = ""


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """What a slice is to have.

    Attributes:
        contiguous: memory in one piece, and so on one card.
        lanes: width of its own link, one of `LINK_WIDTHS`.
        capability: what `units` accelerators are to do; empty exactly when `units` is 0.
        keys: protection keys, at least one: what isolates the slice.
        priority: 0 to 100; a higher one may take a reclaimable slice of a strictly lower one.
        bandwidth: limit in Mbit/s; limits never add up to more than the card has. None: no limit
            and no claim.
        reclaimable: False keeps the slice from any priority.
    """

    cores: int = 0
    memory: Bytes = Bytes(0)
    contiguous: bool = False
    lanes: int = 0
    capability: str = ""
    units: int = 0
    keys: int = 1
    priority: int = 50
    bandwidth: int | None = None
    reclaimable: bool = True
    name: str = ""

    def check(self, prefix: str = "") -> SliceSpec:
        """This, if it can be meant; memory rounded up to whole granules.

        Args:
            prefix: of the field that an error names (`slice.`).

        Raises:
            InvalidValueError: names the field.
        """
        for name, least, most in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InvalidValueError(prefix + name, value, f"is not {least} to {most}")
        if self.lanes not in LINK_WIDTHS:
            widths = ", ".join(map(str, LINK_WIDTHS))
            raise InvalidValueError(prefix + "lanes", self.lanes, f"is not a link width: {widths}")
        if bool(self.capability) != bool(self.units):
            field_name = "units" if self.capability else "capability"
            value = getattr(self, field_name)
            raise InvalidValueError(prefix + field_name, value, "must go with the other of the two")
        if not (self.cores or self.memory or self.lanes or self.units):
            raise InvalidValueError(
                prefix + "cores", self.cores, "is all: cores, memory, lanes and units are 0"
            )
        return replace(self, memory=Bytes(-(-self.memory // GRANULE) * GRANULE))

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SliceSpec:
        """The reverse of `to_json`.

        Raises:
            InvalidValueError: names the field.
        """
        try:
            spec = cls(**{**data, "memory": Bytes(data["memory"])})
            return spec.check("spec.")
        except (TypeError, KeyError, AttributeError) as error:
            raise InvalidValueError("spec", dict(data), f"is incomplete: {error}") from None


_BOUNDS: Final = (
    ("cores", 0, MAX_CORES), ("memory", 0, 1 << 50), ("units", 0, MAX_UNITS),
    ("keys", 1, MAX_KEYS), ("priority", 0, MAX_PRIORITY), ("bandwidth", 1, MAX_BANDWIDTH),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seat:
    """The exact part of one adapter that a slice has; numbers ascend."""

    cores: tuple[int, ...] = ()
    memory: tuple[Extent, ...] = ()
    lanes: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    capability: str = ""
    units: tuple[int, ...] = ()
    bandwidth: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice that is there.

    Attributes:
        holder: who uses it (a guest's UUID); empty while nobody does.
        request: idempotency key of the request that made it; empty for none.
    """

    id: SliceId
    spec: SliceSpec
    seat: Seat
    holder: str = ""
    request: str = ""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slice that is promised, until it is committed or aborted.

    Attributes:
        slice: as it will be; its id is that of `replaces` when it changes one that is there.
        victims: slices that end when it is committed.
        replaces: whether it changes the slice with its id instead of making one.
    """

    id: ReservationId
    slice: Slice
    victims: tuple[SliceId, ...] = ()
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class AdapterBooks:
    """One adapter with what is on it. The generation grows with every change.

    Attributes:
        serials: how many slices and reservations were ever made here: ids are never used twice.
    """

    adapter: Adapter
    slices: Mapping[SliceId, Slice] = field(default_factory=dict)
    reservations: Mapping[ReservationId, Reservation] = field(default_factory=dict)
    generation: int = 0
    serials: int = 0

    def changed(
        self,
        *,
        slices: Mapping[SliceId, Slice] | None = None,
        reservations: Mapping[ReservationId, Reservation] | None = None,
        serials: int | None = None,
    ) -> AdapterBooks:
        """The next generation, with these instead."""
        return AdapterBooks(
            self.adapter,
            self.slices if slices is None else slices,
            self.reservations if reservations is None else reservations,
            self.generation + 1,
            self.serials if serials is None else serials,
        )
