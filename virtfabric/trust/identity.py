"""Identities: who a certificate names. A URI among its alternative names, nothing else.

`urn:virtfabric:card:SERIAL` or `urn:virtfabric:host:HOST-ID`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.messages import Role

if TYPE_CHECKING:
    from collections.abc import Mapping

_SERIAL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX: Final = "urn:virtfabric:"


@dataclass(frozen=True, slots=True)
class Identity:
    """A card by its serial number, or a host by its id."""

    role: Role
    serial: str

    @classmethod
    def of(cls, role: Role, serial: str) -> Self:
        """An identity that a certificate can name.

        Raises:
            InvalidValueError: the serial number is not 1 to 64 letters, digits, `.`, `_` and `-`.
        """
        if not _SERIAL.fullmatch(serial):
            raise InvalidValueError("serial", serial, "is not 1 to 64 letters, digits, . _ and -")
        return cls(role, serial)

    @property
    def uri(self) -> str:
        """As certificates have it."""
        return f"{_PREFIX}{self.role}:{self.serial}"

    def __str__(self) -> str:
        return f"{self.role} {self.serial}"


def identity_of(certificate: Mapping[str, Any]) -> Identity:
    """Who a verified certificate names, given as `ssl.SSLObject.getpeercert` does.

    Raises:
        InvalidValueError: nobody, or more than one.
    """
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    if len(names) != 1 or not names[0].startswith(_PREFIX):
        raise InvalidValueError("certificate", names, "does not name one card or host")
    role, _, serial = names[0].removeprefix(_PREFIX).partition(":")
    if role not in set(Role):
        raise InvalidValueError("certificate", names[0], "is neither a card's nor a host's")
    return Identity.of(Role(role), serial)
