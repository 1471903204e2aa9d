"""Identities. A guest is its UUID: names change, UUIDs do not."""

from __future__ import annotations

import uuid
from typing import Final, NewType, Self

from virtfabric.model.errors import InvalidValueError

HostId = NewType("HostId", str)
RequestId = NewType("RequestId", str)
GrantId = NewType("GrantId", str)
LoanId = NewType("LoanId", str)
JobId = NewType("JobId", str)
TransactionId = NewType("TransactionId", str)


class GuestId(str):
    """A guest's UUID in lower-case canonical form."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str, *, field: str = "uuid") -> Self:
        """Read a UUID in any form that `uuid.UUID` takes.

        Raises:
            InvalidValueError: not a UUID.
        """
        try:
            return cls(uuid.UUID(text.strip()))
        except ValueError:
            raise InvalidValueError(field, text, "is not a UUID") from None

    @property
    def short(self) -> str:
        """The first eight digits, for logs beside a name."""
        return self[:8]


HOST_ITSELF: Final = GuestId("00000000-0000-0000-0000-000000000000")
"""In place of a guest, of what changes the host and no guest."""
