"""What somebody wants for a guest, parsed once at the edge where it came in."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from virtfabric.model.amounts import MEMORY_KEYS, Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.amounts import Amounts, Key
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.want import Want


class Origin(StrEnum):
    """The edge a request came in by."""

    DBUS = "dbus"
    HOOK = "hook"
    LEASE = "lease"
    AGENT = "agent"
    CARD = "card"
    FABRIC = "fabric"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `uid` None for the agent itself."""

    name: str
    uid: int | None = None

    def __str__(self) -> str:
        return self.name


AGENT = Principal("virtfabricd")


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one guest.

    Attributes:
        cpu, memory: None leaves that resource alone.
        tier: that `memory` is of; None where it was not named, which means DRAM.
        devices: functions by capability, counted.
        lease_s: seconds until the grant ends by itself, None for no end.
        partial: take what fits instead of all or nothing.
        deadline_s: seconds for the whole request, waiting for busy guests included.
        key: idempotency key; a repeated one answers with the first outcome. Empty for none.
    """

    id: RequestId
    guest: GuestId
    principal: Principal
    origin: Origin
    cpu: Want | None = None
    memory: Want | None = None
    devices: Mapping[str, Want] = field(default_factory=dict)
    lease_s: float | None = None
    partial: bool = False
    deadline_s: float = 30.0
    key: str = ""
    tier: Tier | None = None

    @property
    def memory_key(self) -> Key:
        """The coordinate that `memory` is of."""
        return MEMORY_KEYS[self.tier or Tier.DRAM]

    def to_json(self) -> dict[str, Any]:
        """For journal and audit."""
        return {
            "id": self.id, "guest": self.guest, "principal": self.principal.name,
            "uid": self.principal.uid, "origin": self.origin.value,
            "cpu": [self.cpu.mode.value, self.cpu.value] if self.cpu else None,
            "memory": [self.memory.mode.value, self.memory.value] if self.memory else None,
            "devices": {c: [w.mode.value, w.value] for c, w in self.devices.items()},
            "lease_s": self.lease_s, "partial": self.partial, "deadline_s": self.deadline_s,
            "key": self.key, "tier": self.tier.value if self.tier else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Offerable:
    """Bounds that authorisation puts on a principal's request: highest priority and amounts."""

    max_priority: int = 100
    max_amounts: Amounts | None = None
