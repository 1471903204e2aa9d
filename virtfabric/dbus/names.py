"""Every name and signature of the D-Bus API, once; docs/dbus-api.md says what they mean.

Knows no D-Bus library: service, client and introspection are all made of these tables.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from virtfabric.model.ids import JobId

BUS_NAME: Final = "org.virtfabric1"
ROOT: Final = "/org/virtfabric1"
JOBS: Final = f"{ROOT}/job"
MANAGER: Final = "org.virtfabric1.Manager"
JOB: Final = "org.virtfabric1.Job"
ERRORS: Final = "org.virtfabric1.Error"

DBUS_NAME: Final = "org.freedesktop.DBus"
DBUS_PATH: Final = "/org/freedesktop/DBus"
DBUS_ERRORS: Final = "org.freedesktop.DBus.Error"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PEER: Final = "org.freedesktop.DBus.Peer"


class Argument(NamedTuple):
    """One argument: a complete D-Bus type and a name for introspection."""

    signature: str
    name: str


class Method(NamedTuple):
    """A method; `gives` None for no answer, "o" for the path of a job, "s" for JSON."""

    name: str
    takes: tuple[Argument, ...] = ()
    gives: Argument | None = None

    @property
    def in_signature(self) -> str:
        """What a call must carry."""
        return "".join(a.signature for a in self.takes)

    @property
    def out_signature(self) -> str:
        """What the answer carries."""
        return self.gives.signature if self.gives else ""


class Signal(NamedTuple):
    """A signal."""

    name: str
    carries: tuple[Argument, ...]

    @property
    def signature(self) -> str:
        """Of the whole body."""
        return "".join(a.signature for a in self.carries)


class Property(NamedTuple):
    """A read-only property; `emits` as in the EmitsChangedSignal annotation."""

    name: str
    signature: str
    emits: str = "false"


class Interface(NamedTuple):
    """Everything on one interface."""

    name: str
    methods: tuple[Method, ...] = ()
    signals: tuple[Signal, ...] = ()
    properties: tuple[Property, ...] = ()

    def method(self, name: str) -> Method | None:
        """By name."""
        return next((m for m in self.methods if m.name == name), None)

    def signal(self, name: str) -> Signal:
        """By name; the caller names one of ours."""
        return next(s for s in self.signals if s.name == name)

    def property_named(self, name: str) -> Property | None:
        """By name."""
        return next((p for p in self.properties if p.name == name), None)


_JSON = Argument("s", "json")
_JOB = Argument("o", "job")
_GUEST = Argument("s", "guest")
_WANTS = Argument("a{ss}", "wants")
_REGION = Argument("s", "region")
_SLICE = Argument("s", "slice")
_OPTIONS = Argument("a{ss}", "options")
_BODY = Argument("s", "body")

MANAGER_INTERFACE: Final = Interface(
    MANAGER,
    methods=(
        Method("GetStatus", (), _JSON),
        Method("GetHost", (), _JSON),
        Method("ListGuests", (), _JSON),
        Method("ListGrants", (), _JSON),
        Method("ListLoans", (), _JSON),
        Method("ListDevices", (), _JSON),
        Method("ReleaseDevice", (Argument("s", "address"),), _JOB),
        Method("ListCards", (), _JSON),
        Method("ShowCard", (Argument("s", "serial"),), _JSON),
        Method("TrustCard", (Argument("s", "serial"),), _JSON),
        Method("ListSlices", (), _JSON),
        Method("CreateSlices", (Argument("s", "file"), _OPTIONS), _JOB),
        Method("PlanSlices", (Argument("s", "file"), _OPTIONS), _JSON),
        Method("DestroySlice", (_SLICE,), _JOB),
        Method("PlanSliceEnd", (_SLICE,), _JSON),
        Method("ProgramSlice", (_SLICE, Argument("s", "image")), _JOB),
        Method("GetMemory", (), _JSON),
        Method("ReleaseMemory", (Argument("s", "subject"),), _JOB),
        Method("CreateRegion", (_WANTS,), _JOB),
        Method("PlanRegion", (_WANTS,), _JSON),
        Method("DestroyRegion", (_REGION,), _JOB),
        Method("PlanRegionEnd", (_REGION,), _JSON),
        Method("ReclaimMemory", (_WANTS,), _JOB),
        Method("PlanReclaim", (_WANTS,), _JSON),
        Method("ShowPolicy", (_GUEST,), _JSON),
        Method("SetPolicy", (_GUEST, Argument("a{ss}", "changes")), _JSON),
        Method("PlanPolicy", (_GUEST, Argument("a{ss}", "changes")), _JSON),
        Method("ClearPolicy", (_GUEST,), _JSON),
        Method("ListPorts", (_GUEST,), _JSON),
        Method("AddPorts", (_GUEST, Argument("u", "count")), _JSON),
        Method("Allocate", (_GUEST, _WANTS), _JOB),
        Method("Plan", (_GUEST, _WANTS), _JSON),
        Method("Release", (Argument("s", "grant"),), _JOB),
        Method("Explain", (Argument("s", "id"),), _JSON),
        Method("Audit", (Argument("d", "since"), Argument("s", "subject")), _JSON),
        Method("VerifyAudit", (Argument("s", "head"),), _JSON),
        Method("Drift", (), _JSON),
        Method("RepairDrift", (), _JOB),
        Method("ListJobs", (), _JSON),
        Method("Health", (), _JSON),
    ),
    signals=(
        Signal("Notice", (Argument("s", "kind"), _BODY)),
        Signal("JobDone", (_JOB, Argument("s", "state"))),
        Signal("GrantMade", (_BODY,)),
        Signal("GrantEnded", (_BODY,)),
        Signal("DriftFound", (_BODY,)),
        Signal("Alert", (Argument("s", "text"),)),
    ),
    properties=(
        Property("Version", "s", "const"),
        Property("Generation", "t", "invalidates"),
        Property("Connected", "b", "true"),
    ),
)

JOB_INTERFACE: Final = Interface(
    JOB,
    methods=(Method("Cancel"),),
    signals=(
        Signal("Progress", (Argument("d", "fraction"), Argument("s", "text"))),
        Signal("Done", (Argument("s", "state"), Argument("s", "outcome"))),
    ),
    properties=(
        Property("Title", "s", "const"),
        Property("State", "s"),
        Property("Fraction", "d"),
        Property("Text", "s"),
        Property("Result", "s"),
        Property("Error", "s"),
    ),
)

PROPERTIES_INTERFACE: Final = Interface(
    PROPERTIES,
    methods=(
        Method(
            "Get", (Argument("s", "interface"), Argument("s", "property")), Argument("v", "value")
        ),
        Method("GetAll", (Argument("s", "interface"),), Argument("a{sv}", "values")),
        Method(
            "Set",
            (Argument("s", "interface"), Argument("s", "property"), Argument("v", "value")),
        ),
    ),
    signals=(
        Signal(
            "PropertiesChanged",
            (Argument("s", "interface"), Argument("a{sv}", "changed"), Argument("as", "invalid")),
        ),
    ),
)

INTROSPECTABLE_INTERFACE: Final = Interface(
    INTROSPECTABLE, methods=(Method("Introspect", (), Argument("s", "xml")),)
)

PEER_INTERFACE: Final = Interface(
    PEER, methods=(Method("Ping"), Method("GetMachineId", (), Argument("s", "machine_id")))
)

STANDARD: Final = (PROPERTIES_INTERFACE, INTROSPECTABLE_INTERFACE, PEER_INTERFACE)

_JOB_ID: Final = re.compile(r"[A-Za-z0-9_]{1,64}")


def job_path(job: str) -> str:
    """The object path of a job.

    Raises:
        InvalidValueError: the id has characters that no object path can carry.
    """
    if not _JOB_ID.fullmatch(job):
        raise InvalidValueError("job", job, "is not a job id")
    return f"{JOBS}/{job}"


def job_of_path(path: str) -> JobId | None:
    """The job whose object path this is; None for any other path."""
    parent, _, last = path.rpartition("/")
    return cast("JobId", last) if parent == JOBS and _JOB_ID.fullmatch(last) else None
