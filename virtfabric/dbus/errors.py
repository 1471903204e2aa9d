"""Errors on the wire and back: the one place that maps them. No caller ever sees a traceback."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from virtfabric.dbus.names import DBUS_ERRORS, ERRORS
from virtfabric.model.errors import (
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    UnreachableError,
    VirtfabricError,
)

FAILED: Final = "failed"
INTERNAL: Final = "internal"
SIGNATURE: Final = "ss"
"""Of an error's body: the detail, and the documented JSON."""

_UNREACHABLE: Final = frozenset(
    f"{DBUS_ERRORS}.{name}"
    for name in ("ServiceUnknown", "NameHasNoOwner", "NoReply", "Disconnected", "TimedOut")
)


class ProtocolError(VirtfabricError):
    """A call that does not fit the API: wrong types, unknown method or object, too many at once.

    Attributes:
        name: the standard error's last part (`InvalidArgs`, `UnknownMethod`, `LimitsExceeded`).
    """

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(detail)
        self.name = name


class WireError(NamedTuple):
    """An error as it travels."""

    name: str
    detail: str
    document: dict[str, Any]

    @property
    def body(self) -> list[str]:
        """Arguments of the error message, of `SIGNATURE`."""
        return [self.detail, json.dumps(self.document)]


def error_name(reason: str) -> str:
    """`no-capacity` -> `org.virtfabric1.Error.NoCapacity`."""
    return f"{ERRORS}.{''.join(part.capitalize() for part in reason.split('-'))}"


def document_of(reason: str, detail: str, *, advice: str = "") -> dict[str, Any]:
    """The documented error object, without figures."""
    return {"reason": reason, "detail": detail, "would_fit": {}, "considered": [], "advice": advice}


def wire_error(error: BaseException) -> WireError:
    """What a caller is told about any exception; of a defect of ours nothing, it is for the log."""
    match error:
        case RefusedError():
            no = error.refusal
            document = document_of(no.reason.value, no.detail, advice=error.advice)
            document["would_fit"] = dict(no.would_fit)
            document["considered"] = list(no.considered)
        case ProtocolError():
            busy = error.name == "LimitsExceeded"
            reason = Reason.BUSY if busy else Reason.INVALID_ARGUMENT
            document = document_of(reason.value, str(error))
            return WireError(f"{DBUS_ERRORS}.{error.name}", str(error), document)
        case InvalidValueError():
            document = document_of(Reason.INVALID_ARGUMENT.value, str(error), advice=error.advice)
        case VirtfabricError():
            document = document_of(FAILED, str(error), advice=error.advice)
        case _:
            document = document_of(INTERNAL, "internal error; see the agent's log")
    return WireError(error_name(document["reason"]), document["detail"], document)


def refusal_of(document: dict[str, Any]) -> VirtfabricError:
    """The exception that an error document (of a call or of a job) stands for."""
    reason, detail = str(document.get("reason", FAILED)), str(document.get("detail", ""))
    advice = str(document.get("advice") or "")
    if reason not in {r.value for r in Reason}:
        return VirtfabricError(detail, advice=advice)
    fits = {str(k): int(v) for k, v in dict(document.get("would_fit") or {}).items()}
    considered = tuple(str(c) for c in document.get("considered") or ())
    error = RefusedError(Refusal(Reason(reason), detail, fits, considered))
    error.advice = advice
    return error


def _document(body: list[Any]) -> dict[str, Any] | None:
    if len(body) < 2 or not isinstance(body[1], str):
        return None
    try:
        document = json.loads(body[1])
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def error_from_wire(name: str, body: list[Any]) -> VirtfabricError:
    """What a client raises for an error that came back."""
    detail = str(body[0]) if body else name
    document = _document(body)
    if document is not None:
        return refusal_of(document)
    if name in _UNREACHABLE:
        return UnreachableError(detail)
    if name == f"{DBUS_ERRORS}.AccessDenied":
        return RefusedError(Refusal(Reason.NOT_ALLOWED, f"the bus does not allow it: {detail}"))
    return VirtfabricError(f"{name}: {detail}")
