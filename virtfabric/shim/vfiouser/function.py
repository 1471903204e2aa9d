"""What a PCI function is to the server, and what the server gives to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.shim.vfiouser.config import ConfigSpace
    from virtfabric.shim.vfiouser.interrupts import Vectors
    from virtfabric.shim.vfiouser.memory import GuestMemory


@dataclass(frozen=True, slots=True)
class Region:
    """A BAR's memory.

    Attributes:
        fd: a file with its content, which the guest then reaches without asking; -1: every access
            comes to the function.
    """

    size: int
    fd: int = -1


class Bus:
    """The way of one function to the guest, while a client is there. For any thread."""

    def __init__(self, config: ConfigSpace, memory: GuestMemory, vectors: Vectors) -> None:
        self._config = config
        self._memory = memory
        self._vectors = vectors

    def read(self, address: int, size: int) -> bytes:
        """DMA out of the guest's memory.

        Raises:
            DmaRefusedError: not mapped, or the function may not.
        """
        return self._memory.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        """DMA into the guest's memory.

        Raises:
            DmaRefusedError: as `read`.
        """
        self._memory.write(address, data)

    def interrupt(self, vector: int = 0) -> bool:
        """Send a message; False if it is off or nobody listens."""
        return self._config.may_interrupt and self._vectors.trigger(vector)


class PciFunction(Protocol):
    """Device logic. It answers at once: a slow answer halts the whole machine of the client."""

    @property
    def config(self) -> ConfigSpace:
        """Its configuration space; the server reads and writes it."""

    @property
    def regions(self) -> Mapping[int, Region]:
        """Its BARs, by index."""

    def plug(self, bus: Bus) -> None:
        """A client came; `bus` is good until `unplug`."""

    def unplug(self) -> None:
        """The client went: nothing of it may be reached any more when this returns."""

    def reset(self) -> None:
        """As at power-on, but for `config`, which the server resets. No DMA of before goes on."""

    def read(self, region: int, offset: int, count: int) -> bytes:
        """`count` bytes of a BAR, within it."""

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write to a BAR, within it."""
