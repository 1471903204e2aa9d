"""The one mapping of errors, there and back."""

from __future__ import annotations

import pytest

from virtfabric.dbus.errors import error_from_wire, error_name, wire_error
from virtfabric.model.errors import (
    HypervisorError,
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    UnreachableError,
    VirtfabricError,
)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_travels_there_and_back(reason):
    wire = wire_error(RefusedError(Refusal(reason, "because", {"cpu": 1}, ("a", "b"))))
    assert wire.name == error_name(reason.value)
    back = error_from_wire(wire.name, wire.body)
    assert isinstance(back, RefusedError)
    assert back.refusal == Refusal(reason, "because", {"cpu": 1}, ("a", "b"))


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (InvalidValueError("cpu", "x", "is bad", advice="do"), "InvalidArgument"),
        (HypervisorError("libvirt failed", advice="do"), "Failed"),
        (KeyError("secret"), "Internal"),
    ],
)
def test_names_of_what_broke(error, name):
    wire = wire_error(error)
    assert wire.name == f"org.virtfabric1.Error.{name}"
    assert "secret" not in "".join(wire.body)
    back = error_from_wire(wire.name, wire.body)
    assert isinstance(back, VirtfabricError)
    assert back.advice == ("" if name == "Internal" else "do")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ServiceUnknown", UnreachableError),
        ("NoReply", UnreachableError),
        ("AccessDenied", RefusedError),
        ("Failed", VirtfabricError),
    ],
)
@pytest.mark.parametrize("body", [["text"], [], ["text", 3], ["text", "not json"], ["text", "[]"]])
def test_errors_of_the_bus_itself(name, kind, body):
    assert isinstance(error_from_wire(f"org.freedesktop.DBus.Error.{name}", body), kind)
