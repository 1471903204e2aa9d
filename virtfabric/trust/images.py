"""Signatures of images: Ed25519 (RFC 8032) over the manifest, which names the bytes' digest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.image import ImageManifest

if TYPE_CHECKING:
    from collections.abc import Iterable


def make_signer() -> tuple[bytes, bytes]:
    """A new signing key and its public half, PEM."""
    key = Ed25519PrivateKey.generate()
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


def describe_image(name: str, capability: str, data: bytes, not_after: int) -> ImageManifest:
    """What is to be signed about an image."""
    digest = hashlib.sha256(data).hexdigest()
    return ImageManifest(name, capability, len(data), digest, not_after)


def sign_image(key: bytes, manifest: ImageManifest) -> str:
    """The signature in hexadecimal.

    Raises:
        InvalidValueError: not a PEM of an Ed25519 private key.
    """
    try:
        signer = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise InvalidValueError("signing key", "(key)", f"cannot be read: {error}") from None
    if not isinstance(signer, Ed25519PrivateKey):
        raise InvalidValueError("signing key", type(signer).__name__, "is not an Ed25519 key")
    return signer.sign(manifest.signed_bytes()).hex()


def is_signed(manifest: ImageManifest, signature: str, signers: Iterable[bytes]) -> bool:
    """Whether one of these public keys (PEM) signed it.

    Raises:
        InvalidValueError: one of them is not an Ed25519 public key.
    """
    for pem in signers:
        try:
            key = load_pem_public_key(pem)
        except ValueError as error:
            raise InvalidValueError("signer", "(key)", f"cannot be read: {error}") from None
        if not isinstance(key, Ed25519PublicKey):
            raise InvalidValueError("signer", type(key).__name__, "is not an Ed25519 key")
        try:
            key.verify(bytes.fromhex(signature), manifest.signed_bytes())
        except (InvalidSignature, ValueError):
            continue
        return True
    return False
