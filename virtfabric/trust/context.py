"""TLS settings: 1.3 only, both ends show a certificate, one authority, no resumption.

`ssl` reads a certificate chain from a file only; so that a key that was handed over as bytes never
lies on a disk, that file is an anonymous one in memory (memfd_create(2)).
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from virtfabric.trust.authority import Credentials


def make_context(credentials: Credentials, *, server: bool) -> ssl.SSLContext:
    """The settings of one end; good for any number of sessions.

    Raises:
        InvalidValueError: certificate, key or authority cannot be used.
    """
    side = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a peer is who its URI says, not where it is: trust.identity
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_TICKET
    if server:
        context.num_tickets = 0  # no resumption: every session proves both ends anew
    try:
        context.load_verify_locations(cadata=credentials.authority.decode())
        _load_chain(context, credentials)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidValueError("credentials", "(PEM)", f"cannot be used: {error}") from None
    return context


def _load_chain(context: ssl.SSLContext, credentials: Credentials) -> None:
    held = os.memfd_create("virtfabric-credentials", os.MFD_CLOEXEC)
    try:
        with open(held, "wb", closefd=False) as file:
            file.write(credentials.certificate + credentials.key)
        context.load_cert_chain(f"/proc/self/fd/{held}")
    finally:
        os.close(held)
