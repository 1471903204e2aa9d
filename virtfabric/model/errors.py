"""The error tree (what broke) and the published reason codes (what was refused).

A "no" is a `Refusal` value; an exception means that something is broken or malformed.
Reason codes are part of the contract with users: never rename one.

What the command loads at every start (this, `amounts`, `want`, `dbus.names`...) has named tuples
where the rest has dataclasses: `dataclasses` needs `inspect`, a quarter of the command's start.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Reason(StrEnum):
    """Why a request was refused. The words that users, logs and D-Bus see."""

    NO_CAPACITY = "no-capacity"
    ABOVE_LIMIT = "above-limit"
    BELOW_FLOOR = "below-floor"
    UNKNOWN_GUEST = "unknown-guest"
    UNMANAGED_GUEST = "unmanaged-guest"
    NOT_RUNNING = "not-running"
    BUSY = "busy"
    NOT_ALLOWED = "not-allowed"
    ABOVE_CEILING = "above-ceiling"
    INVALID_ARGUMENT = "invalid-argument"
    INVALID_POLICY = "invalid-policy"
    UNKNOWN_ID = "unknown-id"
    NO_MECHANISM = "no-mechanism"
    NO_PLACEMENT = "no-placement"
    MEMORY_RETURNING = "memory-returning"
    GUEST_UNCOOPERATIVE = "guest-uncooperative"
    CANCELLED = "cancelled"
    STALE = "stale"
    UNKNOWN_CAPABILITY = "unknown-capability"
    UNKNOWN_TIER = "unknown-tier"
    NO_FREE_PORT = "no-free-port"
    DEVICE_IN_USE = "device-in-use"
    GROUP_NOT_VIABLE = "group-not-viable"
    MEMORY_LOCK_LIMIT = "memory-lock-limit"
    STRANDS_MEMORY = "strands-memory"
    NO_HUGE_PAGES = "no-huge-pages"
    SHUTTING_DOWN = "shutting-down"
    IMAGE_REFUSED = "image-refused"
    DECISION_REJECTED = "decision-rejected"
    """A card's decision that would have broken an invariant."""
    NO_ARBITER = "no-arbiter"
    """The card that is to decide does not, and nobody else may."""


class VirtfabricError(Exception):
    """Base of everything this project raises on purpose.

    Attributes:
        advice: what the reader can do about it; empty when there is nothing to add.
    """

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class InvalidValueError(VirtfabricError, ValueError):
    """Bad input, found while parsing it at an edge.

    Attributes:
        field: the field as its writer knows it (`cpu.reservation`, `--memory`).
        value: the value as it was given.
    """

    def __init__(self, field: str, value: object, problem: str, *, advice: str = "") -> None:
        super().__init__(f"{field}: {value!r} {problem}", advice=advice)
        self.field = field
        self.value = value


class ConfigError(VirtfabricError):
    """A configuration file is wrong; the message names file, key and value."""


class InstallationError(VirtfabricError):
    """Something that the package ships or the host should have is missing."""


class HypervisorError(VirtfabricError):
    """libvirt or QEMU failed a call."""


class HypervisorGoneError(HypervisorError):
    """The connection to libvirtd is down."""


class GuestGoneError(HypervisorError):
    """The guest stopped or was undefined while we worked on it."""


class DeviceError(VirtfabricError):
    """The kernel failed, or this agent refused, to change a PCI function."""


class DeviceGoneError(DeviceError):
    """The PCI function is not there any more: there is nothing left to change or to undo."""


class HugePagesError(VirtfabricError):
    """The kernel failed, or this agent refused, to change a pool of huge pages."""


class CxlError(VirtfabricError):
    """The kernel or ndctl failed, or this agent refused, to change CXL memory."""


class CardError(VirtfabricError):
    """An offload card failed, or answered something that this agent does not understand."""


class CardLostError(CardError):
    """The card is not there: no link, no answer in time, or restarted in between."""


class CardDistrustedError(CardError):
    """The card said what cannot be true; nothing it says is believed until an operator does."""


class StaleDefinitionError(HypervisorError):
    """A guest's persistent definition is no longer what it was when it was read."""


class VerificationError(VirtfabricError):
    """The kernel or the guest does not show what a step was to bring about."""


class ShortfallError(VirtfabricError):
    """A guest gave (or took) less than asked before the deadline.

    Attributes:
        reached: the amount it has now, in what the step counts: bytes, vCPUs, functions (1: it
            keeps the one that it was to let go).
    """

    def __init__(self, message: str, *, reached: int) -> None:
        super().__init__(message)
        self.reached = reached


class StepCancelledError(VirtfabricError):
    """The caller cancelled while a step waited for a guest."""


class JournalError(VirtfabricError):
    """The journal cannot be written (disk full, I/O error)."""


class JournalCorruptError(JournalError):
    """The journal is not what this agent wrote; the agent does not guess."""


class AlreadyRunningError(VirtfabricError):
    """Another agent holds this state directory or this libvirtd socket."""


class UnreachableError(VirtfabricError):
    """The agent does not answer on the bus."""


class Refusal(NamedTuple):
    """A "no", with its reason.

    Attributes:
        reason: published code.
        detail: one sentence for a person; names the field, guest and figures.
        would_fit: what could be had now instead, by coordinate (milli-CPU, bytes); may be
            empty.
        considered: one line per guest looked at and why it did not pay.
    """

    reason: Reason
    detail: str
    would_fit: Mapping[str, int] = MappingProxyType({})
    considered: tuple[str, ...] = ()


class RefusedError(VirtfabricError):
    """Carries a `Refusal` to an edge where only exceptions travel (facade to skin)."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"{refusal.reason}: {refusal.detail}")
        self.refusal = refusal
