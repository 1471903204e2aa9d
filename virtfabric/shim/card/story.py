"""What a card's log says of its day: one line for each thing that changed or was refused. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.image import Phase
from virtfabric.model.units import Bytes
from virtfabric.protocol import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable

Message = m.Message


def one_line(text: str) -> str:
    """What somebody else said, as part of one line: he must not write lines of his own."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def describe_exchange(asked: Message, answer: Message) -> str:
    """A host's message and its answer; empty for what nobody needs to read."""
    if isinstance(answer, m.Error):
        why = f" ({answer.reason})" if answer.reason else ""
        return f"{_name(asked)}: {answer.code}{why}: {answer.detail}"
    tell = _TELLERS.get(type(asked))
    return tell(asked, answer) if tell else ""


def describe_news(message: Message) -> str:
    """What the card tells by itself; empty for what nobody needs to read."""
    match message:
        case m.Event():
            about = f"{message.slice}: " if message.slice else ""
            return f"{message.what}: {about}{message.detail}"
        case m.Progress() if message.phase in (Phase.READY, Phase.BLANK):
            return f"{message.slice} is {message.phase}" + (
                f"; {message.detail}" if message.detail else ""
            )
    return ""


def _tell_request(asked: m.AllocationRequest, answer: Message) -> str:
    if isinstance(answer, m.Grant):
        return f"{_spec(asked)}: granted before, {answer.slice.id}"
    if not isinstance(answer, m.Decision):
        return ""
    out = f"; {', '.join(answer.victims)} would end for it" if answer.victims else ""
    promise = f"{answer.reservation} of {answer.slice.id}"
    return f"{_spec(asked)} -> {promise}, waits {answer.expires_ms / 1000:g} s{out}"


def _tell_commit(asked: m.Commit, answer: Message) -> str:
    there = f": {answer.slice.id} is there" if isinstance(answer, m.Grant) else ""
    return f"{asked.reservation} is committed{there}"


def _tell_assign(asked: m.Assign, _answer: Message) -> str:
    return f"{asked.slice} is with {asked.holder or 'nobody'}"


def _tell_configure(asked: m.Configure, _answer: Message) -> str:
    image = asked.manifest
    return f"{asked.slice}: image {image.name} ({Bytes(image.size)}) is coming"


def _tell_data(asked: m.ImageData, answer: Message) -> str:
    if not isinstance(answer, m.Progress) or answer.phase == Phase.LOADING:
        return ""
    return f"{asked.slice}: {answer.detail or 'the image is whole; writing it'}"


def _tell_host_request(asked: m.HostRequest, answer: Message) -> str:
    what = f"{asked.request} of guest {asked.guest}"
    if isinstance(answer, m.HostRefusal):
        return f"{what}: refused, {answer.reason}: {answer.detail}"
    if not isinstance(answer, m.HostDecision):
        return ""
    paid = "".join(f"; {take.victim} pays {take.amounts}" for take in answer.takes)
    return f"{what}: decided, {answer.delta}{paid}"


def _tell_outcome(asked: m.HostOutcome, _answer: Message) -> str:
    return f"{asked.request} is {asked.course}" + (f": {asked.detail}" if asked.detail else "")


_TELLERS: Final[dict[type[Message], Callable[..., str]]] = {
    m.AllocationRequest: _tell_request,
    m.Commit: _tell_commit,
    m.Abort: lambda asked, _: f"{asked.reservation} is aborted",
    m.Assign: _tell_assign,
    m.Release: lambda asked, _: f"{asked.slice} ended",
    m.Configure: _tell_configure,
    m.HostRequest: _tell_host_request,
    m.HostOutcome: _tell_outcome,
    m.ImageData: _tell_data,
}


def _spec(request: m.AllocationRequest) -> str:
    spec = request.spec
    parts = [
        f"{spec.cores} cores" if spec.cores else "",
        str(spec.memory) if spec.memory else "",
        f"x{spec.lanes}" if spec.lanes else "",
        f"{spec.units} {spec.capability}" if spec.units else "",
    ]
    what = f"other amounts for {request.slice}" if request.slice else "a slice"
    return f"{what} ({', '.join(filter(None, parts))}; priority {spec.priority})"


def _name(message: Message) -> str:
    letters = (f" {c.lower()}" if c.isupper() else c for c in type(message).__name__)
    return "".join(letters).lstrip()
