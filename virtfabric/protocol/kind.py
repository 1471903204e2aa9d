"""What one kind of message is on the wire. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from virtfabric.protocol.messages import Message, Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.protocol.fields import Fields

CARD: Final = frozenset({Role.CARD})
HOST: Final = frozenset({Role.HOST})
BOTH: Final = frozenset(Role)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of message: its number on the wire, its senders, and how its body is made and read.

    Attributes:
        form: the body of a message.
        read: a message of a body and a tail.
    """

    code: int
    type: type[Message]
    senders: frozenset[Role]
    form: Callable[[Any], dict[str, Any]]
    read: Callable[[Fields, bytes], Message]

    @property
    def name(self) -> str:
        """As documents and errors have it: `allocation-request`."""
        letters = (f"-{c.lower()}" if c.isupper() else c for c in self.type.__name__)
        return "".join(letters).lstrip("-")
