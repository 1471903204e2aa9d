"""The authority: makes the certificates of cards and hosts. Bytes only; files are the caller's.

Keys are P-256 (FIPS 186-5), which secure elements on cards can hold. A certificate names one
identity, may be used at either end of a session, and for nothing else.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from virtfabric.trust.identity import Identity

AUTHORITY_DAYS: Final = 20 * 365
CARD_DAYS: Final = 10 * 365
"""A card keeps its certificate for life; it ends with the authority's at the latest."""
_SKEW: Final = datetime.timedelta(hours=1)
"""By which a card's clock may be behind."""
_BASIC: Final = {
    "digital_signature": False, "content_commitment": False, "key_encipherment": False,
    "data_encipherment": False, "key_agreement": False, "key_cert_sign": False, "crl_sign": False,
    "encipher_only": False, "decipher_only": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate with its private key, and the authority it is checked against; all PEM."""

    certificate: bytes
    key: bytes
    authority: bytes

    def __repr__(self) -> str:
        return "Credentials(...)"  # a key must never be in a log


def make_authority(name: str, now: datetime.datetime, *, days: int = AUTHORITY_DAYS) -> Credentials:
    """A new authority. Its key is what everything rests on: keep it off hosts and cards.

    Args:
        name: for people.
        now: aware; from when on it is valid.
        days: how long.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _begin(subject, subject, key.public_key(), now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(
        x509.KeyUsage(**{**_BASIC, "key_cert_sign": True, "crl_sign": True}), critical=True
    )
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    return Credentials(certificate, _pem(key), certificate)


def issue(
    authority: Credentials, identity: Identity, now: datetime.datetime, *, days: int = CARD_DAYS
) -> Credentials:
    """A certificate and a key for one card or host.

    Raises:
        InvalidValueError: the authority's key is none, or it ends before the certificate begins.
    """
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    try:
        issuer_key = load_pem_private_key(authority.key, None)
    except (ValueError, TypeError) as error:
        raise InvalidValueError("authority", "(key)", f"cannot be read: {error}") from None
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise InvalidValueError("authority", type(issuer_key).__name__, "is not an EC key")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([
        x509.NameAttribute(NameOID.COMMON_NAME, str(identity)),
        x509.NameAttribute(NameOID.SERIAL_NUMBER, identity.serial),
    ])  # fmt: skip
    builder = _begin(issuer.subject, subject, key.public_key(), now, days)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.KeyUsage(**{**_BASIC, "digital_signature": True}), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
         False),
        (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False),
    ):  # fmt: skip
        builder = builder.add_extension(extension, critical=critical)
    certificate = builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)
    return Credentials(certificate, _pem(key), authority.certificate)


def _begin(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
