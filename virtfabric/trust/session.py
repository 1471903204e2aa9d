"""A session: TLS over any transport. Bytes in, bytes out; it owns no socket and no mailbox.

TLS gives encryption, and that a record which is replayed, reordered, changed or cut off ends the
session. Who the other end is, and whether it is the one that was meant, is checked here.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.trust.identity import identity_of

if TYPE_CHECKING:
    from virtfabric.protocol.messages import Role
    from virtfabric.trust.identity import Identity

_CHUNK: Final = 16 << 10
"""The most plain text in one record (RFC 8446, 5.1)."""
MAX_PENDING: Final = 256 << 10
"""Bytes of an unfinished handshake or record that are held; more is no TLS."""


class Session:
    """One end of a session. After an end, `outgoing` may still hold what tells the peer why."""

    def __init__(
        self, context: ssl.SSLContext, *, server: bool, peer_role: Role, serial: str = ""
    ) -> None:
        """Begin.

        Args:
            context: of `trust.context.make_context`, for this side.
            server: whether this end waits for the other to begin.
            peer_role: what the other end has to be.
            serial: and who; empty: anybody whom the authority knows.
        """
        self.peer: Identity | None = None
        self.ended_by = ""
        self._peer_role = peer_role
        self._serial = serial
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self._step()

    @property
    def is_open(self) -> bool:
        """Whether the other end has proved who it is, and neither has ended it.

        A client may be open while the server still makes up its mind: TLS 1.3 tells it later.
        """
        return self.peer is not None and not self.ended_by

    @property
    def waiting(self) -> int:
        """Bytes for the other end that nobody took yet."""
        return self._out.pending

    def outgoing(self) -> bytes:
        """Bytes for the other end; they are the caller's now."""
        return self._out.read()

    def receive(self, data: bytes) -> bytes:
        """Take bytes of the other end; the plain text in them. It raises nothing (`ended_by`)."""
        plain = bytearray()
        for first in range(0, len(data), _CHUNK):
            if self.ended_by:
                break
            self._in.write(data[first : first + _CHUNK])
            plain += self._step()
            if self._in.pending > MAX_PENDING:
                self.ended_by = "more bytes than a record has"
        return bytes(plain)

    def receive_end(self) -> None:
        """The transport ended. Without the other end's goodbye something may have been cut off."""
        self.ended_by = self.ended_by or "cut off"

    def send(self, plain: bytes) -> None:
        """Encrypt for the other end.

        Raises:
            InvalidValueError: the session is not open.
        """
        if not self.is_open:
            raise InvalidValueError("session", self.ended_by or "handshake", "is not open")
        for first in range(0, len(plain), _CHUNK):
            self._tls.write(plain[first : first + _CHUNK])

    def close(self, why: str = "closed here") -> None:
        """Say goodbye; safe to repeat."""
        if self.is_open:
            with suppress(ssl.SSLError):  # it waits for the other goodbye too; ours is on its way
                self._tls.unwrap()
        self.ended_by = self.ended_by or why

    def _step(self) -> bytes:
        """As far as the bytes reach."""
        plain = bytearray()
        try:
            if self.peer is None:
                self._tls.do_handshake()
                self._meet()
            while not self.ended_by:
                read = self._tls.read(_CHUNK)
                plain += read
                if not read:
                    self.ended_by = "the other end closed it"
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.ended_by = f"TLS: {error.reason or error}".replace("_", " ").lower()
        return bytes(plain)

    def _meet(self) -> None:
        """See who it is.

        A certificate that is good, but another's, ends the session without a word of ours.
        """
        try:
            found = identity_of(self._tls.getpeercert() or {})
        except InvalidValueError as error:
            self.ended_by = str(error)
            return
        if found.role != self._peer_role or self._serial not in ("", found.serial):
            meant = f"{self._peer_role} {self._serial}".rstrip()
            self.ended_by = f"{found} is there, not {meant}"
            return
        self.peer = found
