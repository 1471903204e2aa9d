"""Images: what turns the accelerators of a slice into a capability. Signed, with an end date."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """How far a slice's accelerators are. The capability is there in `READY` only."""

    BLANK = "blank"
    LOADING = "loading"
    """The image's bytes come in."""
    PROGRAMMING = "programming"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """What a signer says about an image.

    Attributes:
        capability: what a slice can do with it.
        size: bytes.
        digest: SHA-256 of the bytes, in hexadecimal.
        not_after: UNIX seconds from which on no card takes it.
    """

    name: str
    capability: str
    size: int
    digest: str
    not_after: int

    def signed_bytes(self) -> bytes:
        """What the signature is over: a line for each field, none of which can hold a line end."""
        lines = (
            "virtfabric-image-1", self.name, self.capability, str(self.size), self.digest,
            str(self.not_after),
        )  # fmt: skip
        return "".join(f"{line}\n" for line in lines).encode()
