"""The checks of the conformance suite, in the order of docs/card-protocol.md."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from virtfabric.adapters.cardlink.conformance import (
    Bench,
    Check,
    SkippedCheckError,
    answered,
    forget_all,
)
from virtfabric.adapters.cardlink.visitor import FailedCheckError, expect
from virtfabric.model.adapter import AdapterBooks, SliceSpec
from virtfabric.model.errors import InvalidValueError, Reason
from virtfabric.model.image import ImageManifest, Phase
from virtfabric.policy.slicecheck import find_faults
from virtfabric.protocol import messages as m
from virtfabric.protocol.codec import encode
from virtfabric.protocol.frames import HEADER_SIZE, MAX_BODY, MAX_TAIL, Frame
from virtfabric.protocol.imagefile import SUFFIX, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.adapters.cardlink.visitor import Visitor
    from virtfabric.model.adapter import Slice

CHECKS: Final[list[Check]] = []
PROMISE_S: Final = 30.0
_SMALL: Final = SliceSpec(cores=1, priority=40, name="conformance").check()
_UNUSED_KIND: Final = 0x7E


def _check(area: str, name: str) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    def register(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        CHECKS.append(Check(area, name, run))
        return run

    return register


# -- session ----------------------------------------------------------------------------------


@_check("session", "proves who it is")
def _proves(bench: Bench) -> None:
    with bench.visit() as visitor:
        expect(visitor.is_open, f"has no session for a host of its authority: {visitor.ended_by}")


@_check("session", "refuses a host of another authority")
def _refuses_strangers(bench: Bench) -> None:
    with bench.visit(bench.stranger()) as visitor:
        if visitor.is_open:  # TLS 1.3 tells a client late
            visitor.say(visitor.hello())
            expect(visitor.hear() is None, "talked to a stranger")


@_check("session", "speaks nothing older than TLS 1.3")
def _refuses_old_tls(bench: Bench) -> None:
    with bench.visit(bench.old) as visitor:
        expect(not visitor.is_open, "speaks TLS 1.2")


# -- greeting ---------------------------------------------------------------------------------


@_check("greeting", "says hello first, in its own name, and speaks version 1")
def _says_hello(bench: Bench) -> None:
    with bench.visit() as visitor:
        hello = visitor.greet()
        expect(hello.role == m.Role.CARD, f"says that it is a {hello.role}")
        expect(hello.serial == bench.serial, f"says that it is {hello.serial}")
        expect(1 in hello.versions, f"speaks {hello.versions}")
        expect(hello.boot, "has no boot")


@_check("greeting", "takes nothing before a hello")
def _takes_no_other(bench: Bench) -> None:
    with bench.visit() as visitor:
        visitor.say(m.InventoryRequest())
        _ends(visitor, m.ErrorCode.UNEXPECTED_MESSAGE)


@_check("greeting", "ends a link without a common version, and says what it speaks")
def _no_common_version(bench: Bench) -> None:
    with bench.visit() as visitor:
        visitor.say(visitor.hello(versions=(255,)))
        error = _ends(visitor, m.ErrorCode.NO_COMMON_VERSION)
        expect(1 in error.versions, "does not say what it speaks")


@_check("greeting", "ends a link with a hello in another's name")
def _another_name(bench: Bench) -> None:
    with bench.visit() as visitor:
        visitor.say(visitor.hello(serial="somebody-else"))
        _ends(visitor, m.ErrorCode.IDENTITY_MISMATCH)


def _ends(visitor: Visitor, code: m.ErrorCode) -> m.Error:
    error = visitor.hear_end()
    if error is None:
        raise FailedCheckError("ended the link without a word")
    expect(error.code == code, f"said {error.code}, not {code}")
    expect(error.fatal, f"did not mark {code} as fatal")
    return error


# -- refusals ---------------------------------------------------------------------------------


def _refuses(bench: Bench, frame: Callable[[Visitor], Frame], code: m.ErrorCode) -> m.Error:
    """One frame is refused with this code, and the link lives."""
    with bench.meet() as visitor:
        number = visitor.say_frame(frame(visitor))
        error: m.Error = answered(visitor.answer_to(number), m.Error)
        expect(error.code == code, f"said {error.code}, not {code}")
        expect(not error.fatal, "ended the link for it")
        answered(visitor.ask(m.Heartbeat(1)), m.Heartbeat)
    return error


def _frame(kind: int, body: bytes = b"{}", *, version: int = 1, about: int = 0) -> Any:
    return lambda visitor: Frame(version, kind, visitor.sent + 1, about, body)


@_check("refusals", "refuses a kind that it does not know")
def _unknown_kind(bench: Bench) -> None:
    _refuses(bench, _frame(_UNUSED_KIND), m.ErrorCode.UNKNOWN_MESSAGE)


@_check("refusals", "refuses a frame of a higher version than agreed")
def _higher_version(bench: Bench) -> None:
    error = _refuses(bench, _frame(0x10, version=9), m.ErrorCode.UNSUPPORTED_VERSION)
    expect(1 in error.versions, "does not say what it speaks")


@_check("refusals", "refuses a frame of a lower version than agreed")
def _lower_version(bench: Bench) -> None:
    _refuses(bench, _frame(0x10, version=0), m.ErrorCode.UNSUPPORTED_VERSION)


@_check("refusals", "refuses a body that is no JSON object")
def _no_json(bench: Bench) -> None:
    for body in (b"", b"[]", b"{", b'{"a":1,"a":1}', b"\xff"):
        _refuses(bench, _frame(0x10, body), m.ErrorCode.INVALID_MESSAGE)


@_check("refusals", "refuses a missing, a wrong and an unknown field, and names it")
def _wrong_fields(bench: Bench) -> None:
    for body, field in (
        (b"{}", "reservation"), (b'{"reservation":7}', "reservation"),
        (b'{"reservation":"r","colour":"red"}', "colour"),
    ):  # fmt: skip
        error = _refuses(bench, _frame(0x22, body), m.ErrorCode.INVALID_MESSAGE)
        expect(error.field == field, f"names field {error.field!r}, not {field!r}")


@_check("refusals", "refuses what only a card may say")
def _cards_message(bench: Bench) -> None:
    body = b'{"what":"access-fault","at_ms":0,"detail":""}'
    _refuses(bench, _frame(0x13, body), m.ErrorCode.UNEXPECTED_MESSAGE)


@_check("refusals", "refuses a second hello")
def _second_hello(bench: Bench) -> None:
    body = b'{"role":"host","serial":"x","software":"x","boot":"x","versions":[1]}'
    _refuses(bench, _frame(0x01, body), m.ErrorCode.UNEXPECTED_MESSAGE)


@_check("refusals", "refuses an answer to what it never said")
def _about_the_future(bench: Bench) -> None:
    _refuses(bench, _frame(0x02, b'{"beat":1}', about=999_999), m.ErrorCode.INVALID_MESSAGE)


@_check("refusals", "answers a heartbeat, and no answer to one")
def _heartbeats(bench: Bench) -> None:
    with bench.meet() as visitor:
        expect(visitor.ask(m.Heartbeat(7)) == m.Heartbeat(7), "answers with another beat")
        silent = visitor.say(m.Heartbeat(8), about=1)
        asked = visitor.say(m.Heartbeat(9))
        while (frame := visitor.next_frame()) is not None:
            expect(frame.about != silent, "answered an answer")
            if frame.about == asked:
                return


# -- framing ----------------------------------------------------------------------------------


@_check("framing", "ends a link on which a frame is replayed")
def _replayed(bench: Bench) -> None:
    with bench.meet() as visitor:
        frame = encode(m.Heartbeat(1), visitor.sent + 1)
        visitor.send(frame + frame)
        _ends(visitor, m.ErrorCode.OUT_OF_ORDER)


@_check("framing", "ends a link on which a frame is missing")
def _missing(bench: Bench) -> None:
    with bench.meet() as visitor:
        visitor.send(encode(m.Heartbeat(1), visitor.sent + 2))
        _ends(visitor, m.ErrorCode.OUT_OF_ORDER)


@_check("framing", "ends a link on what is no frame, or too long for one")
def _no_frame(bench: Bench) -> None:
    header = bytearray(encode(m.Heartbeat(1), 2)[:HEADER_SIZE])
    long_body, long_tail = bytearray(header), bytearray(header)
    long_body[12:16] = (MAX_BODY + 1).to_bytes(4)
    long_tail[16:20] = (MAX_TAIL + 1).to_bytes(4)
    for data in (b"XF" + header[2:], bytes(long_body), bytes(long_tail)):
        with bench.meet() as visitor:
            visitor.send(bytes(data))
            _ends(visitor, m.ErrorCode.BROKEN_FRAMING)


@_check("framing", "survives a link that ends in mid-frame")
def _truncated(bench: Bench) -> None:
    with bench.meet() as visitor:
        visitor.send(encode(m.Heartbeat(1), visitor.sent + 1)[:-1])
    with bench.meet() as visitor:
        answered(visitor.ask(m.Heartbeat(1)), m.Heartbeat)


@_check("framing", "takes frames in any split")
def _split(bench: Bench) -> None:
    with bench.meet() as visitor:
        visitor.sent += 2
        frames = encode(m.Heartbeat(1), visitor.sent - 1) + encode(m.Heartbeat(2), visitor.sent)
        visitor.send(frames, step=1)
        answered(visitor.answer_to(visitor.sent - 1), m.Heartbeat)
        answered(visitor.answer_to(visitor.sent), m.Heartbeat)


# -- slices -----------------------------------------------------------------------------------


def _inventory(visitor: Visitor) -> m.Inventory:
    told: m.Inventory = answered(visitor.ask(m.InventoryRequest()), m.Inventory)
    books = AdapterBooks(
        told.adapter, {r.slice.id: r.slice for r in told.slices},
        {r.id: r for r in told.reservations}, told.generation,
    )  # fmt: skip
    faults = find_faults(books)
    expect(not faults, f"has an inventory that cannot be: {'; '.join(faults[:3])}")
    return told


def _promise(visitor: Visitor, key: str, spec: SliceSpec, **more: Any) -> m.Decision:
    decision: m.Decision = answered(visitor.ask(m.AllocationRequest(key, spec, **more)), m.Decision)
    expect(decision.slice.spec == spec, "promises other amounts than were asked for")
    expect(decision.slice.request == key, "promises under another request")
    return decision


def _grant(visitor: Visitor, key: str, spec: SliceSpec, **more: Any) -> Slice:
    decision = _promise(visitor, key, spec, **more)
    grant: m.Grant = answered(visitor.ask(m.Commit(decision.reservation)), m.Grant)
    expect(grant.slice == decision.slice, "grants otherwise than it promised")
    return grant.slice


def _refused(visitor: Visitor, message: m.Message, reason: Reason) -> m.Error:
    error: m.Error = answered(visitor.ask(message), m.Error)
    expect(error.code == m.ErrorCode.REFUSED, f"said {error.code}, not refused")
    expect(error.reason == reason, f"refuses for {error.reason!r}, not {reason!r}")
    return error


def _room(visitor: Visitor) -> m.Inventory:
    told = _inventory(visitor)
    taken = sum(len(r.slice.seat.cores) for r in told.slices)
    if told.adapter.cores - taken < 2 or told.slices:
        raise SkippedCheckError("it needs a card with two cores and without slices")
    return told


@_check("slices", "has an inventory that adds up")
def _adds_up(bench: Bench) -> None:
    with bench.meet() as visitor:
        told = _inventory(visitor)
        expect(told.adapter.serial == bench.serial, f"is {told.adapter.serial}")


@_check("slices", "promises, grants and ends a slice; its generation grows with each")
def _life(bench: Bench) -> None:
    with bench.meet() as visitor:
        generations = [_room(visitor).generation]
        decision = _promise(visitor, bench.key(), _SMALL)
        told = _inventory(visitor)
        generations.append(told.generation)
        expect([r.id for r in told.reservations] == [decision.reservation], "hides its promise")
        expect(not told.slices, "has the slice before its commit")
        answered(visitor.ask(m.Commit(decision.reservation)), m.Grant)
        told = _inventory(visitor)
        generations.append(told.generation)
        expect([r.slice for r in told.slices] == [decision.slice], "does not have what it granted")
        answered(visitor.ask(m.Release(decision.slice.id)), m.Done)
        told = _inventory(visitor)
        generations.append(told.generation)
        expect(not told.slices, "still has a slice that was released")
        expect(generations == sorted(set(generations)), f"has generations {generations}")


@_check("slices", "answers a repeated request as the first time, also after its grant")
def _repeats(bench: Bench) -> None:
    with bench.meet() as visitor:
        _room(visitor)
        key = bench.key()
        first, again = _promise(visitor, key, _SMALL), _promise(visitor, key, _SMALL)
        same = replace(again, expires_ms=first.expires_ms) == first
        expect(same, "promises another slice for the same request")
        answered(visitor.ask(m.Commit(first.reservation)), m.Grant)
        grant: m.Grant = answered(visitor.ask(m.AllocationRequest(key, _SMALL)), m.Grant)
        expect(grant.slice == first.slice, "grants another slice for the same request")
        other = replace(_SMALL, keys=2)
        _refused(visitor, m.AllocationRequest(key, other), Reason.INVALID_ARGUMENT)
        forget_all(visitor)


@_check("slices", "gives nobody what it promised to another, and all of it back when aborted")
def _aborts(bench: Bench) -> None:
    with bench.meet() as visitor:
        told = _room(visitor)
        every = replace(_SMALL, cores=told.adapter.cores)
        decision = _promise(visitor, bench.key(), every)
        _refused(visitor, m.AllocationRequest(bench.key(), _SMALL), Reason.NO_CAPACITY)
        answered(visitor.ask(m.Abort(decision.reservation)), m.Done)
        _refused(visitor, m.Commit(decision.reservation), Reason.UNKNOWN_ID)
        _refused(visitor, m.Abort(decision.reservation), Reason.UNKNOWN_ID)
        _grant(visitor, bench.key(), _SMALL)
        forget_all(visitor)


@_check("slices", "never has more than it has, and says what would fit")
def _never_too_much(bench: Bench) -> None:
    with bench.meet() as visitor:
        cores = _room(visitor).adapter.cores
        if cores == 1024:
            raise SkippedCheckError("more cores than it has cannot be asked for")
        wanted = replace(_SMALL, cores=cores + 1)
        error = _refused(visitor, m.AllocationRequest(bench.key(), wanted), Reason.NO_CAPACITY)
        expect(error.would_fit.get("cores") == cores, f"says that {dict(error.would_fit)} fits")
        unknown = replace(_SMALL, capability="conformance.none", units=1)
        _refused(visitor, m.AllocationRequest(bench.key(), unknown), Reason.UNKNOWN_CAPABILITY)


@_check("slices", "lets a higher priority take from a strictly lower one, at the commit")
def _reclaims(bench: Bench) -> None:
    with bench.meet() as visitor:
        told = _room(visitor)
        every = replace(_SMALL, cores=told.adapter.cores)
        low = _grant(visitor, bench.key(), every)
        equal = m.AllocationRequest(bench.key(), _SMALL)
        _refused(visitor, equal, Reason.NO_CAPACITY)
        high = replace(_SMALL, priority=90)
        meek = m.AllocationRequest(bench.key(), high, reclaim=False)
        _refused(visitor, meek, Reason.NO_CAPACITY)
        decision = _promise(visitor, bench.key(), high)
        expect(decision.victims == (low.id,), f"names {decision.victims}, not {low.id}")
        there = {report.slice.id for report in _inventory(visitor).slices}
        expect(low.id in there, "ended the victim before the commit")
        answered(visitor.ask(m.Commit(decision.reservation)), m.Grant)
        there = {report.slice.id for report in _inventory(visitor).slices}
        expect(low.id not in there, "kept the victim after the commit")
        forget_all(visitor)


@_check("slices", "keeps a slice that may not be reclaimed")
def _keeps(bench: Bench) -> None:
    with bench.meet() as visitor:
        told = _room(visitor)
        fast = replace(_SMALL, cores=told.adapter.cores, priority=0, reclaimable=False)
        _grant(visitor, bench.key(), fast)
        high = replace(_SMALL, priority=100)
        _refused(visitor, m.AllocationRequest(bench.key(), high), Reason.NO_CAPACITY)
        forget_all(visitor)


@_check("slices", "gives a slice to one holder at a time")
def _holders(bench: Bench) -> None:
    with bench.meet() as visitor:
        _room(visitor)
        one = _grant(visitor, bench.key(), _SMALL, holder="a")
        _refused(visitor, m.Assign(one.id, "b"), Reason.DEVICE_IN_USE)
        for holder in ("a", "", "b"):
            answered(visitor.ask(m.Assign(one.id, holder)), m.Done)
        (report,) = _inventory(visitor).slices
        expect(report.slice.holder == "b", f"says that {report.slice.holder!r} has it")
        _refused(visitor, m.Assign("conformance-none", "a"), Reason.UNKNOWN_ID)
        forget_all(visitor)


@_check("slices", "takes a promise back by itself when nobody commits it")
def _expires(bench: Bench) -> None:
    with bench.meet() as visitor:
        _room(visitor)
        decision = _promise(visitor, bench.key(), _SMALL)
        left_s = decision.expires_ms / 1000
        expect(0 < left_s <= PROMISE_S, f"promises for {left_s:g} s")
        until = time.monotonic() + left_s + 5
        while _inventory(visitor).reservations:
            expect(time.monotonic() < until, "keeps a promise for ever")
            time.sleep(0.2)
        _refused(visitor, m.Commit(decision.reservation), Reason.UNKNOWN_ID)


# -- images -----------------------------------------------------------------------------------


def _programmable(bench: Bench, visitor: Visitor, capability: str = "") -> Slice:
    told = _room(visitor)
    kinds = [capability] if capability else sorted(told.adapter.accelerators)
    kinds = [kind for kind in kinds if told.adapter.accelerators.get(kind)]
    if not kinds:
        raise SkippedCheckError(f"it has no accelerators {capability}".rstrip())
    return _grant(visitor, bench.key(), replace(_SMALL, capability=kinds[0], units=1))


def _image(bench: Bench) -> tuple[ImageManifest, str, bytes]:
    if bench.image is None:
        raise SkippedCheckError("no --image")
    path, _ = bench.image
    try:
        beside = path.with_name(path.name + SUFFIX)
        return *parse_manifest(beside.read_bytes()), path.read_bytes()
    except (OSError, InvalidValueError) as error:
        raise SkippedCheckError(f"--image cannot be read: {error}") from error


@_check("images", "refuses an image that nobody signed")
def _unsigned(bench: Bench) -> None:
    with bench.meet() as visitor:
        one = _programmable(bench, visitor)
        image = ImageManifest("conformance", one.spec.capability, 10, "0" * 64, 4_000_000_000)
        _refused(visitor, m.Configure(one.id, image, "0" * 128), Reason.IMAGE_REFUSED)
        forget_all(visitor)


@_check("images", "refuses a signed image whose manifest was changed, its end date too")
def _changed(bench: Bench) -> None:
    manifest, signature, _ = _image(bench)
    with bench.meet() as visitor:
        one = _programmable(bench, visitor, manifest.capability)
        for change in (
            {"not_after": manifest.not_after + 1}, {"name": manifest.name + "x"},
            {"size": manifest.size + 1}, {"digest": "0" * 64},
        ):  # fmt: skip
            changed = replace(manifest, **change)
            _refused(visitor, m.Configure(one.id, changed, signature), Reason.IMAGE_REFUSED)
        forget_all(visitor)


@_check("images", "drops bytes that are not those that were signed")
def _wrong_bytes(bench: Bench) -> None:
    manifest, signature, data = _image(bench)
    with bench.meet() as visitor:
        one = _programmable(bench, visitor, manifest.capability)
        wrong = bytes([data[0] ^ 1]) + data[1:]
        last = _load(visitor, one, manifest, signature, wrong)
        expect(last.phase == Phase.BLANK and last.detail, f"is {last.phase} with wrong bytes")
        forget_all(visitor)


@_check("images", "loads a signed image, and runs it")
def _loads(bench: Bench) -> None:
    manifest, signature, data = _image(bench)
    with bench.meet() as visitor:
        one = _programmable(bench, visitor, manifest.capability)
        last = _load(visitor, one, manifest, signature, data)
        expect(last.phase in (Phase.PROGRAMMING, Phase.READY), f"is {last.phase}: {last.detail}")
        until = time.monotonic() + 600
        (report,) = _inventory(visitor).slices
        while report.phase != Phase.READY:
            expect(report.phase == Phase.PROGRAMMING, f"went back to {report.phase}")
            expect(time.monotonic() < until, "programs for more than ten minutes")
            time.sleep(0.1)
            (report,) = _inventory(visitor).slices
        expect(report.image == manifest.name, f"runs {report.image!r}")
        forget_all(visitor)


def _load(
    visitor: Visitor, one: Slice, manifest: ImageManifest, signature: str, data: bytes
) -> m.Progress:
    last: m.Progress = answered(
        visitor.ask(m.Configure(one.id, manifest, signature)), m.Progress
    )  # fmt: skip
    expect(last.phase == Phase.LOADING, f"is {last.phase} before the first byte")
    for first in range(0, len(data), MAX_TAIL):
        part = data[first : first + MAX_TAIL]
        last = answered(visitor.ask(m.ImageData(one.id, first, part)), m.Progress)
    return last
