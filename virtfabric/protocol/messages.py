"""Messages between a card and a host: what each says. Pure; how they lie on the wire is `codec`'s.

A message answers another where its frame names that one's number. Requests are answered once: by
what the table in docs/card-protocol.md names, or by an `Error`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from virtfabric.model.image import Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.adapter import (
        Adapter,
        Reservation,
        ReservationId,
        Slice,
        SliceId,
        SliceSpec,
    )
    from virtfabric.model.amounts import Amounts, Tier
    from virtfabric.model.decision import Course, Take
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.image import ImageManifest
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.model.want import Want


class Role(StrEnum):
    """What a peer is, by its certificate."""

    CARD = "card"
    HOST = "host"


class ErrorCode(StrEnum):
    """What was wrong with a frame. Published; never renamed."""

    BROKEN_FRAMING = "broken-framing"
    IDENTITY_MISMATCH = "identity-mismatch"
    INTERNAL = "internal"
    INVALID_MESSAGE = "invalid-message"
    NO_COMMON_VERSION = "no-common-version"
    OUT_OF_ORDER = "out-of-order"
    REFUSED = "refused"
    """The message was right, the answer is no: `reason` says why."""
    UNEXPECTED_MESSAGE = "unexpected-message"
    UNKNOWN_MESSAGE = "unknown-message"
    UNSUPPORTED_VERSION = "unsupported-version"


class EventKind(StrEnum):
    """What a card tells by itself."""

    ACCESS_FAULT = "access-fault"
    DMA_REFUSED = "dma-refused"
    RESERVATION_EXPIRED = "reservation-expired"
    SLICE_RECLAIMED = "slice-reclaimed"
    STATE_RESTORED = "state-restored"


class Message:
    """Base of all messages."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The first message each way. `boot` differs after each start of the sender."""

    role: Role
    serial: str
    software: str
    boot: str
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    """A sign of life, answered by the same one; an answer is not answered."""

    beat: int


@dataclass(frozen=True, slots=True)
class Error(Message):
    """Something cannot be done or read. The connection lives on unless it is `fatal`.

    Attributes:
        field: of the message that is meant, if one is.
        reason: code of the refusal (`no-capacity`), with code `refused` only.
        would_fit: what could be had now instead.
        versions: those that the sender speaks.
    """

    code: ErrorCode
    detail: str
    field: str = ""
    reason: str = ""
    would_fit: Mapping[str, int] = dataclasses.field(default_factory=dict)
    versions: tuple[int, ...] = ()
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Done(Message):
    """What was asked for has happened, and is kept."""


@dataclass(frozen=True, slots=True)
class InventoryRequest(Message):
    """Asks a card for all that it has."""


@dataclass(frozen=True, slots=True)
class SliceReport:
    """A slice as its card sees it.

    Attributes:
        image: the one that it is programmed with.
        badge: code that its PCI function shows, 32 hexadecimal digits; empty where it has none.
    """

    slice: Slice
    phase: Phase = Phase.BLANK
    image: str = ""
    badge: str = ""


@dataclass(frozen=True, slots=True)
class Inventory(Message):
    """All that a card has. A new `generation` says that something changed."""

    adapter: Adapter
    slices: tuple[SliceReport, ...]
    reservations: tuple[Reservation, ...]
    generation: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Figures of one subject: `adapter`, a slice, or a guest's UUID."""

    subject: str
    values: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Telemetry(Message):
    """Figures as they are, from either side; `at_ms` counts from the sender's start."""

    at_ms: int
    readings: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class AllocationRequest(Message):
    """Asks for a new slice, or (`slice`) for other amounts of one that is there.

    Attributes:
        request: idempotency key: a repeated one is answered as the first was.
        holder: who is to use it (a guest's UUID); empty for nobody yet.
        reclaim: whether slices of lower priority may have to make way.
    """

    request: str
    spec: SliceSpec
    holder: str = ""
    slice: str = ""
    reclaim: bool = True


@dataclass(frozen=True, slots=True)
class Decision(Message):
    """What a card promises: a reservation, which ends by itself when it is not committed in time.

    Attributes:
        slice: as it will be.
        victims: slices that will end for it.
    """

    reservation: ReservationId
    slice: Slice
    victims: tuple[SliceId, ...]
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Commit(Message):
    """Makes a decision true."""

    reservation: str


@dataclass(frozen=True, slots=True)
class Abort(Message):
    """Takes a decision back."""

    reservation: str


@dataclass(frozen=True, slots=True)
class Grant(Message):
    """A slice is there, as kept by the card through loss of power."""

    slice: Slice
    generation: int


@dataclass(frozen=True, slots=True)
class Assign(Message):
    """Gives a slice to a holder, or (empty) takes it back from one."""

    slice: str
    holder: str


@dataclass(frozen=True, slots=True)
class Release(Message):
    """Ends a slice."""

    slice: str


@dataclass(frozen=True, slots=True)
class Configure(Message):
    """Begins to program a slice. The image's bytes follow as `ImageData`."""

    slice: str
    manifest: ImageManifest
    signature: str
    """Ed25519 over `ImageManifest.signed_bytes()`, in hexadecimal."""


@dataclass(frozen=True, slots=True)
class ImageData(Message):
    """Bytes of an image, in order."""

    slice: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """How far the programming of a slice is: `done` of `total` bytes in this phase.

    In phase `ready` or `blank` it has ended; `detail` then says what failed, if something did, and
    the phase is that of before.
    """

    slice: SliceId
    phase: Phase
    done: int
    total: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Event(Message):
    """Something happened on a card."""

    what: EventKind
    at_ms: int
    detail: str
    slice: str = ""


# -- carded mode: the card decides about the host ---------------------------------------------


@dataclass(frozen=True, slots=True)
class HostPicture(Message):
    """A part of what a host is; the last one makes it whole, and the one before is forgotten.

    Attributes:
        picture: its name, another one for each that differs.
        part: from 0, one after the other.
        host: without guests and books; with part 0 only.
        books: of any guests.
    """

    picture: str
    part: int
    parts: int
    host: HostSnapshot | None
    guests: tuple[GuestState, ...]
    books: Books


@dataclass(frozen=True, slots=True)
class HostRequest(Message):
    """Asks a card to decide about CPU and memory of a guest.

    Attributes:
        picture: of the host as it is now.
        wants: by how much, or to what; `tier` says which memory, None where nobody named it.
        partial: take what fits.
        caps: the most that a guest can give, in every resource; others have no such bound.
    """

    picture: str
    request: str
    guest: GuestId
    cpu: Want | None
    memory: Want | None
    tier: Tier | None
    partial: bool
    caps: Mapping[GuestId, Amounts]


@dataclass(frozen=True, slots=True)
class HostDecision(Message):
    """Who gets, and who pays, on the host of this picture."""

    picture: str
    request: str
    delta: Amounts
    takes: tuple[Take, ...]


@dataclass(frozen=True, slots=True)
class HostRefusal(Message):
    """It cannot be, and why; `would_fit` could be had instead."""

    picture: str
    request: str
    reason: str
    detail: str
    would_fit: Mapping[str, int]
    considered: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostOutcome(Message):
    """What became of a decision."""

    request: str
    course: Course
    detail: str
