"""Programming a slice: an image is loaded, verified and written, and only then runs.

Accelerators have two banks. A new image goes into the one that does not run, and the banks change
places when all of it is written: until then, and after any failure, what ran before runs on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from virtfabric.model.errors import VirtfabricError
from virtfabric.model.image import Phase

if TYPE_CHECKING:
    from virtfabric.model.adapter import SliceId
    from virtfabric.model.image import ImageManifest

MAX_IMAGE: Final = 64 << 20
"""Bytes that a bank of the emulated card holds."""
RATE: Final = 100 << 20
"""Bytes a second: about what a 32-bit configuration port does at 25 MHz."""
PATIENCE_S: Final = 30.0
"""After this long without data a half-loaded image is dropped."""


class ConfigurationError(VirtfabricError):
    """The accelerator did not take what was written into it."""


class ConfigurationPort(Protocol):
    """What writes into accelerators."""

    def write(self, name: SliceId, done: int, total: int) -> None:
        """Bytes of an image up to `done` go into the bank that does not run.

        Raises:
            ConfigurationError
        """


class EmulatedPort:
    """Takes everything; or fails where a test wants it to."""

    def __init__(self) -> None:
        self.fails_at: int | None = None

    def write(self, name: SliceId, done: int, total: int) -> None:
        """Implements `ConfigurationPort`."""
        if self.fails_at is not None and done >= self.fails_at:
            raise ConfigurationError(f"{name}: bank error at byte {self.fails_at} of {total}")


@dataclass(slots=True)
class Programming:
    """One image on its way into one slice. `touched` is when something last happened."""

    slice: SliceId
    manifest: ImageManifest
    touched: float
    phase: Phase = Phase.LOADING
    done: int = 0
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def load(self, offset: int, data: bytes, now: float) -> str:
        """The next bytes; empty, or what is wrong with them."""
        if self.phase != Phase.LOADING:
            return "the image is loaded already"
        if offset != self.done:
            return f"bytes from {offset} came, not from {self.done}"
        if self.done + len(data) > self.manifest.size:
            return f"more than the {self.manifest.size} bytes that were announced"
        self.touched = now
        self.done += len(data)
        self._digest.update(data)
        if self.done < self.manifest.size:
            return ""
        if self._digest.hexdigest() != self.manifest.digest:
            return "the bytes are not those that were signed"
        self.phase, self.done = Phase.PROGRAMMING, 0
        return ""

    def advance(self, port: ConfigurationPort, now: float) -> bool:
        """Write what time allows; whether all is written.

        Raises:
            ConfigurationError
        """
        passed = max(0.0, now - self.touched)
        self.touched = now
        self.done = min(self.manifest.size, self.done + max(1, int(passed * RATE)))
        port.write(self.slice, self.done, self.manifest.size)
        return self.done == self.manifest.size
