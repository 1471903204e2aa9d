"""The steps that give a running guest a memory device of its own host node, and take it away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from virtfabric.model.devicesteps import Presence
from virtfabric.model.step import Step
from virtfabric.model.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachMemory(Step):
    """Plug a virtio-mem device whose memory comes from one node of the host, and fill it.

    `before` and `after` are what is requested of it, in bytes; 0 is no device at all. Taking it
    away needs the guest: it has to give the memory first, and then to let go of the device.

    Attributes:
        alias: the device's.
        node: of the host; the memory is bound to it.
        cell: of the guest.
        size: the most that it can hold.
        tier: of the node.
        page: bytes of the huge pages that back it; 0 for small ones.
    """

    kind: ClassVar[str] = "attach-memory"
    needs_guest: ClassVar[bool] = True
    alias: str
    node: int
    cell: int
    size: int
    block: int
    before: int
    after: int
    tier: str = "cxl"
    page: int = 0
    tolerance: int = 4 << 20
    deadline_s: float = 30.0

    def describe(self) -> str:
        """One line for a person."""
        where = f"{self.tier.upper()} node {self.node}"
        if self.page:
            where += f" in pages of {Bytes(self.page)}"
        if self.after:
            return (
                f"{self.name}: attach virtio-mem {self.alias} ({Bytes(self.size)}, {where}) "
                f"with {Bytes(self.after)}"
            )
        return f"{self.name}: detach virtio-mem {self.alias} ({where})"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachDimm(Step):
    """Plug a DIMM whose memory comes from one node of the host.

    `before` and `after` are its bytes, 0 is none. It comes whole, and the guest's kernel brings it
    online or does not. It goes only as a whole, when the guest has nothing on it that cannot move:
    that is asked for by an undo alone.

    Attributes:
        alias: the device's.
        node: of the host; the memory is bound to it.
        cell: of the guest.
        tier: of the node.
        page: bytes of the huge pages that back it; 0 for small ones.
    """

    kind: ClassVar[str] = "attach-dimm"
    needs_guest: ClassVar[bool] = True
    alias: str
    node: int
    cell: int
    before: int
    after: int
    tier: str = "cxl"
    page: int = 0
    deadline_s: float = 30.0

    @property
    def size(self) -> int:
        """Bytes of the DIMM, whether it comes or goes."""
        return max(self.before, self.after)

    def describe(self) -> str:
        """One line for a person."""
        verb = "attach" if self.after else "detach"
        where = f"{self.tier.upper()} node {self.node}"
        if self.page:
            where += f" in pages of {Bytes(self.page)}"
        return f"{self.name}: {verb} DIMM {self.alias} ({Bytes(self.size)}, {where})"


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachMemory(Step):
    """Unplug an empty virtio-mem device of the running guest; undone, it is there again, empty.

    The memory went before, by `ResizeVirtioMem`: a device that still holds some stays. The
    guest's persistent definition is never changed: a device that is in it comes back at the next
    start.

    Attributes:
        alias: the device's.
        node: of the host; its memory was bound to it.
        cell: of the guest.
        size: the most that it can hold.
        tier: of the node.
        page: bytes of the huge pages that back it; 0 for small ones.
    """

    kind: ClassVar[str] = "detach-memory"
    needs_guest: ClassVar[bool] = True
    alias: str
    node: int
    cell: int
    size: int
    block: int
    before: Presence = Presence.ATTACHED
    after: Presence = Presence.ABSENT
    tier: str = "cxl"
    page: int = 0
    deadline_s: float = 30.0

    def describe(self) -> str:
        """One line for a person."""
        verb = "detach" if self.after is Presence.ABSENT else "attach"
        where = f"{self.tier.upper()} node {self.node}"
        return f"{self.name}: {verb} empty virtio-mem {self.alias} ({where})"
