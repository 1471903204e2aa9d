"""The messages of *carded* mode on the wire: kinds, and how bodies are made and read. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.amounts import Tier
from virtfabric.model.decision import Course, Take
from virtfabric.model.want import Mode, Want
from virtfabric.protocol import messages as m
from virtfabric.protocol.adapterforms import MAX_NAME
from virtfabric.protocol.guestforms import form_of_guest, read_guest
from virtfabric.protocol.hostforms import form_of_books, form_of_host, read_books, read_host, unique
from virtfabric.protocol.kind import CARD, HOST, Kind
from virtfabric.protocol.valueforms import form_of_amounts, read_amounts, read_guest_id

if TYPE_CHECKING:
    from virtfabric.protocol.fields import Fields

MAX_PARTS: Final = 256
MAX_LINES: Final = 512
"""Of who was looked at, in a refusal; and characters of one."""
_MAX_DETAIL: Final = 500


def _form_of_picture(picture: m.HostPicture) -> dict[str, Any]:
    form: dict[str, Any] = {
        "picture": picture.picture, "part": picture.part, "parts": picture.parts,
        "guests": [form_of_guest(guest) for guest in picture.guests],
        "books": form_of_books(picture.books),
    }  # fmt: skip
    return form if picture.host is None else form | {"host": form_of_host(picture.host)}


def _read_picture(fields: Fields, _tail: bytes) -> m.HostPicture:
    part, parts = fields.number("part"), fields.number("parts", least=1, most=MAX_PARTS)
    if part >= parts:
        raise fields.fail("part", f"is not below {parts}")
    if fields.has("host") != (part == 0):
        raise fields.fail("part", "has a host, or is the first and has none")
    guests = [read_guest(entry) for entry in fields.tables("guests")]
    unique(fields, "guests", guests, lambda one: one.uuid)
    return m.HostPicture(
        fields.text("picture", most=MAX_NAME), part, parts,
        read_host(fields.table("host")) if part == 0 else None, tuple(guests),
        read_books(fields.table("books")),
    )  # fmt: skip


_WORDS: Final = {"to": (Mode.TO, 1), "more": (Mode.BY, 1), "less": (Mode.BY, -1)}
"""How much is wanted, as the wire has no numbers below zero."""


def _form_of_want(want: Want) -> dict[str, int]:
    if want.mode is Mode.TO:
        return {"to": want.value}
    return {"more": want.value} if want.value >= 0 else {"less": -want.value}


def _read_want(fields: Fields, name: str) -> Want | None:
    if not fields.has(name):
        return None
    found = fields.figures(name)
    if len(found) != 1 or not found.keys() <= _WORDS.keys():
        raise fields.fail(name, f"is not one of {', '.join(_WORDS)}")
    ((word, value),) = found.items()
    mode, sign = _WORDS[word]
    return Want(mode, sign * value)


def _form_of_request(request: m.HostRequest) -> dict[str, Any]:
    form: dict[str, Any] = {
        "picture": request.picture, "request": request.request, "guest": request.guest,
        "partial": request.partial,
        "caps": [{"guest": g, "amounts": form_of_amounts(a)} for g, a in request.caps.items()],
    }  # fmt: skip
    for name, want in (("cpu", request.cpu), ("memory", request.memory)):
        if want is not None:
            form[name] = _form_of_want(want)
    return form if request.tier is None else form | {"tier": request.tier}


def _read_request(fields: Fields, _tail: bytes) -> m.HostRequest:
    caps = []
    for entry in fields.tables("caps"):
        caps.append((read_guest_id(entry, "guest"), read_amounts(entry, "amounts")))
        entry.finish()
    unique(fields, "caps", caps, lambda one: one[0])
    return m.HostRequest(
        fields.text("picture", most=MAX_NAME), fields.text("request", most=MAX_NAME),
        read_guest_id(fields, "guest"), _read_want(fields, "cpu"), _read_want(fields, "memory"),
        fields.choice("tier", Tier) if fields.has("tier") else None, fields.flag("partial"),
        dict(caps),
    )  # fmt: skip


def _form_of_decision(decision: m.HostDecision) -> dict[str, Any]:
    return {
        "picture": decision.picture, "request": decision.request,
        "gains": form_of_amounts(decision.delta.positive()),
        "gives": form_of_amounts((-decision.delta).positive()),
        "takes": [
            {"victim": t.victim, "amounts": form_of_amounts(t.amounts)} for t in decision.takes
        ],
    }  # fmt: skip


def _read_decision(fields: Fields, _tail: bytes) -> m.HostDecision:
    gains, gives = read_amounts(fields, "gains"), read_amounts(fields, "gives")
    if set(gains) & set(gives):  # an absent amount counts as there, with 0
        raise fields.fail("gives", "has what is gained as well")
    takes = [_read_take(entry) for entry in fields.tables("takes")]
    unique(fields, "takes", takes, lambda take: take.victim)
    return m.HostDecision(
        fields.text("picture", most=MAX_NAME), fields.text("request", most=MAX_NAME),
        gains - gives, tuple(takes),
    )  # fmt: skip


def _read_take(fields: Fields) -> Take:
    take = Take(read_guest_id(fields, "victim"), read_amounts(fields, "amounts"))
    fields.finish()
    return take


def _form_of_refusal(refusal: m.HostRefusal) -> dict[str, Any]:
    return {
        "picture": refusal.picture, "request": refusal.request, "reason": refusal.reason,
        "detail": refusal.detail[:_MAX_DETAIL], "would_fit": dict(refusal.would_fit),
        "considered": [line[:_MAX_DETAIL] for line in refusal.considered[:MAX_LINES]],
    }  # fmt: skip


def _read_refusal(fields: Fields, _tail: bytes) -> m.HostRefusal:
    return m.HostRefusal(
        fields.text("picture", most=MAX_NAME), fields.text("request", most=MAX_NAME),
        fields.text("reason", most=MAX_NAME), fields.text("detail", empty=True),
        fields.figures("would_fit"), fields.texts("considered"),
    )  # fmt: skip


def _form_of_outcome(outcome: m.HostOutcome) -> dict[str, Any]:
    return {
        "request": outcome.request, "course": outcome.course,
        "detail": outcome.detail[:_MAX_DETAIL],
    }  # fmt: skip


def _read_outcome(fields: Fields, _tail: bytes) -> m.HostOutcome:
    return m.HostOutcome(
        fields.text("request", most=MAX_NAME), fields.choice("course", Course),
        fields.text("detail", "", empty=True),
    )  # fmt: skip


HOST_KINDS: Final = (
    Kind(0x40, m.HostPicture, HOST, _form_of_picture, _read_picture),
    Kind(0x41, m.HostRequest, HOST, _form_of_request, _read_request),
    Kind(0x42, m.HostDecision, CARD, _form_of_decision, _read_decision),
    Kind(0x43, m.HostRefusal, CARD, _form_of_refusal, _read_refusal),
    Kind(0x44, m.HostOutcome, HOST, _form_of_outcome, _read_outcome),
)
