"""Messages to frames and back: kinds, who may send them, and their bodies. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from virtfabric.model.adapter import ReservationId, SliceId
from virtfabric.model.badge import BADGE_DIGITS
from virtfabric.model.capability import parse_capability
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.image import ImageManifest, Phase
from virtfabric.protocol import messages as m
from virtfabric.protocol.adapterforms import (
    MAX_NAME,
    form_of_adapter,
    form_of_reservation,
    form_of_slice,
    form_of_spec,
    read_adapter,
    read_reservation,
    read_slice,
    read_spec,
)
from virtfabric.protocol.fields import Fields, format_json, parse_json
from virtfabric.protocol.frames import Frame
from virtfabric.protocol.hostkinds import HOST_KINDS
from virtfabric.protocol.kind import BOTH, CARD, HOST, Kind
from virtfabric.protocol.messages import Message, Role

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION: Final = 1
VERSIONS: Final = (VERSION,)
"""Versions that this code speaks."""
MAX_IMAGE: Final = 1 << 30
"""Bytes. The largest FPGAs of today take bitstreams of 200 MiB."""
_DIGEST_TEXT: Final = 64
_SIGNATURE_TEXT: Final = 128
_MAX_DETAIL: Final = 500
_BADGE: Final = re.compile(rf"[0-9a-f]{{{BADGE_DIGITS}}}")

M = TypeVar("M", bound=Message)


def encode(message: Message, number: int, about: int = 0, *, version: int = VERSION) -> bytes:
    """The frame of a message.

    Raises:
        InvalidValueError: it is larger than a frame can be.
    """
    kind = BY_TYPE[type(message)]
    tail = message.data if isinstance(message, m.ImageData) else b""
    body = format_json(kind.form(message))
    return Frame(version, kind.code, number, about, body, tail).encode()


def decode(frame: Frame) -> Message:
    """The message of a frame whose kind is known.

    Raises:
        InvalidValueError: names the field.
    """
    kind = BY_CODE[frame.kind]
    if frame.tail and kind.type is not m.ImageData:
        raise InvalidValueError("tail", len(frame.tail), f"bytes are too many for {kind.name}")
    fields = parse_json(frame.body)
    message = kind.read(fields, frame.tail)
    fields.finish()
    return message


# -- bodies -----------------------------------------------------------------------------------


def _nothing(_message: Message) -> dict[str, Any]:
    return {}


def _form_of_hello(hello: m.Hello) -> dict[str, Any]:
    return {
        "role": hello.role, "serial": hello.serial, "software": hello.software,
        "boot": hello.boot, "versions": list(hello.versions),
    }  # fmt: skip


def _read_hello(fields: Fields, _tail: bytes) -> m.Hello:
    return m.Hello(
        fields.choice("role", Role), fields.text("serial", most=MAX_NAME),
        fields.text("software", most=MAX_NAME), fields.text("boot", most=MAX_NAME),
        fields.numbers("versions", most=255),
    )  # fmt: skip


def _form_of_error(error: m.Error) -> dict[str, Any]:
    return {
        "code": error.code, "detail": _plain(error.detail)[:_MAX_DETAIL],
        "field": _plain(error.field)[:MAX_NAME],
        "reason": error.reason, "would_fit": dict(error.would_fit),
        "versions": list(error.versions), "fatal": error.fatal,
    }  # fmt: skip


def _plain(text: str) -> str:
    """Without the halves of characters that JSON can hold and a peer refuses."""
    return text.encode(errors="replace").decode()


def _read_error(fields: Fields, _tail: bytes) -> m.Error:
    return m.Error(
        fields.choice("code", m.ErrorCode), fields.text("detail", empty=True),
        fields.text("field", "", most=MAX_NAME, empty=True),
        fields.text("reason", "", most=MAX_NAME, empty=True), fields.figures("would_fit", {}),
        fields.numbers("versions", (), most=255), fields.flag("fatal", default=False),
    )  # fmt: skip


def _form_of_inventory(inventory: m.Inventory) -> dict[str, Any]:
    slices = [
        {"slice": form_of_slice(r.slice), "phase": r.phase, "image": r.image, "badge": r.badge}
        for r in inventory.slices
    ]
    return {
        "adapter": form_of_adapter(inventory.adapter), "slices": slices,
        "reservations": [form_of_reservation(r) for r in inventory.reservations],
        "generation": inventory.generation,
    }  # fmt: skip


def _read_inventory(fields: Fields, _tail: bytes) -> m.Inventory:
    return m.Inventory(
        read_adapter(fields.table("adapter")),
        tuple(_read_report(entry) for entry in fields.tables("slices")),
        tuple(read_reservation(entry) for entry in fields.tables("reservations")),
        fields.number("generation"),
    )


def _read_report(fields: Fields) -> m.SliceReport:
    report = m.SliceReport(
        read_slice(fields.table("slice")), fields.choice("phase", Phase),
        fields.text("image", most=MAX_NAME, empty=True),
        fields.text("badge", "", most=BADGE_DIGITS, empty=True),
    )  # fmt: skip
    if report.badge and not _BADGE.fullmatch(report.badge):
        raise fields.fail("badge", f"is not {BADGE_DIGITS} hexadecimal digits")
    fields.finish()
    return report


def _form_of_telemetry(telemetry: m.Telemetry) -> dict[str, Any]:
    readings = [{"subject": r.subject, "values": dict(r.values)} for r in telemetry.readings]
    return {"at_ms": telemetry.at_ms, "readings": readings}


def _read_telemetry(fields: Fields, _tail: bytes) -> m.Telemetry:
    readings = []
    for entry in fields.tables("readings"):
        readings.append(m.Reading(entry.text("subject", most=MAX_NAME), entry.figures("values")))
        entry.finish()
    return m.Telemetry(fields.number("at_ms"), tuple(readings))


def _form_of_request(request: m.AllocationRequest) -> dict[str, Any]:
    return {
        "request": request.request, "spec": form_of_spec(request.spec), "holder": request.holder,
        "slice": request.slice, "reclaim": request.reclaim,
    }  # fmt: skip


def _read_request(fields: Fields, _tail: bytes) -> m.AllocationRequest:
    return m.AllocationRequest(
        fields.text("request", most=MAX_NAME), read_spec(fields.table("spec")),
        fields.text("holder", "", most=MAX_NAME, empty=True),
        fields.text("slice", "", most=MAX_NAME, empty=True), fields.flag("reclaim", default=True),
    )  # fmt: skip


def _form_of_decision(decision: m.Decision) -> dict[str, Any]:
    return {
        "reservation": decision.reservation, "slice": form_of_slice(decision.slice),
        "victims": list(decision.victims), "expires_ms": decision.expires_ms,
    }  # fmt: skip


def _read_decision(fields: Fields, _tail: bytes) -> m.Decision:
    return m.Decision(
        ReservationId(fields.text("reservation", most=MAX_NAME)),
        read_slice(fields.table("slice")),
        tuple(SliceId(name) for name in fields.texts("victims")),
        fields.number("expires_ms"),
    )


def form_of_manifest(image: ImageManifest) -> dict[str, Any]:
    """What a signer said of an image, as a table."""
    return {
        "name": image.name, "capability": image.capability, "size": image.size,
        "digest": image.digest, "not_after": image.not_after,
    }  # fmt: skip


def read_manifest(fields: Fields) -> tuple[ImageManifest, str]:
    """The reverse, with the signature beside it.

    Raises:
        InvalidValueError: names the field.
    """
    name = fields.text("name", most=MAX_NAME)
    if not name.isprintable():  # the signature is over lines
        raise fields.fail("name", "cannot be printed")
    capability = parse_capability(fields.text("capability", most=MAX_NAME))
    manifest = ImageManifest(
        name, capability, fields.number("size", least=1, most=MAX_IMAGE),
        _hexadecimal(fields, "digest", _DIGEST_TEXT), fields.number("not_after"),
    )  # fmt: skip
    return manifest, _hexadecimal(fields, "signature", _SIGNATURE_TEXT)


def _form_of_configure(configure: m.Configure) -> dict[str, Any]:
    return {
        "slice": configure.slice, **form_of_manifest(configure.manifest),
        "signature": configure.signature,
    }  # fmt: skip


def _read_configure(fields: Fields, _tail: bytes) -> m.Configure:
    manifest, signature = read_manifest(fields)
    return m.Configure(fields.text("slice", most=MAX_NAME), manifest, signature)


def _hexadecimal(fields: Fields, name: str, length: int) -> str:
    text = fields.text(name, most=length)
    if len(text) != length or not set(text) <= set("0123456789abcdef"):
        raise fields.fail(name, f"is not {length} lower-case hexadecimal digits")
    return text


def _form_of_progress(progress: m.Progress) -> dict[str, Any]:
    return {
        "slice": progress.slice, "phase": progress.phase, "done": progress.done,
        "total": progress.total, "detail": progress.detail[:_MAX_DETAIL],
    }  # fmt: skip


def _read_progress(fields: Fields, _tail: bytes) -> m.Progress:
    return m.Progress(
        SliceId(fields.text("slice", most=MAX_NAME)), fields.choice("phase", Phase),
        fields.number("done"), fields.number("total"), fields.text("detail", "", empty=True),
    )  # fmt: skip


def _form_of_event(event: m.Event) -> dict[str, Any]:
    return {
        "what": event.what, "at_ms": event.at_ms, "detail": event.detail[:_MAX_DETAIL],
        "slice": event.slice,
    }  # fmt: skip


def _read_event(fields: Fields, _tail: bytes) -> m.Event:
    return m.Event(
        fields.choice("what", m.EventKind), fields.number("at_ms"),
        fields.text("detail", empty=True), fields.text("slice", "", most=MAX_NAME, empty=True),
    )  # fmt: skip


def _named(field_name: str, kind: type[M]) -> tuple[Callable[[M], dict[str, Any]], Any]:
    """Form and reader of a message that only names something."""

    def form(message: M) -> dict[str, Any]:
        return {field_name: getattr(message, field_name)}

    def read(fields: Fields, _tail: bytes) -> Message:
        return cast(Message, cast(Any, kind)(fields.text(field_name, most=MAX_NAME)))

    return form, read


KINDS: Final[tuple[Kind, ...]] = (
    Kind(0x01, m.Hello, BOTH, _form_of_hello, _read_hello),
    Kind(0x02, m.Heartbeat, BOTH, lambda beat: {"beat": beat.beat},
         lambda fields, _: m.Heartbeat(fields.number("beat"))),
    Kind(0x03, m.Error, BOTH, _form_of_error, _read_error),
    Kind(0x04, m.Done, BOTH, _nothing, lambda _, __: m.Done()),
    Kind(0x10, m.InventoryRequest, HOST, _nothing, lambda _, __: m.InventoryRequest()),
    Kind(0x11, m.Inventory, CARD, _form_of_inventory, _read_inventory),
    Kind(0x12, m.Telemetry, BOTH, _form_of_telemetry, _read_telemetry),
    Kind(0x13, m.Event, CARD, _form_of_event, _read_event),
    Kind(0x20, m.AllocationRequest, HOST, _form_of_request, _read_request),
    Kind(0x21, m.Decision, CARD, _form_of_decision, _read_decision),
    Kind(0x22, m.Commit, HOST, *_named("reservation", m.Commit)),
    Kind(0x23, m.Abort, HOST, *_named("reservation", m.Abort)),
    Kind(0x24, m.Grant, CARD,
         lambda grant: {"slice": form_of_slice(grant.slice), "generation": grant.generation},
         lambda fields, _: m.Grant(read_slice(fields.table("slice")), fields.number("generation"))),
    Kind(0x25, m.Assign, HOST,
         lambda assign: {"slice": assign.slice, "holder": assign.holder},
         lambda fields, _: m.Assign(fields.text("slice", most=MAX_NAME),
                                    fields.text("holder", most=MAX_NAME, empty=True))),
    Kind(0x26, m.Release, HOST, *_named("slice", m.Release)),
    Kind(0x30, m.Configure, HOST, _form_of_configure, _read_configure),
    Kind(0x31, m.ImageData, HOST,
         lambda data: {"slice": data.slice, "offset": data.offset},
         lambda fields, tail: m.ImageData(fields.text("slice", most=MAX_NAME),
                                          fields.number("offset"), tail)),
    Kind(0x32, m.Progress, CARD, _form_of_progress, _read_progress),
    *HOST_KINDS,
)  # fmt: skip
BY_CODE: Final = {kind.code: kind for kind in KINDS}
BY_TYPE: Final = {kind.type: kind for kind in KINDS}
