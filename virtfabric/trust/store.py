"""Credentials on a disk: a directory for each end, and the authority's own, which only root reads.

A directory of credentials holds `certificate.pem`, `key.pem` and `authority.pem`. A private key
that others could read is refused, not used. Nothing is ever overwritten.
"""

from __future__ import annotations

import datetime
import os
import stat
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from virtfabric.model.errors import InvalidValueError
from virtfabric.trust.authority import CARD_DAYS, Credentials, issue, make_authority
from virtfabric.trust.identity import identity_of

if TYPE_CHECKING:
    from pathlib import Path

    from virtfabric.trust.identity import Identity

CERTIFICATE: Final = "certificate.pem"
KEY: Final = "key.pem"
AUTHORITY: Final = "authority.pem"
ISSUED: Final = "issued"
"""In the authority's directory: a line for each certificate that it made."""
MAX_PEM: Final = 64 << 10


def read_credentials(directory: Path) -> Credentials:
    """One end's credentials.

    Raises:
        InvalidValueError: one of the files is missing or empty, or others could read the key.
    """
    return Credentials(
        read_pem(directory / CERTIFICATE), read_key(directory / KEY),
        read_pem(directory / AUTHORITY),
    )  # fmt: skip


def write_credentials(directory: Path, credentials: Credentials) -> None:
    """Make the directory, and in it the three files.

    Raises:
        InvalidValueError: it cannot be written, or there are credentials in it.
    """
    _make_directory(directory)
    for name, data in (
        (CERTIFICATE, credentials.certificate), (KEY, credentials.key),
        (AUTHORITY, credentials.authority),
    ):  # fmt: skip
        write_new(directory / name, data)


class AuthorityStore:
    """The authority's directory. Whoever reads its key can be any card and any host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def exists(self) -> bool:
        """Whether there is an authority."""
        return (self._directory / KEY).exists()

    def open(self, name: str, now: datetime.datetime) -> Credentials:
        """The authority; made anew, with this name, where there is none.

        Raises:
            InvalidValueError: it cannot be read or written, or others could read its key.
        """
        if not self.exists:
            made = make_authority(name, now)
            _make_directory(self._directory)
            write_new(self._directory / KEY, made.key)
            write_new(self._directory / AUTHORITY, made.authority)
        certificate = read_pem(self._directory / AUTHORITY)
        return Credentials(certificate, read_key(self._directory / KEY), certificate)

    def issue(
        self, name: str, identity: Identity, now: datetime.datetime, *, days: int = CARD_DAYS
    ) -> Credentials:
        """Credentials for one card or host; it is noted which.

        Raises:
            InvalidValueError: as `open`, or the authority's key is none.
        """
        made = issue(self.open(name, now), identity, now, days=days)
        certificate = x509.load_pem_x509_certificate(made.certificate)
        digest = certificate.fingerprint(hashes.SHA256()).hex()
        until = (now + datetime.timedelta(days=days)).date()
        line = f"{now:%Y-%m-%dT%H:%M:%SZ} {identity.uri} until {until} sha256 {digest}\n"
        try:
            with (self._directory / ISSUED).open("a") as file:
                file.write(line)
        except OSError as error:
            raise _unusable(self._directory / ISSUED, error) from error
        return made


def identity_of_pem(certificate: bytes) -> Identity:
    """Who a certificate (PEM) names; whether anybody vouches for it is not looked at.

    Raises:
        InvalidValueError: nobody, more than one, or it is no certificate.
    """
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise InvalidValueError("certificate", "(PEM)", f"cannot be read: {error}") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return identity_of({"subjectAltName": [("URI", uri) for uri in uris]})


def read_pem(path: Path) -> bytes:
    """A PEM file.

    Raises:
        InvalidValueError: it is missing, empty or too large for one.
    """
    try:
        data = path.read_bytes()[: MAX_PEM + 1]
    except OSError as error:
        raise _unusable(path, error) from error
    if not data or len(data) > MAX_PEM:
        raise InvalidValueError("file", str(path), f"is not a PEM file of at most {MAX_PEM} bytes")
    return data


def read_key(path: Path) -> bytes:
    """A private key that nobody but its owner can read.

    Raises:
        InvalidValueError: others can, or as `read_pem`.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _unusable(path, error) from error
    if stat.S_IMODE(mode) & 0o077:
        raise InvalidValueError(
            "file", str(path), "can be read by others", advice=f"chmod 600 {path}"
        )
    return read_pem(path)


def write_new(path: Path, data: bytes) -> None:
    """A file that only its owner can read, and that was not there.

    Raises:
        InvalidValueError: it was, or it cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except FileExistsError:
        raise InvalidValueError(
            "file", str(path), "is there already, and is not overwritten",
            advice="name another directory, or move the old one away",
        ) from None  # fmt: skip
    except OSError as error:
        raise _unusable(path, error) from error


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> InvalidValueError:
    return InvalidValueError("file", str(path), f"cannot be used: {error.strerror}")
